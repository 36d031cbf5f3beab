"""Where audio rows and text tokens of a batch sit in the one sequence that the GPT runs over.

Audio stands in front of the text, or anywhere in it: `audio_places` says before which token each audio row
comes. Both inputs are padded on the right, so with clips of unequal length the padding of the audio has to
move behind the text:

    audio  a a - -      text  t t t        sequence  a a t t t - -        (lengths 2; A = 4, T = 3)
    audio  a a b b      text  t t t        sequence  a a t b b t t        (places 0 0 1 1)

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
    """One batch's arrangement.

    Attributes:
        audio_lengths: (B,) real audio rows.
        text_lengths: (B,) real text tokens.
        order: (B, S) picks rows of [audio | text] in turn; None: as given.
        text_at: (B, T) where each token comes to stand; None: behind all audio rows.
        after_audio: (B, T + 1) bool, whether an audio row stands right before the token, the last entry being
            for the token that comes next; None: before the first token at the most.
    """

    num_audio: int
    num_text: int
    audio_lengths: Tensor
    text_lengths: Tensor
    order: Tensor | None
    text_at: Tensor | None
    after_audio: Tensor | None

    @classmethod
    def of(
        cls,
        ids: Tensor,
        num_audio: int,
        audio_lengths: Tensor | None,
        text_lengths: Tensor | None,
        audio_places: Tensor | None = None,
    ) -> Layout:
        """The layout of ids (B, T) and num_audio audio rows; lengths (B,) default to everything.

        audio_places (B, A): how many tokens precede each audio row, in ascending order and never more than
        the row has real ones; default 0, in front.
        """
        batch, num_text = ids.shape
        device = ids.device
        lengths = (
            _counts(audio_lengths, num_audio, batch, device),
            _counts(text_lengths, num_text, batch, device),
        )
        if audio_lengths is None and audio_places is None:
            return cls(num_audio, num_text, *lengths, order=None, text_at=None, after_audio=None)
        if audio_places is None:
            text_at = lengths[0].unsqueeze(1) + torch.arange(num_text, device=device)
            return cls(
                num_audio,
                num_text,
                *lengths,
                order=_order(num_audio, text_at),
                text_at=text_at,
                after_audio=None,
            )
        real = torch.arange(num_audio, device=device) < lengths[0].unsqueeze(1)
        places = torch.where(real, audio_places.to(device), num_text + 1)  # padding precedes no token
        tokens = torch.arange(num_text + 1, device=device).expand(batch, -1).contiguous()
        heard = torch.searchsorted(places, tokens, right=True)  # (B, T + 1) audio rows before each token
        after = torch.searchsorted(places, tokens) < heard
        text_at = (heard + tokens)[:, :-1]
        return cls(num_audio, num_text, *lengths, _order(num_audio, text_at), text_at, after)

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

    def neighbours(self, before: Tensor, text: Tensor) -> Tensor:
        """What precedes each token for smear, and the last one's successor: (B, T + 1, C).

        Entry t precedes token t of text (B, T, C); `before` (B, C) precedes the first. After audio there is
        no neighbour: zeros.
        """
        if self.num_audio and self.after_audio is None:
            before = torch.where(self.audio_lengths.unsqueeze(1) > 0, 0.0, before)
        rows = torch.cat([before.unsqueeze(1), text], dim=1)
        return rows if self.after_audio is None else rows.masked_fill(self.after_audio.unsqueeze(-1), 0.0)

    def text_of(self, x: Tensor) -> Tensor:
        """The text rows (B, T, C) of a sequence x (B, S, C)."""
        if self.text_at is None:
            return x[:, self.num_audio :]
        return torch.take_along_dim(x, _like(self.text_at, x), dim=1)

    def last_of(self, x: Tensor) -> Tensor:
        """Each row's last real position (B, 1, C) of a sequence x (B, S, C)."""
        place = (self.audio_lengths + self.text_lengths - 1).clamp_min(0).unsqueeze(1)
        return torch.take_along_dim(x, _like(place, x), dim=1)


def _counts(lengths: Tensor | None, full: int, batch: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((batch,), full, device=device)
    return lengths.to(device)


def _order(num_audio: int, text_at: Tensor) -> Tensor:
    """(B, S) for tokens that stand at text_at (B, T): audio rows fill the other places in their order."""
    batch, num_text = text_at.shape
    length = num_audio + num_text
    is_text = torch.zeros(batch, length, dtype=torch.bool, device=text_at.device)
    is_text.scatter_(1, text_at, True)
    texts = is_text.cumsum(dim=1)
    place = torch.arange(length, device=text_at.device)
    return torch.where(is_text, num_audio - 1 + texts, place - texts)


def _like(index: Tensor, x: Tensor) -> Tensor:
    """index (B, N) shaped to pick whole rows of x (B, S, ...)."""
    return index.reshape(*index.shape, *([1] * (x.dim() - 2)))
