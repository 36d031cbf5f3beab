"""Logits squashed by a soft cap, and their cross entropy without the (tokens, vocabulary) table in memory.

    z = x W^T      t = tanh(z / cap)      logits = cap * t      loss = log sum exp(logits) - logits[target]

The table of logits is the largest tensor of a small language model. The mean loss walks over it in chunks of
tokens and makes the gradients in the same pass, while each chunk is at hand: three matrix products in all and
nothing recomputed. Since |logits| <= cap, exp needs no subtraction of the maximum (cap <= 50 is enforced by
GPTConfig; exp(50) times a vocabulary of 2^20 is far below the fp32 limit).

Legend: N tokens, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # a target that is not scored


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


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean cross entropy in nats over the targets that are not -1; nan when there is none.

    x (N, C), weight (V, C), targets (N,). Tokens without a target cost nothing: they leave before the head.
    """
    scored = (targets != IGNORED).nonzero().squeeze(1)
    if scored.numel() < targets.numel():
        x, targets = x[scored], targets[scored]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _MeanLoss.apply(x, weight, targets, softcap)
    return token_losses(x, weight, targets, softcap).mean()


class _MeanLoss(torch.autograd.Function):
    """Mean loss whose forward pass already makes the gradients of x and weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        head = weight.to(x.dtype)
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        total = x.new_zeros((), dtype=torch.float32)
        count, size = x.size(0), _chunk_tokens(weight)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            loss, grad_z = _chunk_loss_and_grad(x[rows], head, targets[rows], softcap)
            total += loss
            grad_z = grad_z.div_(count).to(x.dtype)
            if grad_x is not None:
                torch.mm(grad_z, head, out=grad_x[rows])
            if grad_weight is not None:
                grad_weight += grad_z.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_weight)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_weight is None else grad_weight * grad,
            None,
            None,
        )


def _chunk_loss_and_grad(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and d loss / d z (N, V), in place wherever a buffer can be used again."""
    goal = targets.unsqueeze(1)
    squashed = F.linear(x, head).float().div_(softcap).tanh_()  # t
    goal_logit = squashed.gather(1, goal) * softcap
    grad = (squashed * softcap).exp_()
    sums = grad.sum(1, keepdim=True)
    loss = (sums.log() - goal_logit).sum()
    grad.div_(sums).scatter_add_(1, goal, torch.full_like(goal_logit, -1.0))  # softmax - onehot
    return loss, grad.mul_(squashed.square_().neg_().add_(1))  # d logits / d z = 1 - t^2


def _chunk_tokens(weight: Tensor) -> int:
    """Tokens per chunk: a table of 16 MiB stays in a CPU's cache; a GPU wants large products (512 MiB)."""
    entries = 2**27 if weight.is_cuda else 2**22
    return max(128, entries // weight.size(0))
