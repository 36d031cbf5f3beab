"""The whole listener: a projector turns encoder frames into soft tokens, which the GPT reads among its text.

A clip stands in front of a row's text or before any of its tokens, and a row may hear several. A description
is a text in a clip's place: its embeddings are read as soft tokens are, without ids. So a GPT can be asked
about a sound in words exactly as it is asked about the sound.

Legend: B batch, T text tokens, N clips of the batch, F encoder frames, E frame width, D tokens of a
description, M rows that a clip becomes, A audio rows, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omni_model.model.gpt import GPT
from omni_model.model.projector import Projector


@dataclass(frozen=True)
class Sounds:
    """The clips that a batch hears, by row and, within a row, in the order in which they are heard.

    Attributes:
        frames: (N, F, E), padded on the right.
        lengths: (N,) real frames; 0: nothing is heard.
        rows: (N,) the row of the batch that hears it.
        places: (N,) before which token of the row's text; 0: in front.
    """

    frames: Tensor
    lengths: Tensor
    rows: Tensor
    places: Tensor

    @classmethod
    def in_front(cls, frames: Tensor, lengths: Tensor) -> Sounds:
        """One clip in front of each row: frames (B, F, E), lengths (B,)."""
        return cls(frames, lengths, torch.arange(len(lengths)), torch.zeros(len(lengths), dtype=torch.long))


@dataclass(frozen=True)
class Descriptions:
    """Texts in the place of clips: ids (N, D) padded on the right, lengths (N,), and where; see `Sounds`."""

    ids: Tensor
    lengths: Tensor
    rows: Tensor
    places: Tensor


class OmniModel(nn.Module):
    """GPT and projector under one roof; parameters are named gpt.* and projector.*."""

    def __init__(self, gpt: GPT, projector: Projector) -> None:
        super().__init__()
        self.gpt = gpt
        self.projector = projector

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        sounds: Sounds | None = None,
        descriptions: Descriptions | None = None,
        text_lengths: Tensor | None = None,
        logits: str = "all",
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Logits of the text (B, T, V), or its loss when targets are given; see GPT.forward.

        A row hears its clips and descriptions in the order of their places. Rows that hear nothing are text
        alone. ValueError when what is heard does not fit the batch.
        """
        device = ids.device
        heard: list[_Heard] = []
        if sounds is not None:
            rows, counts = self.projector(sounds.frames.to(device), sounds.lengths.to(device))
            heard.append(_Heard(rows, counts, sounds.rows.to(device), sounds.places.to(device)))
        if descriptions is not None:
            words = self.gpt.transformer["wte"](descriptions.ids.to(device))
            where = (descriptions.lengths, descriptions.rows, descriptions.places)
            heard.append(_Heard(words, *(each.to(device) for each in where)))
        features, lengths, places = _by_row(heard, len(ids)) if heard else (None, None, None)
        return self.gpt(
            ids,
            targets,
            audio_features=features,
            audio_lengths=lengths,
            audio_places=places,
            text_lengths=text_lengths,
            logits=logits,
            loss_reduction=loss_reduction,
        )


@dataclass(frozen=True)
class _Heard:
    """What clips became: features (N, M, C), their real counts (N,), rows (N,) and places (N,)."""

    features: Tensor
    counts: Tensor
    rows: Tensor
    places: Tensor


def _by_row(heard: Sequence[_Heard], batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features (B, A, C), counts (B,) and places (B, A) of what each row hears; no places: all in front."""
    first = heard[0]
    in_turn = len(first.rows) == batch and bool((first.rows.cpu() == torch.arange(batch)).all())
    if len(heard) == 1 and in_turn and not bool(first.places.any()):
        return first.features, first.counts, None
    counts, rows, places = (
        torch.cat([getattr(each, name) for each in heard]) for name in ("counts", "rows", "places")
    )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < batch:
        raise ValueError(f"rows of what is heard lie between {rows.min()} and {rows.max()}, of {batch} rows.")
    # By row and place; clips of one place stay in the order in which they were given.
    order = torch.argsort(rows * (int(places.max()) + 1) + places, stable=True)
    starts = torch.empty_like(counts)
    before = counts[order].cumsum(0) - counts[order]
    of_row = torch.zeros(batch, dtype=counts.dtype, device=counts.device).index_add_(0, rows, counts)
    starts[order] = before - (of_row.cumsum(0) - of_row)[rows[order]]
    width, longest = first.features.size(2), int(of_row.max())
    features = first.features.new_zeros(batch, longest, width)
    at = torch.zeros(batch, longest, dtype=torch.long, device=counts.device)
    done = 0
    for each in heard:
        own = slice(done, done + len(each.rows))
        done += len(each.rows)
        step = torch.arange(each.features.size(1), device=counts.device)
        real = step < each.counts.unsqueeze(1)  # (N, M)
        row = each.rows.unsqueeze(1).expand_as(real)[real]
        place = (starts[own].unsqueeze(1) + step)[real]
        features = features.index_put((row, place), each.features[real].to(features.dtype))
        at[row, place] = each.places.unsqueeze(1).expand_as(real)[real]
    return features, of_row, at
