"""What a stage tells: one JSON line per event while it runs, figures at its end, and tables of them."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path


class Metrics:
    """Appends to `metrics.jsonl`. Lines carry a clock and therefore never belong to a payload."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._summary: dict[str, float | str] = {}

    def log(self, step: int, total: int, **values: float) -> None:
        """Progress: `step` of `total` is done; `values` are curves, such as `loss`."""
        line = {"time": round(time.time(), 3), "step": step, "total": total, **values}
        self._file.write(json.dumps(line) + "\n")

    def summary(self, **values: float | str) -> None:
        """Figures that stand for the whole stage; they go to the manifest and the closing table."""
        self._summary.update(values)

    @property
    def summaries(self) -> dict[str, float | str]:
        """Every figure given to `summary`, the last value of each."""
        return dict(self._summary)


def read_progress(path: Path) -> dict[str, float] | None:
    """The newest whole line of a `metrics.jsonl`, or None before the first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):
        try:
            return dict(json.loads(line))
        except json.JSONDecodeError:
            continue
    return None


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown; a bar inside a cell would end it, so it becomes a slash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
