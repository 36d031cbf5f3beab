"""A contest of `python -m tests.bench gpt`: contenders start, show that their work is the same, take turns.

Every contender is a process of its own (tests.bench.gpt_worker) that prepares once; then only one works at a
time. On a machine that others use too, CPU time is the fairer of the two clocks.
"""

import json
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.gpt_worker import Job
from tests.bench.measure import Companion, columns

PEAK_TFLOPS = {"5090": 209.5, "4090": 165.2, "3090": 71.0, "H100": 989.0, "H200": 989.0}  # dense bf16
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}  # of losses and logits; bf16 keeps 3 digits of a logit
CLOCKS = ("wall", "cpu")


@dataclass
class Entrant:
    """A contender and what was measured of it. The bars are what ours is to reach against this one.

    `equal`: "must" have our values, "may" differ (a narrower dtype: by how much is shown), or is "not" to be
    compared, being another model. `seconds` are those of each round by either clock.
    """

    name: str
    job: Job
    commit: str = ""  # nanochat's
    bar: str = ""
    memory_bar: str = ""
    equal: str = "must"
    greeting: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})
    memory_bytes: int = 0

    def median_s(self, clock: str) -> float:
        return statistics.median(self.seconds[clock])

    def difference(self, other: "Entrant") -> float:
        """The largest between their values; infinite where they have no equal number of numbers."""
        mine, theirs = self.greeting["values"], other.greeting["values"]
        gaps = [abs(a - b) for a, b in zip(mine, theirs, strict=False)]
        return (
            max(gaps, default=0.0) if len(mine) == len(theirs) and all(map(math.isfinite, gaps)) else math.inf
        )


@dataclass
class Contest:
    """Contenders for one piece of work. The first is ours, with which the others are compared.

    `per`: a repetition is so many of what the title names (0: nothing to time). `memory`: what the bytes that
    are measured are of.
    """

    title: str
    entrants: list[Entrant]
    per: int = 1
    memory: str = ""

    def run(self, rounds: int, trees: dict[str, Path]) -> None:
        """Fill in the entrants. `trees`: nanochat's source by commit. SystemExit when one does other work."""
        companions: list[Companion] = []
        try:
            for entrant in self.entrants:
                print(f"preparing {self.title}: {entrant.name}", file=sys.stderr)
                companions.append(_start(entrant.job, trees.get(entrant.commit)))
                entrant.greeting = companions[-1].greeting
                self._check(entrant)
            pairs = list(zip(self.entrants, companions, strict=True))
            for _ in range(rounds if self.per else 0):
                for entrant, companion in pairs:
                    answer = companion.ask("time")
                    for clock in CLOCKS:
                        entrant.seconds[clock].append(answer[clock])
            for entrant, companion in pairs if self.memory else []:
                entrant.memory_bytes = companion.ask("memory")["bytes"]
        finally:
            for companion in companions:
                companion.close()

    def _check(self, entrant: Entrant) -> None:
        apart = entrant.difference(self.entrants[0])
        if entrant.equal == "must" and apart > TOLERANCE[entrant.job.dtype]:
            sys.exit(f"{entrant.name} does not do the work of {self.entrants[0].name}: off by {apart:.2g}")

    def text(self) -> str:
        """The tables: by the clock, and by the byte."""
        tables = [self.title]
        if self.per:
            head = ("  ms", "wall", "min", "max", "CPU", "ours faster", "by CPU", "bar", "values differ", "")
            tables.append(columns([head, *map(self._time_line, self.entrants)]))
        if self.memory:
            head = (f"  {self.memory}", "MiB", "ours is", "bar")
            tables.append(columns([head, *map(self._memory_line, self.entrants)]))
        return "\n".join(tables)

    def _time_line(self, entrant: Entrant) -> tuple[str, ...]:
        wall, ours = entrant.seconds["wall"], self.entrants[0]
        times = [entrant.median_s("wall"), min(wall), max(wall), entrant.median_s("cpu")]
        ratios = [entrant.median_s(clock) / ours.median_s(clock) for clock in CLOCKS]
        return (
            entrant.name,
            *(f"{1000 * seconds / self.per:.2f}" for seconds in times),
            *(f"{ratio:.2f}x" for ratio in ratios),
            entrant.bar,
            f"{entrant.difference(ours):.1e}" if entrant.equal != "not" else "",
            _pace(entrant),
        )

    def _memory_line(self, entrant: Entrant) -> tuple[str, ...]:
        share = self.entrants[0].memory_bytes / entrant.memory_bytes
        return (entrant.name, f"{entrant.memory_bytes / 2**20:.1f}", f"{share:.2f}x", entrant.memory_bar)

    def record(self) -> dict[str, Any]:
        """What was measured, for the file."""
        rows = [
            {
                "name": each.name,
                "job": asdict(each.job),
                "seconds": each.seconds,
                "memory_bytes": each.memory_bytes,
                "bar": each.bar,
                "memory_bar": each.memory_bar,
                "values_differ": each.difference(self.entrants[0]) if each.equal != "not" else None,
                **{name: each.greeting[name] for name in ("last_loss", "card", "torch")},
            }
            for each in self.entrants
        ]
        return {"title": self.title, "per": self.per, "rows": rows}


def _start(job: Job, tree: Path | None) -> Companion:
    environment = dict(os.environ, NANOCHAT_DTYPE=job.dtype, OMP_NUM_THREADS=str(job.threads))
    if tree is not None:
        environment["PYTHONPATH"] = str(tree)
    return Companion([sys.executable, "-m", "tests.bench.gpt_worker", json.dumps(asdict(job))], environment)


def _pace(entrant: Entrant) -> str:
    """Of a training step: tokens per second, on a known card the share of its peak (MFU), the third loss."""
    job, told = entrant.job, entrant.greeting
    if job.work != "train":
        return ""
    tokens_per_s = job.rows * job.tokens / entrant.median_s("wall")
    peak = next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if name in told["card"]), None)
    share = f", MFU {tokens_per_s * told['flops_per_token'] / peak:.1%}" if peak else ""
    return f"{tokens_per_s:,.0f} tokens/s{share}, loss {told['last_loss']:.4f}"
