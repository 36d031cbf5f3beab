"""Causal attention over a sliding window: who sees whom, and the plain form that every kernel must equal.

A layer with window w lets the query at position p see the keys at p-w .. p, which are w+1 keys: the
convention of the flash-attention kernels. A *kernel* computes one whole pass, positions 0 .. T-1 of every
row; `attend` is the truth among them, masked SDPA. What continues a cache is in `kv_cache`.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (G divides H), D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (q (B, T, H, D), k (B, T, G, D), v (B, T, G, D), window) -> (B, T, H, D), scale 1/sqrt(D), with gradients.
Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of a whole pass, each query seeing itself and `window` positions before it."""
    place = torch.arange(q.size(1), device=q.device).unsqueeze(0)
    whole = window >= q.size(1) - 1
    return sdpa(q, k, v, None if whole else band(place, place, window), is_causal=whole)


def band(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Visibility (B or 1, 1, T, S), True = seen, from positions (B or 1, T) and (B or 1, S).

    A key at a negative position is an empty slot, seen by nobody.
    """
    query, key = queries.unsqueeze(-1), keys.unsqueeze(-2)
    return ((key <= query) & (key >= query - window) & (key >= 0)).unsqueeze(1)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """torch's attention on (B, T, H, D) queries and (B, S, G, D) keys and values; None = everything seen."""
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        is_causal=is_causal,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)
