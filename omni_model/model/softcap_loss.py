"""Logits squashed by a soft cap, and their cross entropy without the (tokens, vocabulary) table in memory.

    z = x W^T      t = tanh(z / cap)      logits = cap * t      loss = log sum exp(logits) - logits[target]

The table of logits is the largest tensor of a small language model. The mean loss walks over it in chunks of
tokens and makes the gradients in the same pass, while each chunk is at hand: three matrix products in all and
nothing recomputed. Since |logits| <= cap, exp needs no subtraction of the maximum (cap <= 50 is enforced by
GPTConfig; exp(50) times a vocabulary of 2^20 is far below the fp32 limit).

Legend: N tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # a target that is not scored
CACHED_ENTRIES = 2**18  # 1 MiB of fp32, which a core's own cache holds twice
LossKernel = Callable[[Tensor, Tensor, float], Tensor]  # as replace_by_grad


class Product(Protocol):
    """z = x W^T and its way back, in whatever arithmetic."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """x (N, C) -> z (N, V or more), and what backward asks for."""

    def backward(
        self, grad: Tensor, kept: Any, grad_x: Tensor | None, grad_weight: Tensor | None, *, first: bool
    ) -> None:
        """From dz (N, V): write dx into grad_x (N, C) and dW into grad_weight (V, C), adding if not first."""


@dataclass(frozen=True)
class PlainProduct:
    """The product in the dtype of weight (V, C)."""

    weight: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), x

    def backward(
        self, grad: Tensor, kept: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, *, first: bool
    ) -> None:
        if grad_x is not None:
            torch.mm(grad, self.weight, out=grad_x)
        if grad_weight is not None:
            _accumulate(grad_weight, grad.mT, kept, first=first)


def softcap_logits(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """fp32 logits (..., V) of x (..., C) under the head's rows weight (V, C), within +-softcap.

    The product runs in x's dtype and is widened afterwards, as in nanochat.
    """
    z = F.linear(x, weight.to(x.dtype)).float()
    return softcap * torch.tanh(z / softcap)


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Cross entropy of every token in nats, fp32 (N,); 0 where the target is -1. x (N, C), targets (N,)."""

    def chunk_losses(x_chunk: Tensor, weight: Tensor, target_chunk: Tensor) -> Tensor:
        logits = softcap_logits(x_chunk, weight, softcap)
        return F.cross_entropy(logits, target_chunk, ignore_index=IGNORED, reduction="none")

    size = _chunk_tokens(weight)
    parts = [
        checkpoint(chunk_losses, x_chunk, weight, target_chunk, use_reentrant=False)
        for x_chunk, target_chunk in zip(x.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


def mean_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    product: Product | None = None,
    kernel: LossKernel | None = None,
) -> Tensor:
    """Mean cross entropy in nats over the targets that are not -1; nan when there is none.

    x (N, C), weight (V, C), targets (N,). Where gradients are made, `product` may multiply by the weight in
    another arithmetic and `kernel` do what replace_by_grad does.
    """
    if not x.is_cuda:  # tokens without a target leave before the head; a GPU would have to wait for the count
        scored = (targets != IGNORED).nonzero().squeeze(1)
        if scored.numel() < targets.numel():
            x, targets = x[scored], targets[scored]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        how = product or PlainProduct(weight.detach()), kernel or replace_by_grad
        return _MeanLoss.apply(x, weight, targets, softcap, *how)
    return token_losses(x, weight, targets, softcap).sum() / (targets != IGNORED).sum()


class _MeanLoss(torch.autograd.Function):
    """Mean loss whose forward pass already makes the gradients of x and weight.

    They are kept as those of the *sum*, and scaled by grad / N on the way back: a gradient of the mean is too
    small for fp16 before the loss scale has been multiplied in. Scaling is in place, so they serve once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float,
        product: Product,
        kernel: LossKernel,
    ) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
        total = x.new_zeros((), dtype=torch.float32)
        for rows in _slices(x.size(0), _chunk_tokens(weight)):
            z, kept = product.forward(x[rows])
            z = z[:, : weight.size(0)]
            total += kernel(z, targets[rows], softcap)
            into_x = None if grad_x is None else grad_x[rows]
            product.backward(z, kept, into_x, grad_weight, first=rows.start == 0)
        ctx.grads, ctx.count = (grad_x, grad_weight), (targets != IGNORED).sum()
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The mean loss was differentiated already; compute it again for another time.")
        (grad_x, grad_weight), ctx.grads = ctx.grads, None
        scale = grad / ctx.count
        for each in (grad_x, grad_weight):
            if each is not None:
                each.mul_(scale)
        return grad_x, grad_weight, None, None, None, None


def _replace_fp32(z: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """d loss / d z = (softmax - onehot) (1 - t^2)."""
    scored, goal = (targets != IGNORED).float().unsqueeze(1), targets.clamp_min(0).unsqueeze(1)
    t = z.div_(softcap).tanh_()
    goal_logit = t.gather(1, goal) * softcap
    grad = (t * softcap).exp_()
    sums = grad.sum(1, keepdim=True)
    grad.mul_(scored / sums).scatter_add_(1, goal, -scored)
    torch.addcmul(grad, grad, t.square_(), value=-1.0, out=z)
    return ((sums.log() - goal_logit) * scored).sum()


def replace_by_grad(
    z: Tensor, targets: Tensor, softcap: float, replace: LossKernel = _replace_fp32
) -> Tensor:
    """Summed loss, fp32, of z (N, V) in any dtype; z becomes that sum's gradient, 0 where target is -1.

    `replace` does it for fp32.
    """
    # A chunk is as large as matrix products like it; what follows is bound by memory and stays in the cache.
    size = z.size(0) if z.is_cuda else max(1, CACHED_ENTRIES // z.size(1))
    total = torch.zeros((), device=z.device)
    for rows in _slices(z.size(0), size):
        wide = z[rows].float()  # the same memory where z is fp32
        total += replace(wide, targets[rows], softcap)
        if z.dtype != torch.float32:
            z[rows] = wide.to(z.dtype)
    return total


def compiled_kernel() -> LossKernel:
    """replace_by_grad with its passes fused by torch.compile."""
    return partial(replace_by_grad, replace=torch.compile(_replace_fp32, dynamic=False))


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or = for the first; total is fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _chunk_tokens(weight: Tensor) -> int:
    """Tokens per chunk: the widest table that is small beside the rest of a training step."""
    entries = 2**27 if weight.is_cuda else 2**24  # 512 or 64 MiB of fp32
    return max(128, entries // weight.size(0))
