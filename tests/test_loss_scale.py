"""Training in fp16: scaled losses, skipped overflows, and a scale that is part of the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omni_model.training import loss_scale
from omni_model.training.loop import Objective, train, update
from omni_model.training.loss_scale import LossScale
from omni_model.training.optim import MuonAdamW, parameter_groups
from tests.test_optim import draws, tiny_gpt


class Half(Objective):
    """One batch learned by heart in fp16, with an overflow in the backward pass of chosen steps."""

    def __init__(self, overflows: tuple[int, ...] = ()) -> None:
        self.gpt, self.overflows = tiny_gpt(torch.float16), overflows
        self.optimizer = MuonAdamW(parameter_groups(self.gpt, batch_scale=0.1))
        self.loss_scale = LossScale(1024.0)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.gpt.named_parameters())

    def set_schedule(self, step: int) -> None:
        pass

    def loss(self, step: int) -> Tensor:
        ids = torch.randint(50, (2, 17), generator=draws(0))
        loss = self.gpt(ids[:, :-1], ids[:, 1:])
        if step in self.overflows:  # adds nothing to the loss, and an infinity to a gradient
            loss = loss + (self.gpt.backout_lambda.sum() * 0.0).sqrt()
        return loss


class Silent:
    def log(self, step: int, total: int, **values: float) -> None:
        pass


def test_fp16_gradients_are_those_of_fp32() -> None:
    wide, narrow = tiny_gpt(), Half()
    ids = torch.randint(50, (2, 17), generator=draws(0))
    wide(ids[:, :-1], ids[:, 1:]).backward()
    (narrow.loss(0) * narrow.loss_scale.value).backward()
    assert narrow.loss_scale.unscale(narrow.tensors().values())
    for name, p in wide.named_parameters():  # the lambdas have none yet but for rounding
        found = narrow.tensors()[name].grad
        assert p.grad is not None
        assert found is not None
        assert (found - p.grad).norm() <= 0.01 * p.grad.norm() + 3e-4, name


def test_a_step_that_overflows_is_skipped() -> None:
    objective = Half(overflows=(6,))
    losses = [update(objective, step).item() for step in range(6)]
    before = {name: value.clone() for name, value in objective.tensors().items()}
    assert objective.loss_scale == LossScale(1024.0, 6)
    update(objective, 6)
    assert all(torch.equal(value, before[name]) for name, value in objective.tensors().items())
    assert objective.loss_scale == LossScale(512.0, 0)
    losses += [update(objective, step).item() for step in range(7, 14)]
    assert objective.loss_scale == LossScale(512.0, 7)
    assert losses[-1] < losses[0] - 0.5


def test_the_loss_scale_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    straight, resumed = Half(overflows=(1, 3)), Half(overflows=(1, 3))
    train(straight, steps=6, partial=tmp_path / "a", metrics=Silent())
    train(Half(overflows=(1, 3)), steps=2, partial=tmp_path / "b", metrics=Silent())
    train(resumed, steps=6, partial=tmp_path / "b", metrics=Silent())
    assert resumed.loss_scale == straight.loss_scale == LossScale(256.0, 2)
    assert all(torch.equal(value, resumed.tensors()[name]) for name, value in straight.tensors().items())


def test_the_loss_scale_grows_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "DOUBLE_AFTER_STEPS", 3)
    p, scale = nn.Parameter(torch.zeros(2)), LossScale(8.0)
    for step in range(4):
        p.grad = torch.tensor([8.0, 4.0]) * (2 if step == 3 else 1)
        assert scale.unscale([p])
        assert p.grad.tolist() == [1.0, 0.5]
    assert scale == LossScale(16.0, 1)
    p.grad = torch.tensor([math.nan, 1.0])
    for _ in range(18):
        assert not scale.unscale([p])
    with pytest.raises(FloatingPointError, match="however small"):
        scale.unscale([p])
