"""Questions and answers as padded rows, for every stage whose loss is on answers.

Legend: B batch, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_model.text.conversation import Exchange, render
from omni_model.text.tokenizer import Tokenizer

NOT_SCORED = -1


@dataclass(frozen=True)
class ExchangeRows:
    """ids and targets (B, T), padded on the right, and real lengths (B,). Off the answer targets are -1."""

    ids: Tensor
    targets: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, exchanges: Sequence[Exchange], tokenizer: Tokenizer) -> "ExchangeRows":
        """One row an exchange."""
        return cls.of_rendered([render(tokenizer, [exchange]) for exchange in exchanges], tokenizer.bos_id)

    @classmethod
    def of_rendered(cls, rows: Sequence[tuple[list[int], list[int]]], fill: int) -> "ExchangeRows":
        """One row for the ids and loss mask of each conversation; `fill` is the id of the padding."""
        width = max(len(ids) for ids, _ in rows) - 1
        inputs = torch.full((len(rows), width), fill)
        targets = torch.full((len(rows), width), NOT_SCORED)
        for place, (ids, mask) in enumerate(rows):
            inputs[place, : len(ids) - 1] = torch.tensor(ids[:-1])
            learned = [i if taught else NOT_SCORED for i, taught in zip(ids, mask, strict=True)]
            targets[place, : len(ids) - 1] = torch.tensor(learned[1:])
        return cls(inputs, targets, torch.tensor([len(ids) - 1 for ids, _ in rows]))

    def first_answer(self) -> tuple[Tensor, Tensor]:
        """The position from which each answer's first token is said, and that token: both (B,)."""
        place = (self.targets != NOT_SCORED).int().argmax(dim=1)
        return place, self.targets[torch.arange(len(place)), place]
