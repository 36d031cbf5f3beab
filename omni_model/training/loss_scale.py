"""Dynamic loss scaling: what lets gradients through fp16's narrow range (arXiv 1710.03740).

fp16 ends at 65,504 and loses everything below 6e-8. So the loss is multiplied by a large scale before the
backward pass, and the gradients, accumulated in fp32, are divided by it after. Where they overflowed, the
step is skipped and the scale halved; after enough sound steps it doubles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_model.training.ranks import ALONE, Ranks

DOUBLE_AFTER_STEPS = 2000
SMALLEST = 2.0**-14  # gradients that overflow even so are not the scale's fault


@dataclass
class LossScale:
    """The scale of the next loss, and how many steps in a row it has been sound. Values are torch.amp's."""

    value: float = 2.0**16
    sound_steps: int = 0

    def unscale(self, tensors: Iterable[Tensor], ranks: Ranks = ALONE) -> bool:
        """Divide the gradients of fp32 tensors by the scale and choose the next one, alike on all ranks.

        False when a gradient of any rank is not finite: the step is to be skipped. FloatingPointError when
        that does not end however small the scale.
        """
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        overflow = torch.zeros(1, device=gradients[0].device)
        inverse = torch.full_like(overflow, 1 / self.value)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, overflow, inverse)
        sound = not ranks.on_any(overflow)
        self.sound_steps = self.sound_steps + 1 if sound else 0
        if not sound:
            self.value /= 2
        elif self.sound_steps == DOUBLE_AFTER_STEPS:
            self.value, self.sound_steps = self.value * 2, 0
        if self.value < SMALLEST:
            raise FloatingPointError("The gradients are not finite, however small the loss is scaled.")
        return sound

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` continues."""
        return {"value": self.value, "sound_steps": self.sound_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what state() gave."""
        self.value, self.sound_steps = float(state["value"]), int(state["sound_steps"])
