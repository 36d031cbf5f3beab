"""Taking turns: every round runs each contender once, so that a slow moment of the machine hits all alike."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


class Companion:
    """A contender that is a process which stays: prepared once, it then works when told.

    It speaks first, in one line of JSON, `greeting`; then it answers every line with one.
    RuntimeError with the end of what it wrote to standard error when it leaves instead.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            words,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.greeting: dict[str, Any] = self._listen()

    def ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._listen()

    def close(self) -> None:
        """Send it away and wait until it is gone."""
        self._process.communicate()
        self._errors.close()

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._errors.seek(0)
        told = self._errors.read()[-2000:]
        raise RuntimeError(f"{self._process.args!r} left with {self._process.returncode}:\n{told}")


def table(rows: Sequence[Row]) -> str:
    """Median, spread and ratio of every contender."""
    lines = [("", "median", "min", "max", "ratio")]
    lines += [
        (r.name, f"{r.median_s:.3f} s", f"{min(r.seconds):.3f}", f"{max(r.seconds):.3f}", f"{r.ratio:.2f}x")
        for r in rows
    ]
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(c.rjust(w) for c, w in zip(line[1:], others, strict=True))])
        for line in lines
    )
