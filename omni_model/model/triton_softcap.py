"""The softcapped cross entropy of a chunk of head outputs and its gradient: one Triton kernel, in place.

    t = tanh(z / cap)    loss = log sum exp(cap t) - cap t[target]    dloss/dz = (softmax - onehot) (1 - t^2)

One program per token reads its row of z twice, first for the sum, then to overwrite z with the gradient; the
second read comes from the cache. In eager torch the same takes seven passes over fp32 copies of the table.
Since |cap t| <= cap, exp needs no subtraction of the maximum.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # entries of a row at a time: 16 for each of 256 threads


def chunk_loss_and_grad(z: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Summed cross entropy in nats, fp32 scalar; z (N, V) becomes the gradient of that sum with respect to z.

    z is bf16, fp16 or fp32 with contiguous rows; targets (N,) are ids below V, or -1 for a row that does not
    count (its gradient is 0). Arithmetic is fp32. ValueError names what does not fit.
    """
    if z.dim() != 2 or z.stride(1) != 1 or targets.shape != z.shape[:1] or targets.stride() != (1,):
        raise ValueError(
            f"z {tuple(z.shape)} with strides {z.stride()} needs (N, V) with contiguous rows,"
            f" targets {tuple(targets.shape)} need (N,)."
        )
    losses = torch.empty(z.size(0), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        _kernel[(z.size(0),)](z, targets, losses, z.stride(0), z.size(1), softcap, BLOCK, num_warps=8)
    return losses.sum()


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """1 - 2 / (exp(2x) + 1): right at both ends, where exp is 0 or infinite."""
    return 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1)


@triton.jit
def _kernel(
    z_ptr: tl.tensor, targets_ptr: tl.tensor, losses_ptr: tl.tensor,
    stride: tl.tensor, count: tl.tensor, softcap: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One token: its loss, and its row of z replaced by the gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    target = tl.load(targets_ptr + row)
    sums = tl.zeros((BLOCK,), tl.float32)
    goal = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(z_row + columns, mask=columns < count, other=0.0).to(tl.float32)
        logit = softcap * _tanh(z / softcap)
        sums += tl.where(columns < count, tl.exp2(logit * LOG2_E), 0.0)
        # Not read from z_row + target: a faster warp may have overwritten that already.
        goal += tl.where(columns == target, logit, 0.0)
    total = tl.sum(sums, 0)
    scored = target >= 0
    tl.store(losses_ptr + row, tl.where(scored, tl.log(total) - tl.sum(goal, 0), 0.0))
    weight = tl.where(scored, 1.0, 0.0)
    for first in range(0, count, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(z_row + columns, mask=columns < count, other=0.0).to(tl.float32)
        t = _tanh(z / softcap)
        p = tl.exp2(t * (softcap * LOG2_E)) / total
        grad = weight * (p - tl.where(columns == target, 1.0, 0.0)) * (1 - t * t)
        tl.store(z_row + columns, grad.to(z_ptr.dtype.element_ty), mask=columns < count)
