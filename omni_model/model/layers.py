"""The small parts the networks are made of: matrices, tables, and the functions between them.

Weights are kept in fp32 and multiplied in the activations' dtype. The narrow copy of a matrix is made once
per change of its weight, not once per use: a step of many microbatches, or a whole conversation, needs one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_model.model.softcap_loss import Product


class Linear(nn.Linear):
    """A bias-free matrix, multiplied in the input's dtype. Its memory is raw until GPT.init_weights."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)
        self._narrow: Tensor | None = None
        self._made_of: tuple[int, int] | None = None

    def reset_parameters(self) -> None:
        """Nothing: GPT.init_weights draws every weight from its own generator."""

    def refresh(self, dtype: torch.dtype) -> None:
        """Bring what is derived from the weight up to date; called at the start of every pass of the GPT."""
        if dtype == self.weight.dtype:
            self._narrow = None
            return
        made_of = (self.weight.data_ptr(), self.weight._version)
        if self._narrow is None or self._narrow.dtype != dtype or self._made_of != made_of:
            self._narrow, self._made_of = self.weight.detach().to(dtype), made_of

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`; its gradient reaches the fp32 weight."""
        if self._narrow is None or self._narrow.dtype != dtype:
            return self.weight.to(dtype)
        return _Narrowed.apply(self.weight, self._narrow)

    def product(self) -> Product | None:
        """How a loss that multiplies by this matrix itself should do it; None: plainly, by `matrix`."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype))


class _Narrowed(torch.autograd.Function):
    """The narrow copy in place of the weight; the gradient is widened on its way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, narrow: Tensor) -> Tensor:
        return narrow.view_as(narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


class Embedding(nn.Embedding):
    """A lookup table whose memory is left raw until GPT.init_weights."""

    def reset_parameters(self) -> None:
        """Nothing: GPT.init_weights draws every weight from its own generator."""


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis; no weights; epsilon is the machine's."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, S, H, D): channels j and j + D/2 are a pair, turned by minus the angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return x.relu().square()


def relu_squared_product(x: Tensor, weight: Tensor) -> Tensor:
    """max(x, 0)^2 W^T for x (..., K), weight (N, K), remembering only max(x, 0) for the backward pass.

    This is the widest tensor of a block; relu, square and product by themselves would remember two of it.
    """
    return _ReluSquaredProduct.apply(x, weight)


class _ReluSquaredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive, weight)
        return F.linear(positive.square(), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        positive, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).mul_(positive).mul_(2)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).mT @ positive.square().flatten(0, -2)
        return grad_x, grad_weight
