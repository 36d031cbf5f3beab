"""What a person sees while stages run: one live line per stage in a terminal, plain lines anywhere else."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from flows.planning import MARKS, seconds
from tasks.execute import Outcome
from tasks.planner import CURRENT, Step

REFRESH_PER_S = 8
BAR_CELLS = 24


def tell(line: str) -> None:
    """A line of progress. Standard output is for results."""
    sys.stderr.write(f"{line}\n")  # in one piece: several stages tell at once
    sys.stderr.flush()


def _how(outcome: Outcome) -> str:
    return f"computed in {seconds(outcome.manifest.timings['seconds'])}" if outcome.computed else "reused"


class PlainDisplay:
    """A line when a stage starts, waits or ends: for pipes, logs and CI."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def waiting(self, label: str, holder: str) -> None:
        tell(f"{label}: waiting, held by {holder}")

    def started(self, label: str) -> None:
        tell(f"{label}: started")

    def progressed(self, label: str, progress: dict[str, float]) -> None:
        """Nothing: a line for every step would drown the rest."""

    def finished(self, label: str, outcome: Outcome) -> None:
        if label not in self._told:
            self._told.add(label)
            tell(f"{label}: {_how(outcome)}")

    def failed(self, label: str, error: Exception) -> None:
        tell(f"{label}: failed")


class LiveDisplay(PlainDisplay):
    """One line per stage, redrawn in place."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._texts = {step.label: "reused" if step.status == CURRENT else "" for step in steps}
        self._marks = {step.label: MARKS[CURRENT] if step.status == CURRENT else "·" for step in steps}
        self._begun: dict[str, float] = {}
        self._progress: dict[str, dict[str, float]] = {}

    def waiting(self, label: str, holder: str) -> None:
        self._set(label, "…", f"waiting, held by {holder}")

    def started(self, label: str) -> None:
        self._begun[label] = time.monotonic()
        self._set(label, "▸", "starting")

    def progressed(self, label: str, progress: dict[str, float]) -> None:
        self._progress[label] = progress

    def finished(self, label: str, outcome: Outcome) -> None:
        self._begun.pop(label, None)
        self._set(label, MARKS[CURRENT], _how(outcome))

    def failed(self, label: str, error: Exception) -> None:
        self._begun.pop(label, None)
        self._set(label, "✗", "failed; waiting for what is still running")

    def _set(self, label: str, mark: str, text: str) -> None:
        with self._lock:
            self._marks[label], self._texts[label] = mark, text

    def lines(self) -> str:
        """The whole picture as text."""
        width = max(map(len, self._texts), default=0)
        with self._lock:
            return "\n".join(f" {self._marks[k]} {k.ljust(width)}  {self._line(k)}" for k in self._texts)

    def _line(self, label: str) -> str:
        begun = self._begun.get(label)
        if begun is None:
            return self._texts[label]
        elapsed = f"{time.monotonic() - begun:4.0f} s"
        progress = self._progress.get(label, {})
        if not progress.get("total"):
            return f"{elapsed}  {self._texts[label]}"
        share = progress["step"] / progress["total"]
        bar = "━" * round(share * BAR_CELLS) + "╌" * (BAR_CELLS - round(share * BAR_CELLS))
        curves = "  ".join(f"{k} {v:.3g}" for k, v in progress.items() if k not in ("time", "step", "total"))
        return f"{elapsed}  {bar} {share:4.0%}  {curves}"


@contextlib.contextmanager
def display(steps: list[Step]) -> Iterator[PlainDisplay]:
    """A live display where standard error is a terminal, else a plain one."""
    if not sys.stderr.isatty():
        yield PlainDisplay()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    shown = LiveDisplay(steps)
    with Live(
        console=Console(stderr=True),
        get_renderable=lambda: Text(shown.lines()),
        refresh_per_second=REFRESH_PER_S,
        transient=True,
    ):
        yield shown
