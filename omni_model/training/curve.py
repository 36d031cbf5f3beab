"""The loss of every step, as it goes into a payload: no clock, and the same after a kill."""

import json
from collections.abc import Iterable
from pathlib import Path

CURVE_FILE = "curve.json"


class LossCurve:
    """The loss of every update so far, in nats per learned token."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values: list[float] = []
        self.extend(values)

    def extend(self, values: Iterable[float]) -> None:
        """Note the losses of the next updates."""
        self.values += [round(value, 6) for value in values]

    @property
    def steps(self) -> int:
        """Updates made."""
        return len(self.values)

    def tail_mean(self, count: int = 20) -> float:
        """Mean of the last `count` losses."""
        last = self.values[-count:]
        return round(sum(last) / len(last), 4)

    def write(self, directory: Path, every: int = 5) -> None:
        """Write `curve.json`: every `every`-th step and the last, counted from 1."""
        steps = [s for s in range(1, self.steps + 1) if s % every == 0 or s in (1, self.steps)]
        curve = [{"step": step, "loss": self.values[step - 1]} for step in steps]
        (directory / CURVE_FILE).write_text(json.dumps(curve, sort_keys=True) + "\n")
