"""The one training loop: every stage that learns is an Objective, and this drives it.

Step s is a pure function of the weights, the optimizer's state and the number s: the objective builds its
batch from its seed and s, so where to resume is simply the next step. Killed anywhere and started again,
`train` continues from its last checkpoint and ends in the same weights, bit by bit on CPU.

Among ranks every process runs this loop. Each computes the loss of its own part of a batch; gradients are
averaged, so parts must be equal. Rank 0 alone logs and writes, and what a clock or an exam decides, it
decides for all. A checkpoint is that of a single process: any number of ranks may continue it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from omni_model.training.checkpoint import (
    copy_into,
    flatten_optimizer,
    keep_only,
    latest,
    load,
    restore_optimizer,
    save,
    step_directory,
)
from omni_model.training.curve import LossCurve
from omni_model.training.loss_scale import LossScale
from omni_model.training.optim import MuonAdamW
from omni_model.training.ranks import ALONE, Ranks

CHECKPOINT_SHARE = 0.05  # of the time may go into checkpoints; what takes a second is free


class MetricsSink(Protocol):
    """Where numbers go: a file, a dashboard, nowhere."""

    def log(self, step: int, total: int, **values: float) -> None: ...


class Objective(Protocol):
    """What a stage wants learned. Inherit from it: the methods with a body may be left out.

    `optimizer` updates the tensors of `tensors()`; `clip_norm` bounds the gradient's norm (None: no bound);
    `loss_scale` keeps fp16's gradients in range (None: the loss is differentiated as it is).
    Whatever is random in a step must come from a generator seeded by (seed, step): no RNG state is saved.
    """

    optimizer: torch.optim.Optimizer
    clip_norm: float | None = None
    loss_scale: LossScale | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """The named parameters that are trained; exactly these are saved and restored, in place."""
        ...

    def set_schedule(self, step: int) -> None:
        """Set learning rates and the like for this step (counted from 0)."""
        ...

    def loss(self, step: int) -> Tensor | Iterator[Tensor]:
        """The loss of this step's batch: a scalar, or an iterator of microbatch shares that sum to it.

        Each share is differentiated before the next one is asked for, so only one is in memory. Among ranks:
        of this rank's part of the batch, which the objective knows how to take.
        """
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Numbers to log after `step` updates. May set state that later steps depend on; see state().

        Every rank is asked; rank 0's numbers are logged, and its state becomes everyone's.
        """
        return {}

    def finished(self) -> bool:
        """True ends training before the last step; asked before every step, so keep it cheap."""
        return False

    def state(self) -> dict[str, Any]:
        """JSON values beyond tensors and optimizer that later steps depend on, like a curriculum's phase."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what state() gave."""


def train(
    objective: Objective,
    *,
    steps: int,
    partial: Path,
    metrics: MetricsSink,
    ranks: Ranks = ALONE,
    checkpoint_every_s: float = 60.0,
    log_every: int = 10,
    evaluate_every: int = 0,
) -> LossCurve:
    """Run the objective to `steps` updates, or until it is finished; returns the loss of every update.

    Continues from the newest checkpoint in `partial`, writes one there about every checkpoint_every_s seconds
    (large ones less often: CHECKPOINT_SHARE) and one at the end. Every `log_every` steps, and before each
    evaluation, checkpoint and the end, it logs the mean loss and the mean seconds of a step, without those of
    evaluations and checkpoints; every `evaluate_every` steps (0: never) what the objective evaluates.
    FloatingPointError when a loss is not finite, RuntimeError when ranks find different checkpoints.
    """
    curve = _resume(objective, partial, ranks)
    step = curve.steps
    recent = _Recent(metrics, steps, curve, ranks)
    saved_at, pause_s = time.monotonic(), checkpoint_every_s
    stopping = ranks.agree(objective.finished())
    while step < steps and not stopping:
        recent.add(step, update(objective, step, ranks))
        step += 1
        evaluating = evaluate_every > 0 and step % evaluate_every == 0
        if evaluating or step % log_every == 0:
            recent.flush()
        if evaluating:
            recent.log(step, objective.evaluate(step))
            if ranks.world > 1:
                objective.restore(ranks.agree(objective.state()))
            recent.wind()
        saving = time.monotonic() - saved_at >= pause_s
        stopping, saving = ranks.agree([objective.finished(), saving])
        if saving:
            recent.flush()
            began = time.monotonic()
            _save(objective, partial, curve, ranks)
            saved_at = time.monotonic()
            pause_s = max(checkpoint_every_s, (saved_at - began - 1.0) / CHECKPOINT_SHARE)
            recent.wind()
    recent.flush()
    _save(objective, partial, curve, ranks)
    return curve


def update(objective: Objective, step: int, ranks: Ranks = ALONE) -> Tensor:
    """One step: schedule, loss and gradients, clip, optimizer. Returns this rank's loss, on its device."""
    objective.set_schedule(step)
    loss = objective.loss(step)
    shares = iter([loss]) if isinstance(loss, Tensor) else loss
    scale, parts = objective.loss_scale, []
    for share in shares:
        (share if scale is None else share * scale.value).backward()
        parts.append(share.detach().float())
    tensors = list(objective.tensors().values())
    if scale is None or scale.unscale(tensors, ranks):
        # MuonAdamW averages for itself; but only averaged gradients have a norm that is worth bounding.
        if objective.clip_norm is not None or not isinstance(objective.optimizer, MuonAdamW):
            ranks.average_gradients(tensors)
        if objective.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors, objective.clip_norm)
        objective.optimizer.step()
    objective.optimizer.zero_grad(set_to_none=True)
    return torch.stack(parts).sum()


@dataclass
class _Recent:
    """Losses since the last log, left on their device: reading one at every step would make the CPU wait."""

    metrics: MetricsSink
    total: int
    curve: LossCurve
    ranks: Ranks
    losses: list[Tensor] = field(default_factory=list)
    first_step: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, step: int, loss: Tensor) -> None:
        if not self.losses:
            self.first_step = step
        self.losses.append(loss)

    def wind(self) -> None:
        """Start the clock of the next steps now."""
        self.since = time.monotonic()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.ranks.first:
            self.metrics.log(step=step, total=self.total, **values)

    def flush(self) -> None:
        if not self.losses:
            return
        values = self.ranks.average(torch.stack(self.losses))().tolist()
        for step, value in enumerate(values, self.first_step):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss of step {step} is {value}: likely a batch without any target, too high a "
                    "learning rate, or an overflow in a narrow dtype; the last checkpoint is sound."
                )
        self.curve.extend(values)
        now = time.monotonic()
        mean, pace = math.fsum(values) / len(values), (now - self.since) / len(values)
        self.log(self.first_step + len(values), {"loss": mean, "step_s": pace})
        self.losses, self.since = [], now


def _resume(objective: Objective, partial: Path, ranks: Ranks) -> LossCurve:
    """Put the newest checkpoint's values into the objective; the losses up to there, none without one."""
    newest = latest(partial)
    found = None if newest is None else newest.name
    if found != ranks.agree(found):
        raise RuntimeError(f"Rank {ranks.rank} found checkpoint {found} in {partial}, and rank 0 another.")
    if newest is None:
        return LossCurve()
    saved = load(newest)
    copy_into(objective.tensors(), saved.model)
    restore_optimizer(objective.optimizer, saved.optimizer, saved.state["optimizer"])
    if objective.loss_scale is not None:
        objective.loss_scale.restore(saved.state["loss_scale"])
    objective.restore(saved.state["objective"])
    return LossCurve(saved.state["curve"])


def _save(objective: Objective, partial: Path, curve: LossCurve, ranks: Ranks) -> None:
    """A checkpoint after the updates of `curve`, unless it is there; earlier ones go once it is."""
    directory = step_directory(partial, curve.steps)
    if not ranks.agree(directory.exists()):
        tensors, scalars = flatten_optimizer(objective.optimizer)
        if ranks.first:
            told = {"step": curve.steps, "curve": curve.values}
            state = {**told, "optimizer": scalars, "objective": objective.state()}
            if objective.loss_scale is not None:
                state["loss_scale"] = objective.loss_scale.state()
            save(directory, dict(objective.tensors()), tensors, state)
    if ranks.first:
        keep_only(directory)
    ranks.agree(None)  # nobody goes on, or ends, before the checkpoint is there
