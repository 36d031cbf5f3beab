"""Rows that sound and text share, for every stage that teaches the listener.

A row is a clip's frames and an exchange about it: a caption on request, an open question, or multiple choice.
Which row comes when is a pure function of (seed, row number), so a resumed run reads what it would have read.

Legend: B batch, F encoder frames, E encoder width, T text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput
from omni_model.model.omni import OmniModel
from omni_model.text.conversation import Exchange
from omni_model.text.questions import LETTERS, askable, caption, grammar, multiple_choice, pick_options
from omni_model.text.tokenizer import Tokenizer
from omni_model.training.exchanges import NOT_SCORED, ExchangeRows

EVALUATION_ROWS = 64  # in one forward pass
VALIDATION_QUESTIONS = 400

Clip = dict[str, Any]
Row = tuple[Clip, Exchange]
# How a clip is asked about; randomness comes from the generator alone.
Asking = Callable[[Clip, np.random.Generator], Exchange]


@dataclass(frozen=True)
class Batch:
    """frames (B, F, E) with frame_lengths (B,), and the exchanges about them."""

    frames: Tensor
    frame_lengths: Tensor
    rows: ExchangeRows

    def loss(self, model: OmniModel, *, reduction: str = "mean") -> Tensor:
        """The model's loss on the answers, in nats per token."""
        rows = self.rows
        return model(
            self.frames,
            self.frame_lengths,
            rows.ids,
            rows.targets,
            loss_reduction=reduction,
            text_lengths=rows.lengths,
        )


def ask_caption(clip: Clip, rng: np.random.Generator) -> Exchange:
    """A request for a caption, and the caption."""
    return str(rng.choice(grammar().caption_prompts)), caption(clip["labels"], clip["transcript"])


def ask_open(clip: Clip, rng: np.random.Generator) -> Exchange:
    """A question about one label, and the word."""
    category = str(rng.choice(sorted(clip["labels"])))
    return str(rng.choice(grammar().category(category).questions)), clip["labels"][category]


def ask_choice(clip: Clip, rng: np.random.Generator) -> Exchange:
    """A multiple-choice question about one label, and the letter."""
    category = str(rng.choice(sorted(clip["labels"])))
    options = pick_options(category, clip["labels"][category], rng)
    question = str(rng.choice(grammar().category(category).questions))
    return multiple_choice(question, options), LETTERS[options.index(clip["labels"][category])]


class Classroom:
    """The labelled clips of one split, and batches of them.

    Raises:
        BadInput: the split has no labelled clips.
    """

    def __init__(self, features: FeatureReader, split: str, tokenizer: Tokenizer) -> None:
        clips = [clip | {"labels": askable(clip["labels"])} for clip in features.by_split(split)]
        self.clips = [clip for clip in clips if clip["labels"]]
        if not self.clips:
            raise BadInput(
                f"the features hold no labelled clips in the {split} split; raise its size in the recipe"
            )
        self._features, self._tokenizer = features, tokenizer
        self._frames: dict[str, Tensor] = {}

    def clip(self, number: int, seed: int) -> Clip:
        """Item `number` of an endless sequence of shuffled passes over the split."""
        epoch, place = divmod(number, len(self.clips))
        return self.clips[np.random.default_rng([seed, epoch]).permutation(len(self.clips))[place]]

    def batch(self, rows: Sequence[Row], heard: Sequence[Clip] | None = None) -> Batch:
        """Rows padded on the right. `heard` replaces the clips whose frames are heard."""
        frames = [self.frames(clip) for clip in heard or [clip for clip, _ in rows]]
        return Batch(
            torch.nn.utils.rnn.pad_sequence(frames, batch_first=True),
            torch.tensor([len(each) for each in frames]),
            ExchangeRows.of([exchange for _, exchange in rows], self._tokenizer),
        )

    def training_batch(self, step: int, rows: int, seed: int, ask: Asking) -> Batch:
        """The batch of a step: the next `rows` clips, each asked about in its own random way."""
        rng = np.random.default_rng([seed, step])
        clips = [self.clip(step * rows + place, seed) for place in range(rows)]
        return self.batch([(clip, ask(clip, rng)) for clip in clips])

    def frames(self, clip: Clip) -> Tensor:
        """Frames (F, E) of a clip, read once."""
        key = clip["key"]
        if key not in self._frames:
            self._frames[key] = torch.from_numpy(np.asarray(self._features.frames(key), dtype=np.float32))
        return self._frames[key]


@torch.no_grad()
def caption_losses(model: OmniModel, classroom: Classroom, seed: int) -> tuple[float, float]:
    """Caption loss in nats per token with each clip's own sound, and with the next clip's.

    A model that listens has a higher loss on the wrong sound; equal losses mean that it only guesses.
    """
    rng = np.random.default_rng([seed, len(classroom.clips)])
    clips = [classroom.clips[i] for i in rng.permutation(len(classroom.clips))]
    rows = [(clip, ask_caption(clip, rng)) for clip in clips]
    own = _mean_loss(model, classroom, rows, clips)
    return own, _mean_loss(model, classroom, rows, [*clips[1:], clips[0]])


def _mean_loss(model: OmniModel, classroom: Classroom, rows: Sequence[Row], heard: Sequence[Clip]) -> float:
    total, count = 0.0, 0
    for first in range(0, len(rows), EVALUATION_ROWS):
        part = slice(first, first + EVALUATION_ROWS)
        batch = classroom.batch(rows[part], heard[part])
        scored = batch.rows.targets.flatten() != NOT_SCORED
        total += float(batch.loss(model, reduction="none").flatten()[scored].double().sum())
        count += int(scored.sum())
    return round(total / count, 4)


@torch.no_grad()
def choice_accuracy(
    model: OmniModel, classroom: Classroom, seed: int, questions: int = VALIDATION_QUESTIONS
) -> float:
    """Share of random multiple-choice questions whose letter the model prefers to the other letters."""
    rng = np.random.default_rng([seed, questions])
    clips = [classroom.clips[i] for i in rng.choice(len(classroom.clips), size=questions)]
    rows = [(clip, ask_choice(clip, rng)) for clip in clips]
    right = 0
    for first in range(0, questions, EVALUATION_ROWS):
        batch = classroom.batch(rows[first : first + EVALUATION_ROWS])
        place, answers = batch.rows.first_answer()
        logits = model(batch.frames, batch.frame_lengths, batch.rows.ids, text_lengths=batch.rows.lengths)
        letters = answers.unique()
        chosen = letters[logits[torch.arange(len(place)), place][:, letters].argmax(dim=-1)]
        right += int((chosen == answers).sum())
    return round(right / questions, 4)


@torch.no_grad()
def loudness_ratio(model: OmniModel, classroom: Classroom, seed: int) -> float:
    """Root mean square of the projector's rows over that of the text embeddings, both before their norm."""
    rng = np.random.default_rng([seed, 0])
    clips = [classroom.clips[i] for i in rng.permutation(len(classroom.clips))[:EVALUATION_ROWS]]
    batch = classroom.batch([(clip, ask_caption(clip, rng)) for clip in clips])
    rows, lengths = model.projector(batch.frames, batch.frame_lengths)
    heard = rows[torch.arange(rows.size(1)) < lengths.unsqueeze(1)]
    read = model.gpt.transformer["wte"](batch.rows.ids)
    return round(float(heard.square().mean().sqrt() / read.square().mean().sqrt()), 4)
