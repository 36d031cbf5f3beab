"""MuonAdamW against the same mathematics written out plainly, one parameter at a time."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.weights import load_gpt, save_gpt
from omni_model.training import checkpoint, polar
from omni_model.training.optim import MuonAdamW, descend, parameter_groups, set_muon
from omni_model.training.polar import POLAR_POLYNOMIALS, polar_factor

SMALL_SHAPES = [(40, 40), (24, 96), (160, 24), (1, 12), (12, 6), (3, 12)]
LARGE_SHAPES = [(260, 260), (270, 560), (530, 264)]


def tiny_gpt(dtype: torch.dtype = torch.float32) -> GPT:
    shape = {"sequence_len": 32, "vocab_size": 50, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 48}
    gpt = GPT(GPTConfig(**shape), dtype)
    with torch.no_grad():
        gpt.lm_head.weight.mul_(100)
    return gpt


def muon_group(params: list[nn.Parameter], weight_decay: float) -> dict[str, Any]:
    group = {"kind": "muon", "params": params, "lr": 0.02, "momentum": 0.9, "ns_steps": 5, "beta2": 0.9}
    return group | {"weight_decay": weight_decay, "initial_lr": 0.02}


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- Muon, written out ----------------------------------------------------------------------------------


def plain_polar(x: Tensor) -> Tensor:
    x = x / (1.01 * x.norm() + 1e-6)
    for a, b, c in POLAR_POLYNOMIALS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class PlainMuon:
    """One matrix, in the order of the papers, with every sum in float64."""

    def __init__(self, weights: Tensor, muon_eq: bool, muon_plus: bool) -> None:
        self.weights = weights.double()
        self.momentum, self.mean_square = torch.zeros_like(self.weights), torch.zeros(())
        self.muon_eq, self.muon_plus = muon_eq, muon_plus

    def step(self, gradient: Tensor, group: dict[str, Any]) -> None:
        rows, columns = gradient.shape
        beta, gradient = group["momentum"], gradient.double()
        self.momentum = beta * self.momentum + (1 - beta) * gradient
        x = (1 - beta) * gradient + beta * self.momentum
        if self.muon_eq:
            x = torch.stack([row / row.norm() for row in x]) * x.norm() / math.sqrt(rows)
        x = plain_polar(x)
        if self.muon_plus:
            x = x * math.sqrt(min(rows, columns)) / x.norm()
        mean_square = (x**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
        self.mean_square = group["beta2"] * self.mean_square + (1 - group["beta2"]) * mean_square
        scaled = x / self.mean_square.sqrt()
        x = scaled * x.norm() / scaled.norm()
        lr = group["lr"] * math.sqrt(max(1.0, rows / columns))
        decayed = (x * self.weights >= 0) * self.weights
        self.weights = self.weights - lr * (x + group["weight_decay"] * decayed)


def compare_muon(shape: tuple[int, int], steps: int, weight_decay: float, **flags: bool) -> None:
    make = draws(0)
    params = [nn.Parameter(torch.randn(shape, generator=make)) for _ in range(2)]
    plain = [PlainMuon(p.detach(), **flags) for p in params]
    optimizer = MuonAdamW([muon_group(params, weight_decay)], **flags)
    for step in range(steps):
        set_muon(optimizer, momentum=0.85 + 0.02 * step, weight_decay=weight_decay)
        for p, reference in zip(params, plain, strict=True):
            p.grad = torch.randn(shape, generator=make) * 10.0 ** -(3 * step)
            reference.step(p.grad, optimizer.param_groups[0])
        optimizer.step()
        optimizer.zero_grad()
    for p, reference in zip(params, plain, strict=True):
        off = (p.detach().double() - reference.weights).abs()
        # Where the update is zero but for rounding, the two may differ about decay: rarely, and by no more.
        wrong = off > 1e-6 + 1e-5 * reference.weights.abs()
        decay = 0.02 * max(1.0, shape[0] / shape[1]) ** 0.5 * weight_decay * reference.weights.abs()
        assert (off[wrong] <= 1.1 * decay[wrong]).all()
        assert wrong.double().mean() <= 1e-3


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("muon_eq", "muon_plus"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_muon_equals_the_plain_reference(
    shape: tuple[int, int], muon_eq: bool, muon_plus: bool, weight_decay: float
) -> None:
    compare_muon(shape, 4, weight_decay, muon_eq=muon_eq, muon_plus=muon_plus)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_muon_equals_the_plain_reference_on_large_matrices(
    shape: tuple[int, int], weight_decay: float
) -> None:
    compare_muon(shape, 2, weight_decay, muon_eq=True, muon_plus=True)


def test_decay_leaves_alone_what_the_update_lets_grow() -> None:
    weights, step = torch.tensor([2.0, -2.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    descend(weights, step.clone(), lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(weights, torch.tensor([2 - 0.6, -2.5, 2.5, -0.5]))


# -- the polar factor -----------------------------------------------------------------------------------


def spectrum(kind: str, rows: int, columns: int) -> Tensor:
    x = torch.randn(2, rows, columns, generator=draws(1), dtype=torch.float64)
    if kind == "random":
        return x
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    falling = torch.logspace(0, -6, min(rows, columns), dtype=torch.float64)
    return u @ torch.diag_embed(falling.expand(2, -1)) @ vh


@pytest.mark.parametrize(("kind", "bound"), [("random", 1e-5), ("ill-conditioned", 4e-5)])
@pytest.mark.parametrize("shape", [(256, 512), (640, 160), (200, 800), (256, 256)], ids=str)
def test_the_gram_form_equals_the_direct_form(shape: tuple[int, int], kind: str, bound: float) -> None:
    x = spectrum(kind, *shape)
    scaled = (x / (1.01 * x.norm(dim=(-2, -1), keepdim=True))).float()
    direct = polar._apply(scaled, POLAR_POLYNOMIALS)
    by_gram = polar._apply_by_gram(polar._apply_by_gram(scaled, POLAR_POLYNOMIALS[:3]), POLAR_POLYNOMIALS[3:])
    assert (by_gram - direct).norm() <= bound * direct.norm()
    truth = torch.stack([plain_polar(each) for each in x])
    assert (polar_factor(x.float()).double() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_any_number_of_polynomials(steps: int) -> None:
    wide = torch.randn(1, 20, 60, generator=draws(2))
    square = torch.linalg.qr(wide.mT)[0].mT @ wide.mT  # the same singular values without the long side
    long, short = (polar_factor(x, steps)[0] for x in (wide, square))
    torch.testing.assert_close(torch.linalg.svdvals(long), torch.linalg.svdvals(short), rtol=1e-4, atol=1e-5)


def test_bf16_products_come_near() -> None:
    x = torch.randn(2, 64, 200, generator=draws(4))
    exact = polar_factor(x)
    assert 1e-4 < (polar_factor(x, dtype=torch.bfloat16) - exact).norm() / exact.norm() < 0.1


# -- AdamW ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_its_formula_in_fp32(dtype: torch.dtype) -> None:
    """bf16 values are widened, updated in fp32 and rounded."""
    units = {torch.float32: 4, torch.bfloat16: 1}[dtype]  # in the last place
    make = draws(5)
    p = nn.Parameter(torch.randn(70, 33, generator=make).to(dtype))
    lr, beta1, beta2, decay, eps = 0.03, 0.8, 0.995, 0.1, 1e-10
    group = {"kind": "adamw", "params": [p], "lr": lr, "betas": (beta1, beta2), "eps": eps}
    optimizer = MuonAdamW([group | {"weight_decay": decay}])
    for step in range(1, 6):
        p.grad = (1e-3 * torch.randn(33, 70, generator=make).to(dtype)).T  # not contiguous
        state = optimizer.state[p]
        mean, square = (
            state[name].double() if state else torch.zeros(70, 33, dtype=torch.float64)
            for name in ("exp_avg", "exp_avg_sq")
        )
        gradient = p.grad.double()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        move = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        expected = p.detach().double() * (1 - lr * decay) - lr * move
        optimizer.step()
        off = (p.detach().double() - expected).abs()
        assert (off <= units * torch.finfo(dtype).eps * expected.abs().clamp_min(lr)).all()
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        assert state["step"] == step


# -- stacks ---------------------------------------------------------------------------------------------


def trained(gpt: GPT, optimizer: MuonAdamW, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        ids = torch.randint(50, (2, 17), generator=draws(step))
        for row in ids.split(1):  # gradients accumulate
            (gpt(row[:, :-1], row[:, 1:]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_stacked_matrices_are_ordinary_parameters(tmp_path: Path) -> None:
    gpt = tiny_gpt()
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    optimizer = MuonAdamW(parameter_groups(gpt, weight_decay=0.1))
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())
    queries = [block.attn.c_q.weight for block in gpt.transformer["h"]]
    assert len({p.untyped_storage().data_ptr() for p in queries}) == 1
    trained(gpt, optimizer, 2)
    twin = copy.deepcopy(gpt)
    save_gpt(gpt, tmp_path)
    checkpoint.save(tmp_path / "step", gpt.state_dict(), {}, {})
    saved = (load_gpt(tmp_path).state_dict(), checkpoint.load(tmp_path / "step").model, twin.state_dict())
    gpt.load_state_dict(before)
    assert not torch.equal(twin.lm_head.weight, gpt.lm_head.weight)
    for found in saved:
        gpt.load_state_dict(before)
        checkpoint.copy_into(dict(gpt.named_parameters()), found)
        assert all(torch.equal(value, found[name]) for name, value in gpt.state_dict().items())
    trained(gpt, optimizer, 1, first=2)  # the stacks still are the parameters' memory
    assert not torch.equal(gpt.transformer["h"][0].attn.c_q.weight, twin.transformer["h"][0].attn.c_q.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_is_seen_by_what_watches_the_parameters(dtype: torch.dtype) -> None:
    """Layers keep narrow copies of their matrices for as long as a matrix's version does not change."""
    gpt, ids = tiny_gpt(dtype), torch.arange(20).view(2, 10)
    optimizer = MuonAdamW(parameter_groups(gpt))
    gpt(ids, ids).backward()
    versions = [p._version for p in gpt.parameters()]
    optimizer.step()
    assert all(p._version > version for p, version in zip(gpt.parameters(), versions, strict=True))
    fresh = tiny_gpt(dtype)
    fresh.load_state_dict(gpt.state_dict())
    assert torch.equal(gpt(ids), fresh(ids))


def test_a_resumed_optimizer_goes_on_bit_by_bit() -> None:
    straight = tiny_gpt()
    optimizer = MuonAdamW(parameter_groups(straight))
    trained(straight, optimizer, 3)
    resumed = copy.deepcopy(straight)
    heir = MuonAdamW(parameter_groups(resumed))
    tensors, scalars = checkpoint.flatten_optimizer(optimizer)
    assert {name for name in tensors if name.startswith("11.")} == {
        "11.momentum_buffer",
        "11.second_momentum_buffer",
    }
    checkpoint.restore_optimizer(heir, tensors, scalars)
    trained(straight, optimizer, 2, first=3)
    trained(resumed, heir, 2, first=3)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_bad_groups_and_moved_parameters_are_refused() -> None:
    unlike = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2))]
    with pytest.raises(ValueError, match=r"one shape, not \[\(2, 3\), \(3, 2\)\]"):
        MuonAdamW([muon_group(unlike, 0.0)])
    gpt = tiny_gpt()
    optimizer = MuonAdamW(parameter_groups(gpt))
    gpt.transformer["h"][0].attn.c_q.weight.data = torch.zeros(48, 48)
    ids = torch.arange(10).view(1, 10)
    gpt(ids, ids).backward()
    head = gpt.lm_head.weight.clone()
    with pytest.raises(RuntimeError, match=r"shape \(48, 48\) was moved"):
        optimizer.step()
    assert torch.equal(head, gpt.lm_head.weight)  # found before anything was updated
