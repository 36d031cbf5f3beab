"""A conversation that keeps its cache: a turn costs its own tokens, however long the talk has been."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from omni_model.model.kv_cache import Snapshot
from omni_model.serving.engine import Engine, Step, check_positive
from omni_model.serving.sampling import Sampling
from omni_model.serving.segments import Segment, Text


@dataclass(frozen=True)
class Bookmark:
    """A place in a conversation to go back to, as often as one likes, until one goes back further."""

    snapshot: Snapshot
    unread: list[int]


class Conversation:
    """Turns of a speaker and answers of the model, in up to `capacity` positions.

    The caller renders each turn, the first from <|bos|> on, every one up to <|assistant_start|>. Behind an
    answer the conversation itself puts <|assistant_end|>, also when the answer was cut off or abandoned.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._engine = engine
        self._cache = engine.new_cache(1, capacity)
        self._end = engine.tokenizer.special("<|assistant_end|>")
        self._unread: list[int] = []  # what comes next in the conversation and is not in the cache yet
        self._answer: Generator[Step, None, None] | None = None

    def ask(self, turn: Sequence[Segment], sampling: Sampling, *, max_tokens: int) -> Iterator[Step]:
        """Read a turn and answer it, a token per step. An earlier answer that still goes on ends here.

        ValueError, with the conversation unchanged, when the turn does not suit the model or has no room.
        """
        check_positive(max_tokens=max_tokens, turn=len(turn))
        segments = [Text(self._unread), *turn]
        logits = self._engine.extend(self._cache, segments, reserve=max_tokens - 1)
        self._end_answer()
        self._unread = [self._end]
        self._answer = self._heard(self._engine.decode(self._cache, logits, sampling, max_tokens=max_tokens))
        return self._answer

    def bookmark(self) -> Bookmark:
        """This place in the conversation, between two turns."""
        return Bookmark(self._cache.snapshot(), list(self._unread))

    def go_back(self, place: Bookmark) -> None:
        """Forget everything since the bookmark. ValueError when it is not of this past."""
        self._cache.restore(place.snapshot)
        self._end_answer()
        self._unread = list(place.unread)

    def _heard(self, steps: Iterator[Step]) -> Generator[Step, None, None]:
        for step in steps:
            said = [token for token in step.tokens if token is not None and token not in self._engine.stop]
            self._unread = [*said, self._end]
            yield step

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
