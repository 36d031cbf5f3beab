"""Matrices multiplied in 8-bit floating point: about twice the speed of bf16 where a card has units for it.

Two formats share the work: e4m3 (3 bits of mantissa, up to 448) for inputs and weights, e5m2 (2 bits, up to
57344) for gradients, whose sizes vary more. Each tensor is stretched by one factor, found anew at every use,
so that its largest entry becomes the largest number of its format ("tensorwise dynamic scaling"):

    s = limit / max |x|        x8 = round8(s x)        a b^T  ~  (a8 b8^T) / (s_a s_b)

A layer makes three products, all of them in fp8:  y = x W^T,  dx = dy W,  dW = dy^T x. The master weights
stay as they are; their fp8 form is made once per update of the optimizer, in both orders of memory that the
products ask for, and x is kept for the way back in fp8. Without gradients nothing here is used: evaluation
runs in the compute dtype.

Legend: M rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_model.model.gpt import GPT
from omni_model.model.layers import Linear

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-12  # an amax below it counts as it, so that zeros have a finite scale
MULTIPLE = 16  # the units work on blocks: every side of a product must be whole ones
MIN_WIDTH = 128  # smaller matrices lose more by the conversion than the product gains


class Quantised(NamedTuple):
    """data * scale is the tensor, up to the rounding; scale is one fp32 number."""

    data: Tensor
    scale: Tensor


def quantise(x: Tensor, dtype: torch.dtype) -> Quantised:
    """x of any shape in fp8, the largest magnitude at the end of the range.

    The quotient is taken in fp64 and stored in fp32, as nanochat and torchao do: equal numbers everywhere.
    """
    limit = torch.finfo(dtype).max
    stretch = (limit / x.detach().abs().max().double().clamp(min=SMALLEST)).float()
    data = (x.detach().float() * stretch).clamp_(-limit, limit).to(dtype)
    return Quantised(data.contiguous(), stretch.reciprocal())


def multiply(a: Quantised, b: Quantised, dtype: torch.dtype, *, native: bool, fast: bool = False) -> Tensor:
    """a (R, S) times the transpose of b (C, S), both row-major: (R, C) in `dtype`.

    native: by the card's fp8 units, where `fast` lets them add in fewer bits; else the same numbers are
    widened and multiplied in fp32, on any machine.
    """
    if native:
        return torch._scaled_mm(
            a.data, b.data.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
        )
    return ((a.data.float() @ b.data.float().t()) * (a.scale * b.scale)).to(dtype)


def has_fp8_units(device: torch.device) -> bool:
    """Whether torch can multiply fp8 on this device: NVIDIA cards since sm_89."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Float8Weight(NamedTuple):
    """A weight W (N, K) in fp8, in both orders of memory that its products ask for, and those products."""

    data: Tensor  # (N, K)
    transposed: Tensor  # (K, N)
    scale: Tensor
    native: bool

    @classmethod
    def of(cls, weight: Tensor) -> Float8Weight:
        """weight (N, K) as it is now; W's later changes are not seen."""
        data, scale = quantise(weight, INPUT)
        return cls(data, data.t().contiguous(), scale, has_fp8_units(weight.device))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantised]:
        """x (M, K) -> x W^T (M, N) in x's dtype, and what backward needs: x in fp8."""
        x8 = quantise(_whole(x, x.size(1)), INPUT)
        y = multiply(x8, Quantised(self.data, self.scale), x.dtype, native=self.native, fast=True)
        return y[: x.size(0)], x8

    def backward(
        self, grad: Tensor, x8: Quantised, wants_x: bool = True, wants_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """dy (M, N) -> dx (M, K) and dW (N, K) in dy's dtype, each None where it is not wanted.

        A dy with fewer columns is that of the first outputs, as a head makes it whose rows are padded.
        """
        grad8 = quantise(_whole(grad, self.data.size(0)), GRADIENT)
        grad_x = grad_weight = None
        if wants_x:
            weight8 = Quantised(self.transposed, self.scale)
            grad_x = multiply(grad8, weight8, grad.dtype, native=self.native)[: grad.size(0)]
        if wants_weight:
            grad8_t, x8_t = (Quantised(each.data.t().contiguous(), each.scale) for each in (grad8, x8))
            grad_weight = multiply(grad8_t, x8_t, grad.dtype, native=self.native)
        return grad_x, grad_weight


def _whole(x: Tensor, columns: int) -> Tensor:
    """x (M, K) with zeros up to so many columns and whole blocks of rows: they change no product."""
    wider, longer = columns - x.size(1), -x.size(0) % MULTIPLE
    return F.pad(x, (0, wider, 0, longer)) if wider or longer else x


class _Product(torch.autograd.Function):
    """x (M, K) -> x W^T, differentiable in x and in the master weight, of which only the gradient is used."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor, data: Tensor, transposed: Tensor, scale: Tensor, native: bool
    ) -> Tensor:
        y, x8 = Float8Weight(data, transposed, scale, native).forward(x)
        ctx.save_for_backward(*x8, data, transposed, scale)
        ctx.native = native
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, *weight8 = ctx.saved_tensors
        weight8 = Float8Weight(*weight8, ctx.native)
        return *weight8.backward(grad, Quantised(x8, x_scale), *ctx.needs_input_grad[:2]), *[None] * 4


@dataclass(frozen=True)
class Float8Product:
    """A weight's products as the chunked loss asks for them (softcap_loss.Product)."""

    weight8: Float8Weight

    def forward(self, x: Tensor) -> tuple[Tensor, Quantised]:
        return self.weight8.forward(x)

    def backward(
        self, grad: Tensor, kept: Quantised, grad_x: Tensor | None, grad_weight: Tensor | None, *, first: bool
    ) -> None:
        into = (grad_x, grad_weight)
        made = self.weight8.backward(grad, kept, *(each is not None for each in into))
        if grad_x is not None:
            grad_x.copy_(made[0])
        if grad_weight is not None:
            fresh = made[1][: len(grad_weight)]  # the others are padding
            grad_weight.copy_(fresh) if first else grad_weight.add_(fresh)


class Float8Linear(Linear):
    """A Linear whose products run in fp8 while gradients are on. Same parameter, same state dict.

    ValueError when a side is no multiple of 16.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        if width_in % MULTIPLE or width_out % MULTIPLE:
            raise ValueError(f"An fp8 matrix needs sides of whole {MULTIPLE}s, not {width_in} x {width_out}.")
        super().__init__(width_in, width_out)
        self.weight8: Float8Weight | None = None
        self._quantised_version = (0, -1)  # address and version of the weight then

    def refresh(self, dtype: torch.dtype) -> None:
        """Quantise the weight if it changed: once per update, however many microbatches follow."""
        if not torch.is_grad_enabled():
            super().refresh(dtype)
            return
        weight, kept = self.weight, self.weight8
        version = (weight.data_ptr(), weight._version)
        if kept is None or self._quantised_version != version:
            self.weight8, self._quantised_version = Float8Weight.of(weight), version
        self._narrow = None  # evaluation made it; training has no use for it

    def product(self) -> Float8Product | None:
        return Float8Product(self.weight8) if self.weight8 and torch.is_grad_enabled() else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        if self.weight8 is None or not torch.compiler.is_compiling():  # a compiled GPT does it before
            self.refresh(x.dtype)
        y = _Product.apply(x.reshape(-1, x.size(-1)), self.weight, *self.weight8)
        return y.view(*x.shape[:-1], -1)


def fits_fp8(linear: nn.Linear) -> bool:
    """nanochat's rule: sides of whole 16s, and neither below 128."""
    sides = (linear.in_features, linear.out_features)
    return all(side % MULTIPLE == 0 for side in sides) and min(sides) >= MIN_WIDTH


def use_fp8(gpt: GPT) -> list[str]:
    """Turn every Linear that fits into a Float8Linear, in place; the names of those.

    The parameters stay the same objects, so an optimizer may exist already; on the meta device too. Call it
    before torch.compile. ValueError when no matrix fits.
    """
    names = [name for name, module in gpt.named_modules() if isinstance(module, Linear) and fits_fp8(module)]
    if not names:
        raise ValueError(
            f"No matrix of this GPT (n_embd {gpt.config.n_embd}) can run in fp8: both sides must be "
            f"multiples of {MULTIPLE} and at least {MIN_WIDTH}."
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = gpt.get_submodule(name)
        with torch.device("meta"):
            swapped = Float8Linear(linear.in_features, linear.out_features)
        swapped.weight = linear.weight
        swapped.train(linear.training)
        setattr(gpt.get_submodule(parent), child, swapped)
    return names
