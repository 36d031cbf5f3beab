"""Sliding-window causal attention for NVIDIA cards: one forward and two backward kernels in Triton.

Flash attention (Dao 2022, 2023): a block of queries walks over the keys it can see, tile by tile, and keeps
for every query the largest score so far, the sum of the exponentials and the weighted values; the table of
scores never exists. What the backward pass needs of it is one number per query, lse = log2 sum exp2(score),
because p = exp2(score - lse) can be made again:

    y = p v    delta = sum(dy * y)    ds = p * (dy v^T - delta)    dq = ds k    dk = ds^T q    dv = p^T dy

The band is walked in three stretches: the ragged left edge, the tiles that are visible as a whole (no mask is
computed there) and the ragged diagonal. Tiles outside the band are never read, so the work is proportional to
the window. Every sum has a fixed order (no atomics): the gradients are the same bits in every run.

Legend: B batch, T tokens, H query heads, G key/value heads, D head dim; M queries and N keys per tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

MAX_HEAD_DIM = 128


class Tile(NamedTuple):
    """Queries and keys of one tile, warps of one block, tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# (forward, dq, dk with dv) by (head dim, bytes of an entry). A block must fit the 99 KiB of shared memory of
# sm_86, sm_89 and sm_120: what streams through, once per stage, and a copy of what stays. In KiB at D = 128:
#   forward  queries 128*D*2 = 32; keys and values 2 stages * 2 * 64*D*2 = 64                       -> 96
#   dq       queries and dy 2*128*D*2 = 64; keys and values 2 stages * 2 * 32*D*2 = 32              -> 96
#   dk, dv   keys and values 2*64*D*2 = 32; queries and dy 2 stages * 2*64*D*2 = 64; lse, delta 1   -> 97
# The compiler comes to that on sm_90; on sm_89 and sm_120 it keeps more in registers (64, 80, 72.5). An fp32
# entry has 4 bytes and, for the tf32 products, a rounded twin: the smaller tiles come to 72, 80 and 96. Among
# the tiles that fit, these spill next to nothing from the registers.
TILES = {
    (64, 2): (Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    (128, 2): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (128, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), each query seeing itself and `window` positions before it.

    q (B, T, H, D); k, v (B, T, G, D) with G dividing H; bf16, fp16 or fp32, D from 16 to 128. Sums are fp32.
    Returns (B, T, H, D). ValueError names what does not fit.
    """
    _check(q, k, v, window)
    return _forward(q, k, v, min(window, q.size(1)))[0]


def _check(q: Tensor, k: Tensor, v: Tensor, window: int) -> None:
    shape = tuple(q.shape)
    if q.dim() != 4 or not 16 <= q.size(3) <= MAX_HEAD_DIM or not q.numel():
        raise ValueError(f"q has shape {shape}; it needs (B, T, H, D) with D from 16 to {MAX_HEAD_DIM}.")
    if k.shape != v.shape or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.size(3) != q.size(3):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} need (B, T, G, D) like q {shape}.")
    if not k.size(2) or q.size(2) % k.size(2):
        raise ValueError(f"k has {k.size(2)} heads, which must divide the {q.size(2)} heads of q.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they need one of bf16, fp16, fp32.")
    if window < 0:
        raise ValueError(f"window is {window}; it needs to be 0 or more.")


# Opaque to torch.compile, which would otherwise have to trace the launches.
@library.custom_op("gpt::triton_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D) and lse (B, H, T) fp32, base 2."""
    batch, tokens, heads, _ = q.shape
    y = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    tile, _, _ = _tiles(q)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(tokens, tile.queries), batch * heads)](
            *map(_view, (q, k, v, y)), lse, *_sizes(q, k, window), **_constants(q, tile)
        )
    return y, lse


@library.custom_op("gpt::triton_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped and typed like them."""
    batch, tokens, heads, _ = q.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    sizes = _sizes(q, k, window)
    _, dq_tile, dkv_tile = _tiles(q)
    q_view, k_view, v_view, dy_view = map(_view, (q, k, v, dy))
    with torch.cuda.device_of(q):
        _dq_kernel[(triton.cdiv(tokens, dq_tile.queries), batch * heads)](
            q_view, k_view, v_view, _view(y), dy_view, lse, delta, _view(dq), *sizes, **_constants(q, dq_tile)
        )
        read, written = (q_view, k_view, v_view, dy_view, lse, delta), (_view(dk), _view(dv))
        _dkv_kernel[(triton.cdiv(tokens, dkv_tile.keys), batch * k.size(2))](
            *read, *written, *sizes, **_constants(q, dkv_tile)
        )
    return dq, dk, dv


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@_backward.register_fake
def _backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.window), None


_forward.register_autograd(_gradients, setup_context=_save)


def _view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """What a kernel is told of a (B, T, heads, D) tensor: memory and strides of B, T, heads; D's is 1."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def _sizes(q: Tensor, k: Tensor, window: int) -> tuple[int, int, int, int, float]:
    return q.size(1), q.size(2), k.size(2), window, 1 / math.sqrt(q.size(3))


def _tiles(q: Tensor) -> tuple[Tile, Tile, Tile]:
    return TILES[64 if q.size(3) <= 64 else 128, q.element_size()]


def _constants(q: Tensor, tile: Tile) -> dict[str, Any]:
    """What each compiled kernel is made for."""
    return {
        "D": q.size(3),
        "BLOCK_D": triton.next_power_of_2(q.size(3)),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


# In the kernels below `x: tl.tuple` is a `_view`, `count` is T, and a row is one token of one head.
LOG2_E = tl.constexpr(1.4426950408889634)  # scores are kept in base 2: the hardware has exp2, not exp
UNSEEN = tl.constexpr(-1e30)  # below every score, and finite: unlike -inf, it can be subtracted from itself


@triton.jit
def _base(x: tl.tuple, batch: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Where a head of a batch row begins."""
    return x[0] + batch * x[1] + head * x[3]


@triton.jit
def _load(
    base: tl.tensor, rows: tl.tensor, stride: tl.tensor, count: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(rows, BLOCK_D), zero beyond `count` rows and D columns; WHOLE promises that all rows are there."""
    columns = tl.arange(0, BLOCK_D)
    places = base + rows[:, None] * stride + columns[None, :]
    if WHOLE and D == BLOCK_D:
        return tl.load(places)
    return tl.load(places, mask=(rows < count)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _store(
    base: tl.tensor, rows: tl.tensor, stride: tl.tensor, count: tl.tensor, values: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (columns < D)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a b in fp32; three tf32 products give fp32 factors their full precision on the tensor cores."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _seen_keys(
    first: tl.tensor, count: tl.tensor, window: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tuple:
    """Bounds of the three stretches of keys that the queries first .. first + M - 1 see."""
    end = tl.cdiv(tl.minimum(first + BLOCK_M, count), BLOCK_N) * BLOCK_N
    start = tl.maximum(first - window, 0) // BLOCK_N * BLOCK_N
    whole = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - 1 - window, 0), BLOCK_N) * BLOCK_N, end)
    return start, whole, tl.maximum((first + 1) // BLOCK_N * BLOCK_N, whole), end


@triton.jit
def _seeing_queries(
    first: tl.tensor, count: tl.tensor, window: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tuple:
    """Bounds of the three stretches of queries that see the keys first .. first + N - 1."""
    end = tl.cdiv(tl.minimum(first + BLOCK_N + window, count), BLOCK_M) * BLOCK_M
    start = first // BLOCK_M * BLOCK_M
    whole = tl.minimum(tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M, end)
    return start, whole, tl.maximum(tl.minimum(first + window + 1, count) // BLOCK_M * BLOCK_M, whole), end


@triton.jit
def _visible(queries: tl.tensor, keys: tl.tensor, window: tl.tensor) -> tl.tensor:
    """Broadcasts: one of them is a column and the other a row."""
    return (keys <= queries) & (keys >= queries - window)


@triton.jit(do_not_specialize=["count", "window"])
def _forward_kernel(
    q: tl.tuple, k: tl.tuple, v: tl.tuple, y: tl.tuple, lse_ptr: tl.tensor,
    count: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, window: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """One block of queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest walks begin first
    batch, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    k_base, v_base = _base(k, batch, kv_head), _base(v, batch, kv_head)
    queries = first + tl.arange(0, BLOCK_M)
    q_tile = _load(_base(q, batch, head), queries, q[2], count, D, BLOCK_D, False)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), UNSEEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    bounds = _seen_keys(first, count, window, BLOCK_M, BLOCK_N)
    for stretch in tl.static_range(3):
        for key in range(bounds[stretch], bounds[stretch + 1], BLOCK_N):
            keys = key + tl.arange(0, BLOCK_N)
            k_tile = _load(k_base, keys, k[2], count, D, BLOCK_D, stretch == 1)
            score = _dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E)
            if stretch != 1:
                score = tl.where(_visible(queries[:, None], keys[None, :], window), score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            v_tile = _load(v_base, keys, v[2], count, D, BLOCK_D, stretch == 1)
            acc = acc * shrink[:, None] + _dot(p.to(v_tile.dtype), v_tile)
            top = new_top
    _store(_base(y, batch, head), queries, y[2], count, acc / total[:, None], D, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * count
    tl.store(lse_ptr + place + queries, top + tl.log2(total), mask=queries < count)


@triton.jit(do_not_specialize=["count", "window"])
def _dq_kernel(
    q: tl.tuple, k: tl.tuple, v: tl.tuple, y: tl.tuple, dy: tl.tuple,
    lse_ptr: tl.tensor, delta_ptr: tl.tensor, dq: tl.tuple,
    count: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, window: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """dq of one block of queries of one head, and the delta that the other kernel needs too."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    kv_head = head // (heads // kv_heads)
    k_base, v_base = _base(k, batch, kv_head), _base(v, batch, kv_head)
    queries = first + tl.arange(0, BLOCK_M)
    q_tile = _load(_base(q, batch, head), queries, q[2], count, D, BLOCK_D, False)
    y_tile = _load(_base(y, batch, head), queries, y[2], count, D, BLOCK_D, False)
    dy_tile = _load(_base(dy, batch, head), queries, dy[2], count, D, BLOCK_D, False)
    delta = tl.sum(y_tile.to(tl.float32) * dy_tile.to(tl.float32), 1)
    place = tl.program_id(1).to(tl.int64) * count
    tl.store(delta_ptr + place + queries, delta, mask=queries < count)
    lse = tl.load(lse_ptr + place + queries, mask=queries < count, other=float("inf"))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bounds = _seen_keys(first, count, window, BLOCK_M, BLOCK_N)
    for stretch in tl.static_range(3):
        for key in range(bounds[stretch], bounds[stretch + 1], BLOCK_N):
            keys = key + tl.arange(0, BLOCK_N)
            k_tile = _load(k_base, keys, k[2], count, D, BLOCK_D, stretch == 1)
            v_tile = _load(v_base, keys, v[2], count, D, BLOCK_D, stretch == 1)
            p = tl.exp2(_dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E) - lse[:, None])
            if stretch != 1:
                p = tl.where(_visible(queries[:, None], keys[None, :], window), p, 0.0)
            ds = p * (_dot(dy_tile, tl.trans(v_tile)) - delta[:, None])
            acc += _dot(ds.to(k_tile.dtype), k_tile)
    _store(_base(dq, batch, head), queries, dq[2], count, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["count", "window"])
def _dkv_kernel(
    q: tl.tuple, k: tl.tuple, v: tl.tuple, dy: tl.tuple, lse_ptr: tl.tensor, delta_ptr: tl.tensor,
    dk: tl.tuple, dv: tl.tuple,
    count: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, window: tl.tensor, scale: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """dk and dv of one block of keys of one key/value head, summed over the query heads that share it.

    Tiles of p and ds are (keys, queries) here.
    """
    first = tl.program_id(0) * BLOCK_N
    batch, kv_head = tl.program_id(1).to(tl.int64) // kv_heads, tl.program_id(1) % kv_heads
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = _load(_base(k, batch, kv_head), keys, k[2], count, D, BLOCK_D, False)
    v_tile = _load(_base(v, batch, kv_head), keys, v[2], count, D, BLOCK_D, False)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bounds = _seeing_queries(first, count, window, BLOCK_M, BLOCK_N)
    group = heads // kv_heads
    for head in range(kv_head * group, (kv_head + 1) * group):
        place = (batch * heads + head) * count
        for stretch in tl.static_range(3):
            for query in range(bounds[stretch], bounds[stretch + 1], BLOCK_M):
                queries = query + tl.arange(0, BLOCK_M)
                q_tile = _load(_base(q, batch, head), queries, q[2], count, D, BLOCK_D, stretch == 1)
                dy_tile = _load(_base(dy, batch, head), queries, dy[2], count, D, BLOCK_D, stretch == 1)
                lse = tl.load(lse_ptr + place + queries, mask=queries < count, other=float("inf"))
                delta = tl.load(delta_ptr + place + queries, mask=queries < count, other=0.0)
                p = tl.exp2(_dot(k_tile, tl.trans(q_tile)) * (scale * LOG2_E) - lse[None, :])
                if stretch != 1:
                    p = tl.where(_visible(queries[None, :], keys[:, None], window), p, 0.0)
                dv_acc += _dot(p.to(dy_tile.dtype), dy_tile)
                ds = p * (_dot(v_tile, tl.trans(dy_tile)) - delta[None, :])
                dk_acc += _dot(ds.to(q_tile.dtype), q_tile)
    _store(_base(dk, batch, kv_head), keys, dk[2], count, dk_acc * scale, D, BLOCK_D)
    _store(_base(dv, batch, kv_head), keys, dv[2], count, dv_acc, D, BLOCK_D)
