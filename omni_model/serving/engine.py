"""Generation: read any mixture of text and audio into a cache, then let every row of it speak.

`extend` reads, `decode` speaks, and `generate` does both for a batch of prompts. A cache has seen what was
read and every token that was spoken but the last: a token is fed only when the one after it is wanted, so
nothing is computed for a token that nobody needs.

Legend: B rows, V vocabulary, C model width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from omni_model.model.decode import Decoder
from omni_model.model.gpt import GPT
from omni_model.model.kv_cache import KVCache
from omni_model.serving.sampling import Sampling, choose, draw
from omni_model.serving.segments import Piece, Segment, cut, padded, tensors_of
from omni_model.serving.tool_use import ToolUse
from omni_model.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """One token of each row (None: the row had stopped), and which of them were forced by a tool's answer."""

    tokens: list[int | None]
    forced: list[bool]


@dataclass(frozen=True)
class Reply:
    """What one row said, its stop token left out.

    forced[i]: ids[i] came from a tool's answer and not from the model. stopped: the row came to a stop token;
    otherwise it was cut off.
    """

    ids: list[int]
    forced: list[bool]
    text: str
    stopped: bool


class Engine:
    """A GPT that reads and speaks, with its weights as they are now, and may use a calculator.

    At most `max_chunk` positions of a row are read in one forward pass, which bounds the memory that a long
    prompt takes and changes no result. ValueError when the tokenizer belongs to another model.
    """

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, *, max_chunk: int = 2048) -> None:
        check_positive(max_chunk=max_chunk)
        if tokenizer.vocab_size != gpt.config.vocab_size:
            raise ValueError(
                f"tokenizer has {tokenizer.vocab_size} tokens and the GPT {gpt.config.vocab_size}: "
                "they do not belong together."
            )
        self.gpt, self.tokenizer, self.max_chunk = gpt, tokenizer, max_chunk
        self._decoder = Decoder(gpt)
        self.stop = frozenset([tokenizer.special("<|assistant_end|>"), tokenizer.bos_id])

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` positions, audio and text together."""
        return self.gpt.new_cache(batch, capacity)

    def extend(
        self,
        cache: KVCache,
        segments: Sequence[Segment] | Sequence[Sequence[Segment]],
        *,
        reserve: int = 0,
    ) -> Tensor:
        """Let every row read on where it stands; returns fp32 logits (B, V) of what may come next.

        segments: one list that all rows read, or a list for each row. reserve: positions of each row that
        must still be free afterwards. ValueError, with the cache unchanged, when a row would read nothing,
        when something to be read does not suit the model, or when it does not fit.
        """
        cache.check(self.gpt.config, cache.batch)
        rows = self._tensors_of_rows(segments, cache.batch)
        if reserve < 0:
            raise ValueError(f"reserve must be 0 positions or more, not {reserve}.")
        self._check_room(cache, [sum(map(len, row)) + reserve for row in rows], "segments")
        return self._extend(cache, rows)

    def decode(
        self,
        cache: KVCache,
        logits: Tensor,
        sampling: Sampling,
        *,
        max_tokens: int,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """Speak on from logits (B, V), a token per row and step, until every row has said a token of `stop`
        (default: <|assistant_end|> and <|bos|>) or max_tokens tokens, those of tool answers included.

        The first row to stop ends what `cache` sees: all tokens up to that step but the last. The other rows
        leave it and go on in a copy. ValueError, before anything is said, when logits, cache and max_tokens
        do not fit each other.
        """
        check_positive(max_tokens=max_tokens)
        cache.check(self.gpt.config, cache.batch)
        batch = cache.batch
        expected, found = (batch, self.gpt.config.vocab_size), tuple(logits.shape)
        if found != expected:
            raise ValueError(f"logits must be {expected} for this cache and GPT, not {found}.")
        self._check_room(cache, [max_tokens - 1] * batch, f"max_tokens {max_tokens}")
        generators = [sampling.generator(row) for row in range(batch)]
        ends = self.stop if stop is None else frozenset(stop)
        return self._steps(cache, logits, sampling, generators, max_tokens, ends)

    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        samples: int = 1,
        sampling: Sampling,
        max_tokens: int,
    ) -> list[Reply]:
        """`samples` replies to each prompt, prompt by prompt; a prompt is read once, however many samples.

        A prompt's sample number s is drawn alike whatever stands beside it. ValueError as in `extend`.
        """
        check_positive(prompts=len(prompts), samples=samples, max_tokens=max_tokens)
        rows = [self._tensors_of(prompt, row) for row, prompt in enumerate(prompts)]
        longest = max(sum(map(len, row)) for row in rows)
        if longest + max_tokens - 1 > len(self.gpt.cos):
            raise ValueError(
                f"prompts of up to {longest} positions and max_tokens {max_tokens} do not fit the "
                f"{len(self.gpt.cos)} positions of the GPT."
            )
        cache = self.new_cache(len(prompts), longest + max_tokens - 1)
        logits = self._extend(cache, rows)
        branches = torch.arange(len(prompts), device=logits.device).repeat_interleave(samples)
        generators = [sampling.generator(sample) for _ in prompts for sample in range(samples)]
        cache, logits = cache.select(branches), logits[branches]
        return self.replies(self._steps(cache, logits, sampling, generators, max_tokens, self.stop))

    def replies(self, steps: Iterable[Step]) -> list[Reply]:
        """What each row said in all the steps of a decode with the default stop tokens."""
        steps = list(steps)
        tokens = zip(*(step.tokens for step in steps), strict=True)
        forced = zip(*(step.forced for step in steps), strict=True)
        return [self._reply(*row) for row in zip(tokens, forced, strict=True)]

    def _reply(self, tokens: Sequence[int | None], forced: Sequence[bool]) -> Reply:
        said = [
            (token, was_forced) for token, was_forced in zip(tokens, forced, strict=True) if token is not None
        ]
        kept = [(token, was_forced) for token, was_forced in said if token not in self.stop]
        ids = [token for token, _ in kept]
        flags = [was_forced for _, was_forced in kept]
        return Reply(ids, flags, self.tokenizer.decode(ids), stopped=len(kept) < len(said))

    @torch.no_grad()
    def _extend(self, cache: KVCache, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Feed each row its tensors, which fit: logits (B, V)."""
        nothing = self._nothing()
        passes = zip_longest(*(cut(row, self.max_chunk, nothing) for row in rows), fillvalue=nothing)
        logits = torch.zeros(len(rows), self.gpt.config.vocab_size, device=cache.positions.device)
        for pieces in passes:
            reads = torch.tensor([len(piece) > 0 for piece in pieces], device=logits.device)
            logits = torch.where(reads.unsqueeze(1), self._read(pieces, cache), logits)
        return logits

    def _steps(
        self,
        cache: KVCache,
        logits: Tensor,
        sampling: Sampling,
        generators: list[torch.Generator],
        max_tokens: int,
        stop: frozenset[int],
    ) -> Iterator[Step]:
        """As `decode`, each row drawing from its own generator."""
        batch = len(generators)
        tools = [ToolUse(self.tokenizer) for _ in generators]
        speaking = list(range(batch))  # cache and logits hold these rows, in this order
        for number in range(1, max_tokens + 1):
            points = draw([generators[row] for row in speaking])
            sampled = choose(logits, points, sampling).tolist()
            step = Step([None] * batch, [False] * batch)
            for row, token in zip(speaking, sampled, strict=True):
                step.tokens[row], step.forced[row] = tools[row].next(token)
            yield step
            going_on = [place for place, row in enumerate(speaking) if step.tokens[row] not in stop]
            if not going_on or number == max_tokens:
                return
            if len(going_on) < len(speaking):
                cache = cache.select(torch.tensor(going_on, device=logits.device))
                speaking = [speaking[place] for place in going_on]
            spoken = torch.tensor([step.tokens[row] for row in speaking], device=logits.device)
            logits = self._decoder.step(spoken, cache)

    def _read(self, pieces: Sequence[Piece], cache: KVCache) -> Tensor:
        """Feed each row its piece: logits (B, V), of no meaning for a row that read nothing."""
        device = cache.positions.device
        ids, text_lengths = padded([piece.ids for piece in pieces])
        audio, audio_lengths = padded([piece.audio for piece in pieces])
        heard = audio.size(1) > 0
        return self.gpt(
            ids.to(device),
            audio_features=audio if heard else None,
            audio_lengths=audio_lengths if heard else None,
            text_lengths=text_lengths,
            cache=cache,
            logits="last",
        ).squeeze(1)

    def _nothing(self) -> Piece:
        """What a row reads that has nothing left to read."""
        width, device = self.gpt.config.n_embd, self.gpt.cos.device
        audio = torch.empty(0, width, dtype=self.gpt.compute_dtype, device=device)
        return Piece(audio, torch.empty(0, dtype=torch.long))

    def _tensors_of_rows(
        self, segments: Sequence[Segment] | Sequence[Sequence[Segment]], batch: int
    ) -> list[list[Tensor]]:
        """What each row is to read. ValueError when the rows are not as many as the cache's."""
        if any(isinstance(segment, Segment) for segment in segments):
            return [self._tensors_of(segments, 0)] * batch
        if len(segments) != batch:
            raise ValueError(f"segments hold {len(segments)} rows; the cache has {batch}.")
        return [self._tensors_of(row, number) for number, row in enumerate(segments)]

    def _tensors_of(self, segments: Sequence[Segment], row: int) -> list[Tensor]:
        config, like = self.gpt.config, self.gpt.cos
        tensors = tensors_of(segments, config.vocab_size, config.n_embd, like)
        if not tensors:
            raise ValueError(f"segments of row {row} hold nothing to read.")
        return tensors

    def _check_room(self, cache: KVCache, needs: Sequence[int], what: str) -> None:
        """ValueError when `what` needs more positions of a row than are free; needs (B,)."""
        limit = min(cache.capacity, len(self.gpt.cos))
        for row, (position, need) in enumerate(zip(cache.positions.tolist(), needs, strict=True)):
            if position + need > limit:
                raise ValueError(
                    f"{what} of row {row} must have {need} positions; {limit - position} of {limit} are free."
                )


def check_positive(**values: int) -> None:
    """ValueError that names the first of the values below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
