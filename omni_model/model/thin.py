"""x W^T for a few rows x, where the time goes into reading W: from the layout that is read fastest.

A processor's BLAS is made for square products. Of a matrix in the usual order it reads 9 GB/s when a single
row comes along, and twice as much of the same matrix transposed; for several rows oneDNN's blocked order is
read twice as fast again. Either copy is made when it is first asked for. Other dtypes and devices take the
matrix as it is.

Legend: B rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MANY_ROWS = 8  # what the blocked order is laid out for; it serves any number


class ThinProduct:
    """Multiplies rows (B, K) by the weight (N, K) as it is now: (B, N) in the rows' dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self._transposed: Tensor | None = None
        self._blocked: Tensor | None = None
        self._as_it_is = weight.dtype != torch.float32 or weight.device.type != "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        if self._as_it_is:
            return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        if x.size(0) == 1:
            if self._transposed is None:
                self._transposed = self.weight.t().contiguous()
            return x @ self._transposed
        if not _has_blocked_order():
            return F.linear(x, self.weight)
        if self._blocked is None:
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight, MANY_ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, self._blocked, None, "none", [], "")


def _has_blocked_order() -> bool:
    """Whether this build of torch brings oneDNN's linear, which compiled models use too."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
