"""Attention of a whole pass in blocks of queries, for processors: only keys inside the band are touched.

Masked SDPA multiplies every query with every key and throws most of it away. Here a block of b queries meets
the b + w keys that any of them can see, as two matrix products and a softmax between them; the backward pass
makes the weights again from the saved log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1), so nothing
of size T x T is ever kept.

Legend: B batch, T tokens, H query heads, G key/value heads, R = H / G, D head dim, N = B G, b queries and S
keys of a block. The R heads that share keys are stacked as rows: a block's queries are (N, R b, D).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

from omni_model.model.attention import attend

BLOCK = 64


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same as attention.attend: q (B, T, H, D), k, v (B, T, G, D) -> (B, T, H, D).

    A pass that fits in the window is left to SDPA, which is as fast there, and so are narrow dtypes, whose
    sums SDPA makes in fp32, and other devices.
    """
    fits = window >= q.size(1) - 1
    if fits or q.dtype != torch.float32 or q.device.type != "cpu":
        return attend(q, k, v, window)
    return _banded(q, k, v, window)[0]


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of every block."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(max(0, start - window), stop)


def _hidden(queries: slice, keys: slice, window: int, repeats: int) -> Tensor:
    """(R b, S): 0 where the key is seen, -inf where it is not."""
    start, stop = queries.start - keys.start, queries.stop - keys.start
    return _mask(start, stop, keys.stop - keys.start, window, repeats)  # alike for most blocks


@functools.lru_cache(maxsize=64)
def _mask(start: int, stop: int, count: int, window: int, repeats: int) -> Tensor:
    query, key = torch.arange(start, stop, device="cpu").unsqueeze(1), torch.arange(count, device="cpu")
    seen = (key <= query) & (key >= query - window)
    return torch.zeros(seen.shape, device="cpu").masked_fill_(~seen, -torch.inf).repeat(repeats, 1)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, G R, D) -> (N, R, T, D)."""
    batch, length, _, dim = x.shape
    heads = x.reshape(batch, length, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    return heads.reshape(batch * kv_heads, -1, length, dim)


def _by_token(x: Tensor, batch: int) -> Tensor:
    """(N, R, T, D) -> (B, T, G R, D)."""
    _, _, length, dim = x.shape
    return x.reshape(batch, -1, length, dim).transpose(1, 2).contiguous()


@library.custom_op("gpt::banded", mutates_args=())
def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D) and the log-sum-exp of every query's scores (N, R, T, 1)."""
    batch, kv_heads = k.size(0), k.size(2)
    q, k, v = (_by_kv_head(x, kv_heads) for x in (q * q.size(-1) ** -0.5, k, v))
    k, v = k.squeeze(1), v.squeeze(1)  # (N, T, D)
    y, lse = torch.empty_like(q), q.new_empty((*q.shape[:3], 1))
    repeats = q.size(1)
    for queries, keys in _blocks(q.size(2), window):
        rows = q[:, :, queries].flatten(1, 2)  # (N, R b, D)
        scores = torch.bmm(rows, k[:, keys].mT).add_(_hidden(queries, keys, window, repeats))  # (N, R b, S)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        y[:, :, queries] = torch.bmm(weights, v[:, keys]).div_(total).unflatten(1, (repeats, -1))
        lse[:, :, queries] = total.log_().add_(top).unflatten(1, (repeats, -1))
    return _by_token(y, batch), lse


@library.custom_op("gpt::banded_backward", mutates_args=())
def _banded_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads = k.size(0), k.size(2)
    scale = q.size(-1) ** -0.5
    q, k, v, y, grad = (_by_kv_head(x, kv_heads) for x in (q * scale, k, v, y, grad))
    k, v = k.squeeze(1), v.squeeze(1)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shift = (grad * y).sum(-1, keepdim=True)  # what the softmax takes off every score's gradient
    repeats = q.size(1)
    for queries, keys in _blocks(q.size(2), window):
        rows, grad_rows, row_lse, row_shift = (x[:, :, queries].flatten(1, 2) for x in (q, grad, lse, shift))
        scores = torch.bmm(rows, k[:, keys].mT).add_(_hidden(queries, keys, window, repeats))
        weights = scores.sub_(row_lse).exp_()
        grad_v[:, keys].baddbmm_(weights.mT, grad_rows)
        grad_scores = torch.bmm(grad_rows, v[:, keys].mT).sub_(row_shift).mul_(weights)
        grad_q[:, :, queries] = torch.bmm(grad_scores, k[:, keys]).mul_(scale).unflatten(1, (repeats, -1))
        grad_k[:, keys].baddbmm_(grad_scores.mT, rows)
    return (
        _by_token(grad_q, batch),
        _by_token(grad_k.unsqueeze(1), batch),
        _by_token(grad_v.unsqueeze(1), batch),
    )


# What torch.compile and autograd need to know of an operator that they do not look into.


@_banded.register_fake
def _banded_shapes(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    lse = q.new_empty((batch * k.size(2), heads // k.size(2), length, 1))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_banded_backward.register_fake
def _banded_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=dense) for x in (q, k, v))  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_banded_backward(grad, *ctx.saved_tensors, ctx.window), None)


_banded.register_autograd(_differentiate, setup_context=_remember)
