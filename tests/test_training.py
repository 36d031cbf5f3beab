"""Optimizers, schedules, checkpoints and the loop, against theory, against torch and against themselves."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_model.config import BadInput
from omni_model.hardware import compute_dtype, speed_up_products
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.training import checkpoint, schedule
from omni_model.training.loop import Objective, train
from omni_model.training.optim import MuonAdamW, parameter_groups, plain_adamw, set_lr, set_muon
from omni_model.training.polar import equilibrate_rows, polar_factor


def tiny_gpt() -> GPT:
    shape = {"sequence_len": 32, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    gpt = GPT(GPTConfig(**shape))
    with torch.no_grad():  # the head starts near zero; give the first steps something to do
        gpt.lm_head.weight.mul_(100)
    return gpt


class Remember(Objective):
    """Learn one fixed sequence per step; the batch depends on the step alone."""

    def __init__(self, microbatches: int = 1, clip_norm: float | None = None, muon: bool = True) -> None:
        self.gpt, self.microbatches, self.clip_norm = tiny_gpt(), microbatches, clip_norm
        groups = parameter_groups(self.gpt, weight_decay=0.1)
        self.optimizer = MuonAdamW(groups) if muon else plain_adamw(self.gpt.parameters(), 1e-3)
        self.evaluated: list[int] = []
        self.phase = 0

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.gpt.named_parameters())

    def set_schedule(self, step: int) -> None:
        set_lr(self.optimizer, schedule.lr_multiplier(step, 6, warmup_steps=2))
        weight_decay = schedule.muon_weight_decay(step, 6, 0.1)
        set_muon(self.optimizer, momentum=schedule.muon_momentum(step, 6), weight_decay=weight_decay)

    def loss(self, step: int) -> Tensor | Iterator[Tensor]:
        draws = torch.Generator().manual_seed(step)
        ids = torch.randint(50 - self.phase, (4, 17), generator=draws)
        if self.microbatches == 1:
            return self.gpt(ids[:, :-1], ids[:, 1:])
        parts = ids.chunk(self.microbatches)
        return (self.gpt(part[:, :-1], part[:, 1:]) / self.microbatches for part in parts)

    def evaluate(self, step: int) -> dict[str, float]:
        self.evaluated.append(step)
        self.phase += 1
        return {"phase": float(self.phase)}

    def state(self) -> dict[str, Any]:
        return {"phase": self.phase}

    def restore(self, state: dict[str, Any]) -> None:
        self.phase = state["phase"]


class Recorder:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, step: int, total: int, **values: float) -> None:
        self.lines.append({"step": step, "total": total, **values})


class Killed(Exception):
    """Stands for the process being killed in the middle of a step."""


def run(objective: Remember, partial: Path, steps: int, **options: Any) -> Recorder:
    recorder = Recorder()
    train(objective, steps=steps, partial=partial, metrics=recorder, evaluate_every=2, **options)
    return recorder


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


# -- optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (24, 64), (64, 24)])
def test_first_muon_update_is_nearly_orthogonal(rows: int, columns: int) -> None:
    matrix = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    before = matrix.detach().clone()
    (matrix.square().sum() + (matrix**3).sum()).backward()
    group = {"kind": "muon", "params": [matrix], "lr": 1.0, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9}
    MuonAdamW([group | {"weight_decay": 0.0}]).step()
    singular = torch.linalg.svdvals((before - matrix.detach()) / max(1, rows / columns) ** 0.5)
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    assert singular.square().mean().item() == pytest.approx(1.0, abs=0.05)


def test_polar_factor_and_row_equilibration() -> None:
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert (polar_factor(x) - u @ v).norm() / (u @ v).norm() < 0.1
    norms = equilibrate_rows(x * torch.logspace(-2, 2, 40).unsqueeze(1)).norm(dim=-1)
    assert norms.std(dim=-1).max() < 1e-4 * norms.mean()


def test_adamw_group_is_torchs_adamw() -> None:
    make = torch.Generator().manual_seed(0)
    start = torch.randn(30, 20, generator=make)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.96), "eps": 1e-10, "weight_decay": 0.1}
    group = {"kind": "adamw", "params": [ours]} | options
    optimizers = MuonAdamW([group]), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        gradient = torch.randn(30, 20, generator=make)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_bf16_embeddings_are_updated_in_bf16() -> None:
    gpt = GPT(tiny_gpt().config, torch.bfloat16)
    optimizer = MuonAdamW(parameter_groups(gpt), polar_dtype=torch.bfloat16)
    ids = torch.arange(20).view(2, 10)
    before = gpt(ids, ids).item()
    for _ in range(3):
        gpt(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    table = gpt.transformer["wte"].weight
    assert optimizer.state[table]["exp_avg"].dtype == torch.bfloat16
    assert gpt(ids, ids).item() < before


def test_groups_hold_every_parameter_once_in_the_originals_order() -> None:
    gpt = tiny_gpt()
    groups = parameter_groups(gpt, batch_scale=0.5)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in gpt.parameters())
    assert [group["kind"] for group in groups] == ["adamw"] * 6 + ["muon"] * 5
    shapes = [tuple(group["params"][0].shape) for group in groups[6:]]
    assert shapes == [(1, 12), (16, 32), (32, 32), (32, 128), (128, 32)]
    width = (32 / 768) ** -0.5
    expected = [0.004 * width, 0.15 * width, 0.075 * width, 0.0025, 0.25, 0.2] + [0.01] * 5
    assert [group["lr"] for group in groups] == pytest.approx(expected)


def test_a_parameter_without_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="got no gradient"):
        MuonAdamW(parameter_groups(tiny_gpt())).step()
    with pytest.raises(ValueError, match="sgd"):
        MuonAdamW([{"kind": "sgd", "params": [nn.Parameter(torch.zeros(1))]}])


# -- schedules ----------------------------------------------------------------------------------------


def test_schedules_at_their_corners() -> None:
    rate = [schedule.lr_multiplier(step, 1000) for step in (0, 39, 40, 350, 351, 1000)]
    assert rate == pytest.approx([1 / 40, 1, 1, 1, 649 / 650 + 0.05 / 650, 0.05])
    momentum = [schedule.muon_momentum(step, 2000) for step in (0, 200, 400, 700, 1350, 2000)]
    assert momentum == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90])
    decay = [schedule.muon_weight_decay(step, 100, 0.28) for step in (0, 50, 100)]
    assert decay == pytest.approx([0.28, 0.14, 0.0])
    cosine = [schedule.cosine(step, 110, 10, 0.1) for step in (0, 9, 10, 60, 110, 120)]
    assert cosine == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])


# -- checkpoints --------------------------------------------------------------------------------------


def test_checkpoint_round_trip_and_bytes(tmp_path: Path) -> None:
    model = {"b": torch.randn(3, 4), "a": torch.randn(5).bfloat16()}
    state = {"step": 3, "z": [1.5, math.pi], "a": {"y": "text", "x": None}}
    checkpoint.save(tmp_path / "one", model, {"0.m": torch.ones(2)}, state)
    swapped = dict(reversed(model.items()))
    checkpoint.save(tmp_path / "two", swapped, {"0.m": torch.ones(2)}, dict(reversed(state.items())))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    saved = checkpoint.load(tmp_path / "one")
    assert saved.state == state
    assert all(torch.equal(saved.model[name], value) for name, value in model.items())
    checkpoint.save(tmp_path / "one", {}, {}, {"step": 4})
    assert checkpoint.load(tmp_path / "one").state == {"step": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "bad", {}, {}, {"loss": math.nan})
    assert not (tmp_path / "bad").exists()


def test_a_crash_while_saving_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(checkpoint.step_directory(tmp_path, 1), {}, {}, {"step": 1})

    def fail(*_: object) -> None:
        raise Killed

    for name in ("_write_tensors", "_write_bytes", "_sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, fail)
            with pytest.raises(Killed):
                checkpoint.save(checkpoint.step_directory(tmp_path, 2), {"w": torch.ones(1)}, {}, {"step": 2})
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert checkpoint.load(newest).state == {"step": 1}
    checkpoint.save(checkpoint.step_directory(tmp_path, 2), {}, {}, {"step": 2})
    checkpoint.keep_only(checkpoint.step_directory(tmp_path, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_copy_into_keeps_storage_and_refuses_strangers() -> None:
    weight = torch.zeros(3)
    place = weight.data_ptr()
    checkpoint.copy_into({"w": weight}, {"w": torch.arange(3.0)})
    assert weight.tolist() == [0, 1, 2]
    assert weight.data_ptr() == place
    with pytest.raises(ValueError, match=r"lacks \['w'\], has unknown \['v'\]"):
        checkpoint.copy_into({"w": weight}, {"v": weight})
    with pytest.raises(ValueError, match=r"w has shape \(2,\), wanted \(3,\)"):
        checkpoint.copy_into({"w": weight}, {"w": torch.zeros(2)})


# -- the loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [True, False])
def test_two_steps_and_a_resume_equal_a_straight_run(tmp_path: Path, muon: bool) -> None:
    straight = Remember(muon=muon, clip_norm=1.0)
    run(straight, tmp_path / "straight", 6)
    run(Remember(muon=muon, clip_norm=1.0), tmp_path / "resumed", 2)
    resumed = Remember(muon=muon, clip_norm=1.0)
    run(resumed, tmp_path / "resumed", 6)
    assert resumed.evaluated == [4, 6]
    for name, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    last = "step-00000006"
    assert digest(tmp_path / "straight" / last) == digest(tmp_path / "resumed" / last)
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == [last]
    state = json.loads((tmp_path / "resumed" / last / "state.json").read_text())
    assert (state["step"], state["objective"]) == (6, {"phase": 3})


@pytest.mark.parametrize("killed_at", [0, 3, 5])
def test_killed_and_started_again_equals_undisturbed(tmp_path: Path, killed_at: int) -> None:
    straight, doomed, heir = Remember(), Remember(), Remember()
    run(straight, tmp_path / "straight", 6)
    loss = doomed.loss

    def deadly(step: int) -> Tensor | Iterator[Tensor]:
        if step == killed_at:
            raise Killed
        return loss(step)

    doomed.loss = deadly  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(doomed, tmp_path / "partial", 6, checkpoint_every_s=0.0)
    run(heir, tmp_path / "partial", 6)
    assert all(torch.equal(value, heir.tensors()[name]) for name, value in straight.tensors().items())


def test_microbatches_add_up(tmp_path: Path) -> None:
    whole, parts = Remember(), Remember(microbatches=2)
    one, two = run(whole, tmp_path / "a", 1), run(parts, tmp_path / "b", 1)
    assert one.lines[0]["loss"] == pytest.approx(two.lines[0]["loss"], rel=1e-6)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        torch.testing.assert_close(whole.tensors()[name], parts.tensors()[name], rtol=1e-3, atol=1e-3)


def test_logging_and_stopping(tmp_path: Path) -> None:
    objective = Remember()
    recorder = run(objective, tmp_path, 5, log_every=2)
    losses = [line for line in recorder.lines if "loss" in line]
    assert [line["step"] for line in losses] == [2, 4, 5]
    assert [line["step"] for line in recorder.lines if "phase" in line] == [2, 4]
    objective.finished = lambda: True  # type: ignore[method-assign]
    assert train(objective, steps=100, partial=tmp_path, metrics=Recorder()).steps == 5


def test_a_loss_that_is_not_finite_stops_with_a_reason(tmp_path: Path) -> None:
    objective = Remember()
    loss = objective.loss
    objective.loss = lambda step: loss(step) * (math.nan if step == 3 else 1.0)  # type: ignore
    with pytest.raises(FloatingPointError, match="The loss of step 3 is nan: likely"):
        run(objective, tmp_path, 6, checkpoint_every_s=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_way_of_multiplying_is_measured_once_and_exact(tmp_path: Path) -> None:
    kept, before = tmp_path / "partial" / "products.json", torch.get_float32_matmul_precision()
    try:
        choice = speed_up_products(kept)
        assert choice in ("highest", "medium", "high")
        assert torch.get_float32_matmul_precision() == choice
        a, b = torch.randn(300, 400), torch.randn(500, 400)
        assert ((a @ b.T) - a.double() @ b.double().T).abs().max() < 1e-3
        if not torch.cuda.is_available():
            kept.write_text('"high"')
            assert speed_up_products(kept) == "high"  # as it began, whatever the clock says now
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_compute_dtype_is_named_or_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = torch.device("cpu")
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    assert compute_dtype(processor) == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert compute_dtype(processor) == torch.bfloat16
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(BadInput, match="NANOCHAT_DTYPE is 'int8'; set it to bfloat16, float16, float32"):
        compute_dtype(processor)
