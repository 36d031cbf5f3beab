"""Taking turns: every round runs each contender once, so that a slow moment of the machine hits all alike."""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One contender: seconds of every round, and its median over the first contender's."""

    name: str
    seconds: list[float]
    median_s: float
    ratio: float


def interleave(contenders: Mapping[str, Callable[[], None]], rounds: int) -> list[Row]:
    """Time every contender `rounds` times in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    return [Row(name, seconds[name], medians[name], medians[name] / first) for name in contenders]


def command(words: Sequence[str], environment: Mapping[str, str]) -> Callable[[], None]:
    """A contender that is a whole process."""

    def run() -> None:
        subprocess.run(words, env=dict(environment), check=True, stdout=subprocess.DEVNULL)

    return run


def table(rows: Sequence[Row]) -> str:
    """Median, spread and ratio of every contender."""
    lines = [("", "median", "min", "max", "ratio")]
    lines += [
        (r.name, f"{r.median_s:.3f} s", f"{min(r.seconds):.3f}", f"{max(r.seconds):.3f}", f"{r.ratio:.2f}x")
        for r in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
