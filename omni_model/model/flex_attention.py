"""Sliding-window attention through PyTorch's FlexAttention: a generated kernel that skips unseen blocks.

FlexAttention takes a list of the 128 x 128 blocks that some query of a block row can see, and a function for
the blocks that are seen in part. Here both follow from the window, so the lists are written down directly
instead of being found by evaluating the mask on all T x T pairs. The kernel exists only compiled; run
uncompiled it would make the whole table of scores.

Legend: B batch, T tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
# One compiled variant per shape, with and without gradients; beyond the limit torch falls back to the
# uncompiled form, which is silent and slow.
MAX_VARIANTS = 64


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), each query seeing itself and `window` positions before it.

    q (B, T, H, D); k, v (B, T, G, D) with G dividing H. Returns (B, T, H, D). The padding that rounds T up to
    whole blocks stands behind every real query and is never seen.
    """
    tokens = q.size(1)
    missing = -tokens % BLOCK
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    mask = block_mask(tokens + missing, min(window, tokens), q.device)
    y = _compiled()(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return y[:, :, :tokens].transpose(1, 2)


@functools.lru_cache(maxsize=32)
def block_mask(tokens: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of `tokens` (a multiple of 128) queries and keys meet, in whole or in part."""
    with torch.inference_mode(False):  # a cached mask made in inference mode could not be trained with
        # In a tensor, the window is an input of the compiled kernel and not a constant to compile for.
        reach = torch.tensor(window, device=device)
        first = torch.arange(0, tokens, BLOCK, device=device)
        query, key = first[:, None], first[None, :]
        seen = (key <= query) & (key + BLOCK - 1 >= query - window)
        whole = (key + BLOCK - 1 <= query) & (key >= query + BLOCK - 1 - window)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query - key <= reach)

        return BlockMask.from_kv_blocks(
            *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible
        )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of every block row, the count of marked blocks (1, 1, rows) and the columns, marked ones first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


@functools.cache
def _compiled() -> Callable[..., Any]:
    known = inspect.signature(torch.compile).parameters  # older releases have the limit in a global only
    options = {"recompile_limit": MAX_VARIANTS} if "recompile_limit" in known else {}
    return torch.compile(flex_attention, dynamic=False, **options)
