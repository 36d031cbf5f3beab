"""The GPT's optimizer: Muon for the matrices of the blocks, AdamW for everything else.

AdamW (arXiv 1711.05101) moves each number by its own running scale. Muon moves a matrix by the orthogonal
matrix nearest to its momentum, so all directions advance alike. The way there: row equilibration (MuonEq,
arXiv 2603.28254), five quintic iterations towards the polar factor (Polar Express, arXiv 2505.16932),
renormalisation (Muon+, arXiv 2602.21545), variance reduction per row or column (NorMuon, arXiv 2510.05491),
and weight decay only where it does not work against the update. Groups, order and values are nanochat's,
whose optimizer state files follow that order.

Legend: K matrices of one shape, R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from omni_model.model.gpt import GPT

POLAR_COEFFICIENTS = (  # (a, b, c) of X <- aX + (bA + cA^2) X with A = X X^T; Polar Express, 5 iterations
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def parameter_groups(
    gpt: GPT,
    *,
    matrix_lr: float = 0.02,
    embedding_lr: float = 0.3,
    unembedding_lr: float = 0.008,
    scalar_lr: float = 0.5,
    batch_scale: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """nanochat's groups for MuonAdamW, in nanochat's order.

    Learning rates are for width 768 and batches of 2^19 tokens: AdamW's matrices are scaled by
    (width / 768)^-1/2 here, and all but smear and backout by `batch_scale` = sqrt(batch tokens / 2^19).
    `weight_decay` is Muon's; AdamW's is fixed per group.
    """
    width_scale = (gpt.config.n_embd / 768) ** -0.5
    tables, scalars = batch_scale * width_scale, batch_scale * scalar_lr
    smear = [gpt.smear_gate.weight, gpt.smear_lambda, gpt.backout_lambda]
    groups = [
        _adamw([gpt.lm_head.weight], unembedding_lr * tables, (0.8, 0.96), 0.01),
        _adamw([gpt.transformer["wte"].weight], embedding_lr * tables, (0.8, 0.995), 0.001),
        _adamw([*gpt.value_embeds.parameters()], embedding_lr * tables * 0.5, (0.8, 0.995), 0.01),
        _adamw([gpt.resid_lambdas], scalars * 0.01, (0.8, 0.95), 0.05),
        _adamw([gpt.x0_lambdas], scalars, (0.96, 0.95), 0.0),
        _adamw(smear, 0.2, (0.8, 0.95), 0.0),
    ]
    matrices = list(gpt.transformer["h"].parameters())
    for shape in sorted({tuple(matrix.shape) for matrix in matrices}):
        members = [matrix for matrix in matrices if tuple(matrix.shape) == shape]
        groups.append(_muon(members, matrix_lr * batch_scale, weight_decay))
    return groups


def _adamw(
    params: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> dict[str, Any]:
    group = {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "eps": 1e-10}
    return group | {"weight_decay": weight_decay, "initial_lr": lr}


def _muon(params: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    group = {"kind": "muon", "params": params, "lr": lr, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9}
    return group | {"weight_decay": weight_decay, "initial_lr": lr}


def plain_adamw(params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """torch's AdamW over those parameters that train (projector, adapter), with `initial_lr` for set_lr."""
    group = {"params": [p for p in params if p.requires_grad], "initial_lr": lr}
    return torch.optim.AdamW([group], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Every group's learning rate becomes its initial one times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def set_muon(optimizer: torch.optim.Optimizer, *, momentum: float, weight_decay: float) -> None:
    """Momentum and weight decay of the Muon groups (AdamW's are not scheduled)."""
    for group in optimizer.param_groups:
        if group.get("kind") == "muon":
            group["momentum"], group["weight_decay"] = momentum, weight_decay


class MuonAdamW(torch.optim.Optimizer):
    """Both optimizers over `parameter_groups`, on one device, without a compiler; runs repeat bit by bit.

    polar_dtype is the dtype of the polar iterations: bf16 where the compute dtype is bf16 (nanochat's rule),
    else fp32. State: AdamW keeps step, exp_avg, exp_avg_sq per parameter in its dtype; a Muon group keeps
    momentum_buffer (K, R, N) and second_momentum_buffer (K, R, 1) or (K, 1, N) under its first parameter.
    ValueError for a group of another kind, RuntimeError for a parameter that got no gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        muon_eq: bool = True,
        muon_plus: bool = True,
        polar_dtype: torch.dtype = torch.float32,
    ) -> None:
        unknown = {group["kind"] for group in groups} - {"adamw", "muon"}
        if unknown:
            raise ValueError(f"A parameter group is of kind 'adamw' or 'muon', not {sorted(unknown)}.")
        self.muon_eq, self.muon_plus, self.polar_dtype = muon_eq, muon_plus, polar_dtype
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every group from the gradients at hand."""
        for group in self.param_groups:
            if any(p.grad is None for p in group["params"]):
                raise RuntimeError(f"A parameter of shape {tuple(group['params'][0].shape)} got no gradient.")
            if group["kind"] == "muon":
                self._step_muon(group)
            else:
                for p in group["params"]:
                    self._step_adamw(p, group)

    def _step_adamw(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        # .float() is the tensor itself for fp32; bf16 embeddings are widened, updated and written back.
        wide, grad = p.float(), p.grad.float()
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        wide.mul_(1 - group["lr"] * group["weight_decay"])
        wide.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))
        for stored, fresh in ((p, wide), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            if stored.dtype != torch.float32:
                stored.copy_(fresh)

    def _step_muon(self, group: dict[str, Any]) -> None:
        params = group["params"]
        stack = torch.stack([p.grad for p in params])
        rows, columns = stack.shape[-2:]
        state, kept = self.state[params[0]], -1 if rows >= columns else -2
        if not state:
            state["momentum_buffer"] = torch.zeros_like(stack)
            state["second_momentum_buffer"] = torch.zeros_like(stack.mean(kept, keepdim=True))
        momentum = state["momentum_buffer"].lerp_(stack, 1 - group["momentum"])
        update = stack.lerp_(momentum, group["momentum"])  # Nesterov: look ahead along the momentum
        update = self._orthogonal(update, group["ns_steps"])
        update = reduce_variance(update, state["second_momentum_buffer"], group["beta2"], kept)
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        weights = torch.stack(params)
        agrees = (update * weights) >= 0  # decay only what the update already shrinks
        weights -= lr * update + lr * group["weight_decay"] * weights * agrees
        torch._foreach_copy_(params, list(weights.unbind(0)))

    def _orthogonal(self, update: Tensor, steps: int) -> Tensor:
        x = update.to(self.polar_dtype)
        if self.muon_eq:
            x = equilibrate_rows(x)
        x = polar_factor(x, steps).to(update.dtype)
        if not self.muon_plus:
            return x
        size = x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
        return x * (min(x.shape[-2:]) ** 0.5 / size)  # the norm that an orthogonal matrix has


def equilibrate_rows(x: Tensor) -> Tensor:
    """Every row of x (K, R, N) scaled to the root mean square of the row norms."""
    target = x.float().norm(dim=(-2, -1), keepdim=True) / x.size(-2) ** 0.5
    norms = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return x * (target / norms).to(x.dtype)


def polar_factor(x: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T for x = U S V^T (K, R, N): singular values are pushed to about 1."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_COEFFICIENTS[:steps]:
        gram = x.mT @ x if tall else x @ x.mT
        mix = b * gram + c * (gram @ gram)
        x = a * x + (x @ mix if tall else mix @ x)
    return x


def reduce_variance(update: Tensor, second: Tensor, beta2: float, axis: int) -> Tensor:
    """Divide rows (axis -1) or columns (axis -2) of `update` by their running scale, keeping its norm.

    `second` holds the running mean squares and is advanced in place. It needs no bias correction: the
    renormalisation cancels any common factor.
    """
    size = update.size(axis)
    mean_square = update.float().square().mean(dim=axis, keepdim=True)
    norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * size).sqrt()
    second.lerp_(mean_square.to(second.dtype), 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    scaled = (mean_square * size * scale.float().square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * (scale * (norm / scaled.clamp_min(1e-10))).to(update.dtype)
