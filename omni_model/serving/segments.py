"""What a model reads: text and audio in any order, cut into pieces that a batch reads together.

A row is a list of segments. Neighbours of one kind are joined, so that only the content counts and not how
it was handed over; then the row is cut into pieces of some audio followed by some text, which is what one
forward pass takes. In a batch each pass reads the next piece of every row, padded on the right; a row with
no piece left reads nothing and stays where it is.

Legend: B rows, A audio rows, T text tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids."""

    ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class Audio:
    """A clip as the projector gives it, markers included: features (A, C)."""

    features: Tensor


Segment = Text | Audio


@dataclass(frozen=True, eq=False)
class Piece:
    """Audio (A, C), then text ids (T,): what one row reads in one pass. Either may be empty."""

    audio: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.audio) + len(self.ids)


def tensors_of(segments: Sequence[Segment], vocab_size: int, width: int, like: Tensor) -> list[Tensor]:
    """Ids (T,) and features (A, C) in order: neighbours of one kind joined, nothing empty.

    Features take dtype and device of `like`. ValueError on an id or features that do not suit the model.
    """
    tensors = [_tensor_of(segment, vocab_size, width, like) for segment in segments]
    full = [tensor for tensor in tensors if len(tensor)]
    return [torch.cat(list(neighbours)) for _, neighbours in groupby(full, key=Tensor.dim)]


def _tensor_of(segment: Segment, vocab_size: int, width: int, like: Tensor) -> Tensor:
    if isinstance(segment, Text):
        return _ids(segment.ids, vocab_size)
    if isinstance(segment, Audio):
        return _features(segment.features, width, like)
    raise ValueError(f"segments must be Text or Audio, not {type(segment).__name__}.")


def _ids(ids: Sequence[int], vocab_size: int) -> Tensor:
    for place, token in enumerate(ids):
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"ids[{place}] of a Text must be an integer below {vocab_size}, not {token!r}.")
    return torch.tensor(ids, dtype=torch.long)


def _features(features: Tensor, width: int, like: Tensor) -> Tensor:
    if features.dim() != 2 or features.size(1) != width:
        raise ValueError(f"features of an Audio must be (rows, {width}), not {tuple(features.shape)}.")
    features = features.detach().to(like)
    if not torch.isfinite(features).all():
        raise ValueError(f"features {tuple(features.shape)} of an Audio are not finite in {like.dtype}.")
    return features


def cut(tensors: Sequence[Tensor], max_chunk: int, nothing: Piece) -> list[Piece]:
    """A row's tensors as pieces of at most `max_chunk` positions each."""
    pieces: list[Piece] = []
    for part in (part for tensor in tensors for part in tensor.split(max_chunk)):
        before = pieces[-1] if pieces else None
        if part.dim() == 2:
            pieces.append(Piece(part, nothing.ids))
        elif before is not None and not len(before.ids) and len(before) + len(part) <= max_chunk:
            pieces[-1] = Piece(before.audio, part)
        else:
            pieces.append(Piece(nothing.audio, part))
    return pieces


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows (n, ...) as one tensor (B, N, ...), and their lengths (B,): None when all are equally long."""
    lengths = [len(row) for row in rows]
    batch = pad_sequence(list(rows), batch_first=True)
    return batch, None if len(set(lengths)) == 1 else torch.tensor(lengths, device=batch.device)
