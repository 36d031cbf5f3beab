"""What Muon does to a matrix of momentum: make all its directions equally long, then its rows or columns.

Every function takes a stack of matrices and treats each by itself.

    X = U S V^T  ->  U V^T      the polar factor: the orthogonal matrix nearest to X

No decomposition is needed. An odd polynomial p(X) = aX + b(XX^T)X + c(XX^T)^2 X acts on the singular values
alone, and five of them in a row, chosen so that 10^-3 ... 1 all end near 1, come close enough (Polar Express,
arXiv 2505.16932). Around it: row equilibration (MuonEq, arXiv 2603.28254), renormalisation (Muon+,
arXiv 2602.21545) and variance reduction (NorMuon, arXiv 2510.05491).

Legend: K matrices of R rows and N columns; n = min(R, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]

POLAR_POLYNOMIALS: tuple[Polynomial, ...] = (  # (a, b, c), in the order of use
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The Gram form multiplies n x n matrices only, but more of them. CPU ms of one fp32 matrix, direct / Gram:
# (384, 384) 17 / 20, (384, 768) 29 / 24, (384, 1536) 45 / 31, (768, 3072) 369 / 227, (12, 6) 0.04 / 0.06.
GRAM_FORM_FROM_ASPECT = 2.0
# Rounding in X X^T drowns small singular values, and each polynomial amplifies it. Begun again from X after
# three of them, the Gram form is 5e-6 from the direct form on random matrices and 2e-5 on ill-conditioned
# ones (whose own rounding there is 1e-5); never begun again, 7e-4.
GRAM_FORM_POLYNOMIALS = 3


def polar_factor(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T for each x = U S V^T (K, R, N), fp32: singular values between 0.5 and 1.5, mostly near 1.

    The products run in `dtype`, after x is scaled to a norm below 1.
    """
    scaled = (x / (1.01 * norm_of(x) + 1e-6)).to(dtype)
    polynomials = POLAR_POLYNOMIALS[:steps]
    if _in_full_fp32(scaled) and max(x.shape[-2:]) >= GRAM_FORM_FROM_ASPECT * min(x.shape[-2:]):
        for start in range(0, len(polynomials), GRAM_FORM_POLYNOMIALS):
            scaled = _apply_by_gram(scaled, polynomials[start : start + GRAM_FORM_POLYNOMIALS])
    else:
        scaled = _apply(scaled, polynomials)
    return scaled.to(x.dtype)


def _in_full_fp32(x: Tensor) -> bool:
    """Whether products of x keep 24 bits. On a card set to TF32 the Gram form would lose small values."""
    tf32 = x.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return x.dtype == torch.float32 and not tf32


def _apply(x: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The polynomials one after the other: X <- aX + (bA + cA^2) X with A = X X^T, or its mirror if tall."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in polynomials:
        gram = x.mT @ x if tall else x @ x.mT
        mix = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, mix, beta=a) if tall else torch.baddbmm(x, mix, x, beta=a)
    return x


def _apply_by_gram(x: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The same as one factor: P = aI + bA + cA^2 takes X to PX and A to PAP, and all these commute."""
    tall = x.size(-2) > x.size(-1)
    gram = x.mT @ x if tall else x @ x.mT
    factor: Tensor | None = None
    for left, (a, b, c) in zip(reversed(range(len(polynomials))), polynomials, strict=True):
        mix = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        mix.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = mix if factor is None else factor @ mix
        if left:
            gram = mix @ gram @ mix
    if factor is None:
        return x
    return x @ factor if tall else factor @ x


def norm_of(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix, fp32 (K, 1, 1).

    Rows first, then their norms: in one sweep torch's fp32 sum over 600,000 squares is off by 5e-6 on a CPU.
    """
    return x.float().norm(dim=-1, keepdim=True).norm(dim=-2, keepdim=True)


def equilibrate_rows(x: Tensor) -> Tensor:
    """Every row of x (K, R, N) scaled to the root mean square of the row norms, so none starts too small."""
    norms = x.float().norm(dim=-1, keepdim=True)
    target = norms.norm(dim=-2, keepdim=True) / x.size(-2) ** 0.5
    return x * (target / norms.clamp_min(1e-6)).to(x.dtype)


def renormalize(x: Tensor) -> Tensor:
    """Every matrix of x (K, R, N) scaled to the norm that an orthogonal one has, sqrt(n)."""
    return x * (min(x.shape[-2:]) ** 0.5 / norm_of(x).clamp_min(1e-6)).to(x.dtype)


def reduce_variance(x: Tensor, second: Tensor, beta2: float) -> Tensor:
    """Divide each row of x (K, R, N), or column if wide, by its running scale; each matrix keeps its norm.

    `second` (K, R, 1), or (K, 1, N) if wide, holds the running mean squares and is advanced in place. It
    needs no bias correction: a common factor cancels.
    """
    axis = -1 if x.size(-2) >= x.size(-1) else -2
    norms = x.norm(dim=axis, keepdim=True)
    second.lerp_(norms.square() / x.size(axis), 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    return x * (scale * (norm_of(norms) / norm_of(norms * scale).clamp_min(1e-10)))
