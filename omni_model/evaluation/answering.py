"""How a listener answers: the letter it would say, and how likely it finds a given answer.

One asking is one forward pass over soft tokens and question; only the logits of the last position are made.
Askings of similar length share a batch, which changes no answer (padding is on the right and is not seen).

Legend: B batch, F encoder frames, T text tokens.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput
from omni_model.evaluation.benchmark import Item
from omni_model.model.omni import OmniModel
from omni_model.text.conversation import render, render_prompt
from omni_model.text.questions import LETTERS, multiple_choice
from omni_model.text.tokenizer import Tokenizer

BATCH_ROWS = 32
NO_TARGET = -1


@dataclass(frozen=True)
class Asked:
    """An item as it is put once: the options in this order, about this clip (None: nothing is heard)."""

    item: Item
    options: tuple[str, ...]
    clip: str | None

    @property
    def right(self) -> int:
        """Index of the right option in this order."""
        return self.options.index(self.item.key)


# Probabilities (N, 4) of the letters for N askings.
Answerer = Callable[[Sequence[Asked]], np.ndarray]


class Listener:
    """A model, its tokenizer and the features of the clips it may be asked about."""

    def __init__(self, model: OmniModel, tokenizer: Tokenizer, features: FeatureReader) -> None:
        self._model, self._tokenizer, self._features = model.eval(), tokenizer, features
        self._device = next(model.parameters()).device
        self._letters = [self._letter_id(letter) for letter in LETTERS]

    def with_random_projector(self, seed: int) -> "Listener":
        """The same listener behind a projector that learned nothing."""
        projector = copy.deepcopy(self._model.projector)
        projector.init_weights(seed)
        return Listener(OmniModel(self._model.gpt, projector), self._tokenizer, self._features)

    def letters(self, asked: Sequence[Asked]) -> np.ndarray:
        """Probabilities (N, 4) of A, B, C and D as the first token of the answer, among these four alone."""
        prompts = [
            render_prompt(self._tokenizer, multiple_choice(one.item.question, one.options)) for one in asked
        ]
        probabilities = np.empty((len(asked), len(LETTERS)))
        clips = [one.clip for one in asked]
        for rows in self._batches(prompts, clips):
            ids, text_lengths = self._padded([prompts[row] for row in rows], fill=0)
            frames, frame_lengths = self._frames([clips[row] for row in rows])
            with torch.inference_mode():
                logits = self._model(frames, frame_lengths, ids, logits="last", text_lengths=text_lengths)
            chosen = logits[:, -1, self._letters].double().softmax(dim=-1)
            probabilities[rows] = chosen.cpu().numpy()
        return probabilities

    def log_likelihoods(self, answers: Sequence[tuple[str, str]], clips: Sequence[str | None]) -> np.ndarray:
        """Mean log-probability per token, in nats, of each (question, answer) about its clip: (N,)."""
        rendered = [render(self._tokenizer, [answer]) for answer in answers]
        likelihoods = np.empty(len(answers))
        for rows in self._batches([ids for ids, _ in rendered], clips):
            ids, text_lengths = self._padded([rendered[row][0][:-1] for row in rows], fill=0)
            # A position's target is the next token where that one belongs to the answer.
            spoken = [
                [token if taught else NO_TARGET for token, taught in zip(*rendered[row], strict=True)][1:]
                for row in rows
            ]
            targets, _ = self._padded(spoken, fill=NO_TARGET)
            frames, frame_lengths = self._frames([clips[row] for row in rows])
            with torch.inference_mode():
                losses = self._model(
                    frames, frame_lengths, ids, targets, loss_reduction="none", text_lengths=text_lengths
                )
            scored = targets != NO_TARGET
            losses = torch.where(scored, losses.view_as(targets), 0.0).double()
            likelihoods[rows] = -(losses.sum(dim=1) / scored.sum(dim=1)).cpu().numpy()
        return likelihoods

    def _letter_id(self, letter: str) -> int:
        ids = self._tokenizer.encode(letter)
        if len(ids) != 1:
            raise BadInput(
                f"the tokenizer cuts the letter {letter} into {len(ids)} tokens; train it on the corpus again"
            )
        return ids[0]

    def _batches(self, texts: Sequence[Sequence[int]], clips: Sequence[str | None]) -> list[list[int]]:
        """Row numbers in batches of similar length; a batch either hears in every row or in none."""
        order = sorted(range(len(texts)), key=lambda row: (clips[row] is None, len(texts[row]), row))
        hearing = sum(clip is not None for clip in clips)
        return [
            part[first : first + BATCH_ROWS]
            for part in (order[:hearing], order[hearing:])
            for first in range(0, len(part), BATCH_ROWS)
        ]

    def _padded(self, rows: Sequence[Sequence[int]], *, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) filled on the right, and the lengths (B,)."""
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.full((len(rows), int(lengths.max())), fill)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row)
        return padded.to(self._device), lengths.to(self._device)

    def _frames(self, clips: Sequence[str | None]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(B, F, E) filled with zeros on the right, and the real frames (B,); None where nothing is heard."""
        read = [
            torch.from_numpy(self._features.frames(clip).astype(np.float32))
            for clip in clips
            if clip is not None
        ]
        if not read:
            return None, None
        lengths = torch.tensor([len(frames) for frames in read])
        return torch.nn.utils.rnn.pad_sequence(read, batch_first=True).to(self._device), lengths.to(
            self._device
        )
