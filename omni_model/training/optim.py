"""The GPT's optimizer: Muon for the matrices of the blocks, AdamW for everything else.

AdamW (arXiv 1711.05101) moves each number by its own running scale. Muon (kellerjordan.github.io/posts/muon)
moves a matrix by the orthogonal matrix nearest to its momentum, so that all its directions advance alike;
the mathematics is in `omni_model.training.polar`. Weights decay only where that does not work against the
update. Groups, order and values are nanochat's, whose optimizer state files follow that order.

Matrices of one shape share one stacked tensor, so that a few operations update them all. Among ranks,
gradients are averaged here, and each rank updates its own part of every large tensor.

Legend: K matrices of one shape, R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from omni_model.model.gpt import GPT
from omni_model.training.polar import equilibrate_rows, polar_factor, reduce_variance, renormalize
from omni_model.training.ranks import ALONE, Ranks

SMALL_ELEMENTS = 1024  # a parameter with fewer is not worth dividing among ranks
# Muon takes this much of a stack at a time. The workspace is a few times as large, whatever the depth; a CPU
# keeps it in its cache, and a GPU still has enough to do.
SLICE_BYTES_CPU, SLICE_BYTES_GPU = 2**22, 2**28


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


@dataclass(frozen=True)
class _Piece:
    """What is updated at once: a parameter of AdamW, or the stacked matrices of a Muon group.

    whole is its memory, rows first: for Muon the stack (K, R, N), padded to a multiple of the ranks; homes is
    where in it each parameter lies. own are the rows this rank updates: all, unless the piece is divided.
    """

    group: int
    params: Sequence[nn.Parameter]
    whole: Tensor
    homes: Sequence[Tensor]
    rows: int
    own: slice
    divided: bool


def _adamw_piece(group: int, p: nn.Parameter, ranks: Ranks) -> _Piece:
    whole = p.data
    rows = whole.size(0) if whole.dim() else 1
    divided = ranks.world > 1 and whole.numel() >= SMALL_ELEMENTS and rows % ranks.world == 0
    return _Piece(group, [p], whole, [whole], rows, ranks.part(rows) if divided else slice(0, rows), divided)


def _muon_piece(group: int, params: Sequence[nn.Parameter], ranks: Ranks) -> _Piece:
    """Move the matrices' values into a stack of which they are views from now on."""
    shapes = {tuple(p.shape) for p in params}
    if len(shapes) != 1 or params[0].dim() != 2:
        raise ValueError(f"A Muon group holds matrices of one shape, not {sorted(shapes)}.")
    count = len(params)
    whole = params[0].data.new_zeros(-(-count // ranks.world) * ranks.world, *params[0].shape)
    homes = whole.unbind(0)[:count]
    for p, home in zip(params, homes, strict=True):
        p.data = home.copy_(p.data)
    return _Piece(group, params, whole, homes, count, ranks.part(count), ranks.world > 1)


def _check(piece: _Piece) -> None:
    """RuntimeError for a parameter without gradient, or one whose values are elsewhere now."""
    for p, home in zip(piece.params, piece.homes, strict=True):
        if p.grad is None:
            raise RuntimeError(f"A parameter of shape {tuple(p.shape)} got no gradient.")
        if p.data_ptr() != home.data_ptr():
            raise RuntimeError(
                f"A parameter of shape {tuple(p.shape)} was moved after its optimizer was made; "
                "put the model on its device first, and copy values in place."
            )


class MuonAdamW(torch.optim.Optimizer):
    """Both optimizers over `parameter_groups`, on one device, without a compiler; runs repeat bit by bit.

    polar_dtype is the dtype of the polar iterations: bf16 where the compute dtype is bf16 (nanochat's rule),
    else fp32. State: AdamW keeps step, exp_avg, exp_avg_sq per parameter in its dtype; a Muon group keeps
    momentum_buffer (K, R, N) and second_momentum_buffer (K, R, 1) or (K, 1, N) under its first parameter.

    The values of the matrices move into stacks here, so the model must be on its device already, and stay
    there. Gradients do not: zero_grad drops them (set_to_none), so that nothing is held during the forward
    pass and a first gradient is handed over rather than added to zeros.

    With `ranks`, `step` averages the gradients over them, and each rank keeps the state of its own part: rows
    of large AdamW parameters, matrices of Muon's. `state_dict` still gives the state of a single process.
    ValueError for a group of another kind, or one of Muon that is not matrices of one shape.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        ranks: Ranks = ALONE,
        muon_eq: bool = True,
        muon_plus: bool = True,
        polar_dtype: torch.dtype = torch.float32,
    ) -> None:
        unknown = {group["kind"] for group in groups} - {"adamw", "muon"}
        if unknown:
            raise ValueError(f"A parameter group is of kind 'adamw' or 'muon', not {sorted(unknown)}.")
        self.ranks, self.muon_eq, self.muon_plus, self.polar_dtype = ranks, muon_eq, muon_plus, polar_dtype
        super().__init__(groups, defaults={})
        self._pieces: list[_Piece] = []
        for index, group in enumerate(self.param_groups):
            if group["kind"] == "muon":
                self._pieces.append(_muon_piece(index, group["params"], ranks))
            else:
                self._pieces += [_adamw_piece(index, p, ranks) for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every group from the gradients at hand; with ranks, Muon's gradients are used up.

        RuntimeError when a parameter has no gradient, or its values no longer lie where they did.
        """
        for piece in self._pieces:
            _check(piece)
        # All transfers begin here, in the order of use: most run while earlier pieces are being updated.
        averages = [self._average(piece) for piece in self._pieces]
        spreads = []
        for piece, average in zip(self._pieces, averages, strict=True):
            group = self.param_groups[piece.group]
            update = self._step_muon if group["kind"] == "muon" else self._step_adamw
            update(piece, average(), group)
            if piece.divided:
                spreads.append(self.ranks.spread(piece.whole))
        for spread in spreads:
            spread()
        for piece in self._pieces:
            for p in piece.params:  # changed through other tensors: tell those who watch the version of p
                torch.autograd.graph.increment_version(p)

    def _average(self, piece: _Piece) -> Callable[[], Sequence[Tensor]]:
        """Begin averaging the gradients over the ranks; what it returns waits, and gives this rank's part."""
        if self.param_groups[piece.group]["kind"] == "adamw":
            begin = self.ranks.average_part if piece.divided else self.ranks.average
            wait = begin(piece.params[0].grad.contiguous())  # the kernel reads memory in order
            return lambda: [wait()]
        if not piece.divided:
            return lambda: [p.grad for p in piece.params]
        stack = torch.zeros_like(piece.whole)
        for p, place in zip(piece.params, stack.unbind(0), strict=False):
            place.copy_(p.grad)
            p.grad = None  # one after the other, so that no second set of gradients is ever held
        wait = self.ranks.average_part(stack)
        return lambda: wait()[: piece.own.stop - piece.own.start].unbind(0)

    def _step_adamw(self, piece: _Piece, gradients: Sequence[Tensor], group: dict[str, Any]) -> None:
        """p <- (1 - lr decay) p - lr m / (sqrt(v) + eps), m and v being unbiased running means of g and g^2.

        One kernel, in fp32 whatever the parameter's dtype.
        """
        weights = piece.whole[piece.own] if piece.divided else piece.whole  # a scalar has no rows
        state, (beta1, beta2) = self.state[piece.params[0]], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weights), exp_avg_sq=torch.zeros_like(weights))
        state["step"] += 1
        torch._fused_adamw_(
            [weights],
            [gradients[0]],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.full((), float(state["step"]), device=weights.device)],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _step_muon(self, piece: _Piece, gradients: Sequence[Tensor], group: dict[str, Any]) -> None:
        weights, state = piece.whole[piece.own], self.state[piece.params[0]]
        count, rows, columns = weights.shape
        if not state:
            factored = (count, rows, 1) if rows >= columns else (count, 1, columns)
            state["momentum_buffer"] = torch.zeros_like(weights)
            state["second_momentum_buffer"] = weights.new_zeros(factored)
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        slice_bytes = SLICE_BYTES_GPU if weights.is_cuda else SLICE_BYTES_CPU
        size = max(1, slice_bytes // (rows * columns * weights.element_size()))
        for start in range(0, count, size):
            some = slice(start, start + size)
            momentum = state["momentum_buffer"][some]
            gradient = torch.stack(list(gradients[some]))
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp_(momentum, group["momentum"])  # Nesterov: look ahead along the momentum
            update = self._orthogonal(update, group["ns_steps"])
            update = reduce_variance(update, state["second_momentum_buffer"][some], group["beta2"])
            descend(weights[some], update, lr, group["weight_decay"])

    def _orthogonal(self, update: Tensor, steps: int) -> Tensor:
        update = equilibrate_rows(update) if self.muon_eq else update
        update = polar_factor(update, steps, self.polar_dtype)
        return renormalize(update) if self.muon_plus else update

    def state_dict(self) -> dict[str, Any]:
        """The state as one process would have it. Among ranks all must ask; rank 0 gets it, on the CPU."""
        packed = super().state_dict()
        if self.ranks.world == 1:
            return packed
        state = {}
        for index, piece in self._saved_pieces():
            if index in packed["state"]:
                state[index] = {
                    name: self.ranks.collect(value, piece.rows) if _is_divided(value, piece) else value
                    for name, value in packed["state"][index].items()
                }
        return packed | {"state": state if self.ranks.first else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave in a run of any number of ranks."""
        state = dict(state_dict["state"])
        for index, piece in self._saved_pieces():
            if index in state:
                state[index] = {
                    name: value[piece.own].clone() if _is_divided(value, piece) else value
                    for name, value in state[index].items()
                }
        super().load_state_dict(state_dict | {"state": state})

    def _saved_pieces(self) -> list[tuple[int, _Piece]]:
        """Every piece with the number under which its state is saved: that of its first parameter."""
        numbers = accumulate([len(piece.params) for piece in self._pieces], initial=0)
        return list(zip(numbers, self._pieces, strict=False))


def _is_divided(value: Tensor | int, piece: _Piece) -> TypeGuard[Tensor]:
    return piece.divided and isinstance(value, Tensor)


def descend(weights: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """weights -= lr (update + weight_decay weights), in place; decay only what the update shrinks too."""
    if weight_decay != 0:
        shrinking = torch.where(update * weights >= 0, weights, 0.0)
        update = update.add_(shrinking, alpha=weight_decay)
    weights.sub_(update, alpha=lr)
