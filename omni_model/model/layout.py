"""Where audio rows and text tokens of a batch sit in the one sequence that the GPT runs over.

Row b of the sequence is: its real audio, its text, then whatever is padding. Both inputs are padded on the
right, so with clips of unequal length the padding of the audio has to move behind the text:

    audio  a a - -      text  t t t        sequence  a a t t t - -        (lengths 2; A = 4, T = 3)

Every real row then has the same neighbours and positions as in a batch of one, and causal attention hides the
padding from all of them.

Legend: B batch, T text tokens, A audio rows, S = A + T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One batch's arrangement. `order` (B, S) picks rows of [audio | text] in turn; None = as given."""

    num_audio: int
    num_text: int
    audio_lengths: Tensor  # (B,) real audio rows
    text_lengths: Tensor  # (B,) real text tokens
    order: Tensor | None

    @classmethod
    def of(
        cls, ids: Tensor, num_audio: int, audio_lengths: Tensor | None, text_lengths: Tensor | None
    ) -> Layout:
        """The layout of ids (B, T) behind num_audio audio rows; lengths (B,) default to everything."""
        batch, num_text = ids.shape
        order = None if audio_lengths is None else _order(num_audio, num_text, audio_lengths.to(ids.device))
        return cls(
            num_audio=num_audio,
            num_text=num_text,
            audio_lengths=_counts(audio_lengths, num_audio, batch, ids.device),
            text_lengths=_counts(text_lengths, num_text, batch, ids.device),
            order=order,
        )

    @property
    def lengths(self) -> Tensor:
        """(B,) real rows of each sample, audio and text."""
        return self.audio_lengths + self.text_lengths

    def without_padding(self, audio: Tensor) -> Tensor:
        """audio (B, A, C) with zeros in the padding, whatever stood there."""
        if self.order is None:
            return audio
        real = torch.arange(self.num_audio, device=audio.device) < self.audio_lengths.unsqueeze(1)
        return torch.where(real.unsqueeze(-1), audio, 0.0)

    def join(self, audio: Tensor, text: Tensor) -> Tensor:
        """audio (B, A, ...) and text (B, T, ...) as one sequence (B, S, ...)."""
        rows = torch.cat([audio, text], dim=1)
        if self.order is None:
            return rows
        return torch.take_along_dim(rows, _like(self.order, rows), dim=1)

    def is_text(self) -> Tensor | None:
        """(1 or B, S) bool, True where the row is text or its padding; None when there is no audio."""
        if self.num_audio == 0:
            return None
        if self.order is not None:
            return self.order >= self.num_audio
        place = torch.arange(self.num_audio + self.num_text, device=self.audio_lengths.device)
        return (place >= self.num_audio).unsqueeze(0)

    def text_of(self, x: Tensor) -> Tensor:
        """The text rows (B, T, C) of a sequence x (B, S, C)."""
        if self.order is None:
            return x[:, self.num_audio :]
        place = self.audio_lengths.unsqueeze(1) + torch.arange(self.num_text, device=x.device)
        return torch.take_along_dim(x, _like(place, x), dim=1)

    def last_of(self, x: Tensor) -> Tensor:
        """Each row's last real position (B, 1, C) of a sequence x (B, S, C)."""
        place = (self.audio_lengths + self.text_lengths - 1).clamp_min(0).unsqueeze(1)
        return torch.take_along_dim(x, _like(place, x), dim=1)


def _counts(lengths: Tensor | None, full: int, batch: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((batch,), full, device=device)
    return lengths.to(device)


def _order(num_audio: int, num_text: int, audio_lengths: Tensor) -> Tensor:
    """(B, S): at place p audio row p, then text token p - length, then the audio padding that gave way."""
    place = torch.arange(num_audio + num_text, device=audio_lengths.device)
    length = audio_lengths.unsqueeze(1)
    text = place - length + num_audio
    return torch.where(place < length, place, torch.where(place < length + num_text, text, place - num_text))


def _like(index: Tensor, x: Tensor) -> Tensor:
    """index (B, N) shaped to pick whole rows of x (B, S, ...)."""
    return index.reshape(*index.shape, *([1] * (x.dim() - 2)))
