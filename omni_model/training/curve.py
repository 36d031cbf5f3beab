"""The loss of every step, as it goes into a payload: no clock, and the same after a kill."""

import json
from pathlib import Path

from torch import Tensor

CURVE_FILE = "curve.json"


class LossCurve:
    """Losses in step order. They stay tensors until someone reads them, so that a step need not wait."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._recent: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Note the loss of the next step."""
        self._recent.append(loss.detach())

    def values(self) -> list[float]:
        """Every loss so far, in nats per learned token."""
        self._losses += [round(float(loss), 6) for loss in self._recent]
        self._recent = []
        return list(self._losses)

    def restore(self, values: list[float]) -> None:
        """Go on after these."""
        self._losses, self._recent = list(values), []

    def tail_mean(self, count: int = 20) -> float:
        """Mean of the last `count` losses."""
        last = self.values()[-count:]
        return round(sum(last) / len(last), 4)

    def write(self, directory: Path, every: int = 5) -> None:
        """Write `curve.json`: every `every`-th step and the last, counted from 1."""
        values = self.values()
        steps = [step for step in range(1, len(values) + 1) if step % every == 0 or step in (1, len(values))]
        curve = [{"step": step, "loss": values[step - 1]} for step in steps]
        (directory / CURVE_FILE).write_text(json.dumps(curve, sort_keys=True) + "\n")
