"""How a listener answers: the letter it would say, how likely it finds a given answer, and what it writes.

An item's clips stand in front of its question, in their order, just as the rows of training have them. One
asking is one forward pass, of which only the logits of the last position are made. Askings of similar length
share a batch, which changes no answer (padding is on the right and is not seen).

Legend: B batch, N clips of a batch, F encoder frames, E frame width, T text tokens.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from omni_model.config import BadInput
from omni_model.evaluation.benchmark_item import Item
from omni_model.model.omni import OmniModel, Sounds
from omni_model.text.conversation import Message, render_heard
from omni_model.text.questions import LETTERS, multiple_choice
from omni_model.text.tokenizer import Tokenizer

BATCH_ROWS = 32
NO_TARGET = -1
NOTHING_HEARD: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """An item as it is put once: the options in this order, about these clips (none: nothing is heard)."""

    item: Item
    options: tuple[str, ...]
    clips: tuple[str, ...]

    @property
    def right(self) -> int:
        """Index of the right option in this order."""
        return self.options.index(self.item.key)

    @property
    def words(self) -> str:
        """The question with its options."""
        return multiple_choice(self.item.question, self.options)


@dataclass(frozen=True)
class Row:
    """Token ids, which of them are the answer's, and the clips with the tokens that they stand before."""

    ids: list[int]
    mask: list[int]
    clips: tuple[str, ...]
    places: tuple[int, ...]

    def saying(self, tokens: Sequence[int]) -> "Row":
        """The same with tokens added at its end."""
        return Row([*self.ids, *tokens], [*self.mask, *(1 for _ in tokens)], self.clips, self.places)


# Probabilities (N, 4) of the letters for N askings.
Answerer = Callable[[Sequence[Asked]], np.ndarray]
# Frames (F, E) of a clip by its key.
Frames = Callable[[str], np.ndarray]


class Listener:
    """A model, its tokenizer and the frames of the clips it may be asked about."""

    def __init__(self, model: OmniModel, tokenizer: Tokenizer, frames: Frames) -> None:
        self._model, self._tokenizer, self._frames = model.eval(), tokenizer, frames
        self._device = model.gpt.cos.device
        self._letters = [self._letter_id(letter) for letter in LETTERS]

    def with_random_projector(self, seed: int) -> "Listener":
        """The same listener behind a projector that learned nothing."""
        projector = copy.deepcopy(self._model.projector)
        projector.init_weights(seed % 2**63)
        return Listener(OmniModel(self._model.gpt, projector), self._tokenizer, self._frames)

    def with_frames(self, frames: Frames) -> "Listener":
        """The same listener with other frames of the same clips."""
        return Listener(self._model, self._tokenizer, frames)

    def letters(self, asked: Sequence[Asked]) -> np.ndarray:
        """Probabilities (N, 4) of A, B, C and D as the first token of the answer, among these four alone."""
        rows = [self._prompt(one.words, one.clips) for one in asked]
        probabilities = np.empty((len(rows), len(LETTERS)))
        for batch in _batches(rows):
            logits = self._next([rows[row] for row in batch])[:, self._letters]
            probabilities[batch] = logits.double().softmax(dim=-1).cpu().numpy()
        return probabilities

    def log_likelihoods(
        self, answers: Sequence[tuple[str, str]], clips: Sequence[tuple[str, ...]]
    ) -> np.ndarray:
        """Mean log-probability per token, in nats, of each (question, answer) about its clips: (N,)."""
        rows = [
            self._render([*_user(question, heard), {"role": "assistant", "content": answer}])
            for (question, answer), heard in zip(answers, clips, strict=True)
        ]
        likelihoods = np.empty(len(rows))
        for batch in _batches(rows):
            some = [rows[row] for row in batch]
            ids, text_lengths = self._padded([row.ids[:-1] for row in some], fill=0)
            # A position's target is the next token where that one belongs to the answer.
            spoken = [
                [token if learned else NO_TARGET for token, learned in zip(row.ids, row.mask, strict=True)]
                for row in some
            ]
            targets, _ = self._padded([tokens[1:] for tokens in spoken], fill=NO_TARGET)
            with torch.inference_mode():
                losses = self._model(
                    ids,
                    targets,
                    sounds=self._sounds(some),
                    text_lengths=text_lengths,
                    loss_reduction="none",
                )
            scored = targets != NO_TARGET
            losses = torch.where(scored, losses.view_as(targets), 0.0).double()
            likelihoods[batch] = -(losses.sum(dim=1) / scored.sum(dim=1)).cpu().numpy()
        return likelihoods

    def says(self, asked: Sequence[Asked], max_tokens: int) -> list[str]:
        """What it writes as its answer, always its likeliest token, until it ends or has no tokens left."""
        rows = [self._prompt(one.words, one.clips) for one in asked]
        said: list[list[int]] = [[] for _ in rows]
        ends = {self._tokenizer.special("<|assistant_end|>"), self._tokenizer.bos_id}
        speaking = list(range(len(rows)))
        for _ in range(max_tokens):
            for batch in _batches([rows[row].saying(said[row]) for row in speaking]):
                some = [speaking[place] for place in batch]
                logits = self._next([rows[row].saying(said[row]) for row in some])
                for row, token in zip(some, logits.argmax(dim=-1).tolist(), strict=True):
                    said[row].append(token)
            speaking = [row for row in speaking if said[row][-1] not in ends]
        return [self._tokenizer.decode([token for token in each if token not in ends]) for each in said]

    def _letter_id(self, letter: str) -> int:
        ids = self._tokenizer.encode(letter)
        if len(ids) != 1:
            raise BadInput(
                f"the tokenizer cuts the letter {letter} into {len(ids)} tokens; train it on the corpus again"
            )
        return ids[0]

    def _prompt(self, words: str, clips: Sequence[str]) -> Row:
        return self._render(_user(words, clips)).saying([self._tokenizer.special("<|assistant_start|>")])

    def _render(self, messages: Sequence[Message]) -> Row:
        ids, mask, heard = render_heard(self._tokenizer, messages)
        return Row(ids, mask, tuple(each.clip for each in heard), tuple(each.place for each in heard))

    def _next(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits (B, V) of what follows each row."""
        ids, text_lengths = self._padded([row.ids for row in rows], fill=0)
        with torch.inference_mode():
            logits = self._model(ids, sounds=self._sounds(rows), text_lengths=text_lengths, logits="last")
        found: torch.Tensor = logits[:, -1]
        return found

    def _padded(self, rows: Sequence[Sequence[int]], *, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) filled on the right, and the lengths (B,)."""
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.full((len(rows), int(lengths.max())), fill)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row)
        return padded.to(self._device), lengths.to(self._device)

    def _sounds(self, rows: Sequence[Row]) -> Sounds | None:
        """All clips of a batch, their frames filled with zeros on the right; None where there are none."""
        clips = [key for row in rows for key in row.clips]
        if not clips:
            return None
        read = [torch.from_numpy(self._frames(key).astype(np.float32)) for key in clips]
        return Sounds(
            frames=torch.nn.utils.rnn.pad_sequence(read, batch_first=True),
            lengths=torch.tensor([len(frames) for frames in read]),
            rows=torch.tensor([number for number, row in enumerate(rows) for _ in row.clips]),
            places=torch.tensor([place for row in rows for place in row.places]),
        )


def _user(words: str, clips: Sequence[str]) -> list[Message]:
    """A message of the user's: the clips, then the words."""
    heard = [{"type": "audio", "clip": clip} for clip in clips]
    return [{"role": "user", "content": [*heard, {"type": "text", "text": words}]}]


def _batches(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers in batches of similar length; all rows of a batch hear equally many clips."""
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row].clips), len(rows[row].ids), row))
    counts = sorted({len(row.clips) for row in rows})
    parts = [[row for row in order if len(rows[row].clips) == count] for count in counts]
    return [part[first : first + BATCH_ROWS] for part in parts for first in range(0, len(part), BATCH_ROWS)]
