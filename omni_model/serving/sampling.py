"""From logits to the next token: the likeliest one, or one drawn by lot.

A draw inverts the cumulative distribution: a point chosen evenly on [0, 1) falls into the stretch of exactly
one token, and a token's stretch is as long as its probability. Each row takes its points from a generator of
its own, so neither the batch around a row nor the device changes what the row draws.

Legend: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: among the top_k likeliest (None: all), with probability softmax(logits / T).

    Temperature T = 0 takes the likeliest. The same seed gives the same draws. ValueError names what is wrong.
    """

    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number, 0 or above, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for every token, not {self.top_k}.")

    def generator(self, row: int) -> torch.Generator:
        """The source of a row's draws, fixed by the seed and the row's number alone."""
        digest = hashlib.sha256(f"{self.seed}/{row}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def draw(generators: list[torch.Generator]) -> Tensor:
    """One point on [0, 1) from each generator: (B,) fp64."""
    return torch.stack([torch.rand((), dtype=torch.float64, generator=source) for source in generators])


def choose(logits: Tensor, points: Tensor, sampling: Sampling) -> Tensor:
    """The token of each row, (B,): logits (B, V), points (B,) on [0, 1) say where in the distribution."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    candidates = None
    if sampling.top_k is not None:
        logits, candidates = logits.topk(min(sampling.top_k, logits.size(-1)))  # (B, K)
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
    logits = logits.to(precise)
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # so that no temperature, however low, overflows
    ends = (below_best / sampling.temperature).softmax(dim=-1).cumsum(dim=-1)
    goals = points.to(ends).unsqueeze(1) * ends[:, -1:]
    places = torch.searchsorted(ends, goals, right=True).clamp_max(ends.size(-1) - 1)
    return (places if candidates is None else candidates.gather(1, places)).squeeze(1)
