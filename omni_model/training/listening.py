"""Rows that sound and text share, for every stage that teaches the listener.

A row is a conversation with clips in it. Which rows come when is a pure function of (seed, step), so a
resumed run reads what it would have read.

Legend: B batch, N clips of a batch, F encoder frames, E frame width, T text tokens.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni_model.artifacts import Instructions
from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput
from omni_model.model.omni import Descriptions, OmniModel, Sounds
from omni_model.text.conversation import Hearing, render_heard
from omni_model.text.questions import askable, caption
from omni_model.text.tokenizer import Tokenizer
from omni_model.training.exchanges import NOT_SCORED, ExchangeRows
from omni_model.training.instructions import Instruction, read_instructions

BATCHES_PER_SORT = 8
EVALUATION_ROWS = 64  # in one forward pass

# What is heard instead of what a row says: each thing heard, to what is.
Replacing = Callable[[Hearing], Hearing]


@dataclass(frozen=True)
class Batch:
    """Rows of text, and the clips and descriptions that are heard in them."""

    text: ExchangeRows
    sounds: Sounds | None
    descriptions: Descriptions | None

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        rows = self.text
        text = ExchangeRows(rows.ids.to(device), rows.targets.to(device), rows.lengths.to(device))
        return Batch(text, self.sounds, self.descriptions)  # the model carries what is heard

    def loss(self, model: OmniModel, *, reduction: str = "mean") -> Tensor:
        """The model's loss on the answers, in nats per token."""
        return model(
            self.text.ids,
            self.text.targets,
            sounds=self.sounds,
            descriptions=self.descriptions,
            text_lengths=self.text.lengths,
            loss_reduction=reduction,
        )

    def logits(self, model: OmniModel, *, scored: bool = False) -> Tensor:
        """(B, T, V), or of the answers' tokens alone (M, V)."""
        return model(
            self.text.ids,
            self.text.targets if scored else None,
            sounds=self.sounds,
            descriptions=self.descriptions,
            text_lengths=self.text.lengths,
            logits="scored" if scored else "all",
        )


class Classroom:
    """The rows of one split, and batches of them.

    Args:
        hearing: whether rows without a clip are left out.

    Raises:
        BadInput: the split has no rows, or a row hears a clip without features.
    """

    def __init__(
        self,
        features: FeatureReader,
        instructions: Instructions,
        split: str,
        tokenizer: Tokenizer,
        device: torch.device | None = None,
        *,
        hearing: bool = False,
    ) -> None:
        self.rows = [row for row in read_instructions(instructions, split) if row.clips or not hearing]
        if not self.rows:
            raise BadInput(
                f"{instructions.uri} holds no rows of the {split} split; raise instructions.rows or "
                "instructions.validation_rows"
            )
        self.clips = {clip["key"]: clip for clip in features.by_split(split)}
        missing = sorted({key for row in self.rows for key in row.clips} - self.clips.keys())
        if missing:
            raise BadInput(
                f"{instructions.uri} asks about {len(missing)} clips that have no features, such as "
                f"{missing[0]}; give the features of the same corpora"
            )
        self._features, self._tokenizer = features, tokenizer
        self._device = device or torch.device("cpu")

    def of_kind(self, *kinds: str) -> list[Instruction]:
        """The rows of some kinds, in order."""
        return [row for row in self.rows if row.kind in kinds]

    def batch(self, rows: Sequence[Instruction], instead: Replacing | None = None) -> Batch:
        """Rows padded on the right; `instead` replaces what is heard."""
        rendered = [render_heard(self._tokenizer, row.messages) for row in rows]
        heard = [
            (row, hearing if instead is None else instead(hearing))
            for row, (_, _, hearings) in enumerate(rendered)
            for hearing in hearings
        ]
        text = ExchangeRows.of_rendered([(ids, mask) for ids, mask, _ in rendered], self._tokenizer.bos_id)
        return Batch(text, self._sounds(heard), self._descriptions(heard)).to(self._device)

    def training_rows(self, step: int, size: int, seed: int) -> list[Instruction]:
        """The rows of a step. Those of several steps are drawn at once and sorted by length: less padding."""
        group, place = divmod(step, BATCHES_PER_SORT)
        drawn = BATCHES_PER_SORT * size
        chosen = [self._numbered(group * drawn + number, seed) for number in range(drawn)]
        chosen.sort(key=self._length)  # stable: rows of one length keep their random order
        order = np.random.default_rng([seed, group]).permutation(BATCHES_PER_SORT)
        first = int(order[place]) * size
        return chosen[first : first + size]

    def describe(self, hearing: Hearing) -> Hearing:
        """The caption of a clip in the clip's place: what is said, and how."""
        if not hearing.clip:
            return hearing
        clip = self.clips[hearing.clip]
        told = caption(askable(clip["labels"]), clip["transcript"])
        return Hearing(hearing.place, description=told)

    def _numbered(self, number: int, seed: int) -> Instruction:
        """Row `number` of an endless sequence of shuffled passes over the split."""
        epoch, place = divmod(number, len(self.rows))
        return self.rows[_order(len(self.rows), seed, epoch)[place]]

    def _length(self, row: Instruction) -> int:
        return sum(int(self.clips[key]["num_frames"]) for key in row.clips)

    def _sounds(self, heard: Sequence[tuple[int, Hearing]]) -> Sounds | None:
        clips = [(row, hearing) for row, hearing in heard if hearing.clip]
        if not clips:
            return None
        frames = [torch.from_numpy(self._features.frames(hearing.clip)).float() for _, hearing in clips]
        return Sounds(
            torch.nn.utils.rnn.pad_sequence(frames, batch_first=True),
            torch.tensor([len(each) for each in frames]),
            torch.tensor([row for row, _ in clips]),
            torch.tensor([hearing.place for _, hearing in clips]),
        )

    def _descriptions(self, heard: Sequence[tuple[int, Hearing]]) -> Descriptions | None:
        texts = [(row, hearing) for row, hearing in heard if hearing.description]
        if not texts:
            return None
        ids = [torch.tensor(self._tokenizer.encode(f" {hearing.description}")) for _, hearing in texts]
        return Descriptions(
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
            torch.tensor([len(each) for each in ids]),
            torch.tensor([row for row, _ in texts]),
            torch.tensor([hearing.place for _, hearing in texts]),
        )


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Of the rows in one pass; kept, since every row of a step asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Truth:
    """What shows whether a model listens, on rows that it does not learn from.

    Attributes:
        own_loss: mean loss in nats per learned token, each row with its own clips.
        gap: how much higher it is when each row hears the clips of another.
        first_token_accuracy: share of answers whose first token is the likeliest of all.
        rms_ratio: root mean square of the soft tokens over that of the text embeddings, before their norm.
    """

    own_loss: float
    gap: float
    first_token_accuracy: float
    rms_ratio: float


@torch.no_grad()
def look(model: OmniModel, classroom: Classroom, rows: Sequence[Instruction]) -> Truth:
    """Measure `rows`, of which each hears something."""
    sums = np.zeros(5)  # nats, tokens, right first tokens; squares of soft tokens, their number
    other = np.zeros(2)
    read = model.gpt.transformer["wte"]
    reading = np.zeros(2)
    for first in range(0, len(rows), EVALUATION_ROWS):
        batch = classroom.batch(rows[first : first + EVALUATION_ROWS])
        sums[:2] += _summed_loss(model, batch)
        other += _summed_loss(model, batch_with_other_clips(batch))
        place, answers = batch.text.first_answer()
        logits = batch.logits(model)
        chosen = logits[torch.arange(len(place), device=logits.device), place].argmax(dim=-1)
        sums[2] += int((chosen == answers).sum())
        assert batch.sounds is not None
        device = answers.device
        soft, counts = model.projector(batch.sounds.frames.to(device), batch.sounds.lengths.to(device))
        soft = soft[torch.arange(soft.size(1), device=device) < counts.unsqueeze(1)].double()
        sums[3:] += float(soft.square().sum()), soft.numel()
        words = read(batch.text.ids).double()
        reading += float(words.square().sum()), words.numel()
    own = sums[0] / sums[1]
    ratio = (sums[3] / sums[4]) ** 0.5 / (reading[0] / reading[1]) ** 0.5
    return Truth(
        own_loss=round(float(own), 4),
        gap=round(float(other[0] / other[1] - own), 4),
        first_token_accuracy=round(float(sums[2]) / len(rows), 4),
        rms_ratio=round(float(ratio), 4),
    )


def batch_with_other_clips(batch: Batch) -> Batch:
    """Each clip's frames go to the clip before it; with one clip in the batch nothing changes."""
    sounds = batch.sounds
    assert sounds is not None
    moved = Sounds(sounds.frames.roll(1, 0), sounds.lengths.roll(1, 0), sounds.rows, sounds.places)
    return Batch(batch.text, moved, batch.descriptions)


def _summed_loss(model: OmniModel, batch: Batch) -> tuple[float, int]:
    """Nats, and the number of learned tokens."""
    scored = batch.text.targets.flatten() != NOT_SCORED
    losses = batch.loss(model, reduction="none").flatten()[scored]
    return float(losses.double().sum()), int(scored.sum())


@torch.no_grad()
def mean_loss(model: OmniModel, classroom: Classroom, rows: Sequence[Instruction]) -> float:
    """Mean loss of rows in nats per learned token."""
    sums = np.zeros(2)
    for first in range(0, len(rows), EVALUATION_ROWS):
        sums += _summed_loss(model, classroom.batch(rows[first : first + EVALUATION_ROWS]))
    return round(float(sums[0] / sums[1]), 4)


@torch.no_grad()
def choice_accuracy(model: OmniModel, classroom: Classroom, rows: Sequence[Instruction]) -> float:
    """Share of multiple-choice rows whose letter the model prefers to the other letters."""
    right = 0
    for first in range(0, len(rows), EVALUATION_ROWS):
        batch = classroom.batch(rows[first : first + EVALUATION_ROWS])
        place, answers = batch.text.first_answer()
        logits = batch.logits(model)[torch.arange(len(place), device=place.device), place]
        letters = answers.unique()
        right += int((letters[logits[:, letters].argmax(dim=-1)] == answers).sum())
    return round(right / len(rows), 4)
