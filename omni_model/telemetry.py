"""What a stage tells: one JSON line per event while it runs, figures at its end, and tables of them.

`metrics.jsonl` always has everything. wandb, where a person wants it, is shown the same by `mirrored`.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_model import hardware
from omni_model.config import JSON, BadInput

if TYPE_CHECKING:
    import wandb

WANDB_PATIENCE_S = 60.0  # at the beginning and at the end; what did not get through then can be synced later


class Metrics:
    """Appends to `metrics.jsonl`. Lines carry a clock and therefore never belong to a payload."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._summary: dict[str, float | str] = {}
        self.mirror: Mirror | None = None

    def log(self, step: int, total: int, **values: float) -> None:
        """Progress: `step` of `total` is done; `values` are curves, such as `loss`."""
        line = {"time": round(time.time(), 3), "step": step, "total": total, **values}
        self._file.write(json.dumps(line) + "\n")
        if self.mirror is not None:
            self.mirror.log(step, values)

    def summary(self, **values: float | str) -> None:
        """Figures that stand for the whole stage; they go to the manifest and the closing table."""
        self._summary.update(values)
        if self.mirror is not None:
            self.mirror.summary(values)

    @property
    def summaries(self) -> dict[str, float | str]:
        """Every figure given to `summary`, the last value of each."""
        return dict(self._summary)


class Mirror:
    """A run of wandb. When it fails it is told nothing more, and the stage goes on."""

    def __init__(self, begin: "Callable[[], wandb.Run]") -> None:
        self._run: wandb.Run | None = None
        self._run = self._try(begin)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`."""
        if (run := self._run) is not None:
            self._try(lambda: run.log(dict(values), step=step))

    def summary(self, values: Mapping[str, float | str]) -> None:
        """Figures that stand for the whole stage."""
        if (run := self._run) is not None:
            self._try(lambda: run.summary.update(dict(values)))

    def finish(self, *, failed: bool) -> None:
        """End the run; waits for what is still on its way, within WANDB_PATIENCE_S."""
        if (run := self._run) is not None:
            self._try(lambda: run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever it is, training is worth more
            _tell(f"wandb failed and is told nothing more: {type(error).__name__}: {error}")
            self._run = None
            return None


@contextlib.contextmanager
def mirrored(metrics: Metrics, directory: Path, wish: str, *, project: str, settings: JSON) -> Iterator[None]:
    """While the block lasts, wandb is shown what `metrics` is told.

    Args:
        directory: the artifact's; what wandb writes goes to `wandb/` below it, and its name is the run's id,
            so that a stage that was killed goes on in the same run.
        wish: `Runtime.wandb`.
        settings: shown beside the curves; a recipe as plain JSON.

    Raises:
        BadInput: online or offline is wished for and wandb is not installed.
    """
    mode = hardware.wandb_mode()
    mode = mode if wish == "auto" else wish
    if mode in ("off", "disabled") or not _installed(wish):
        yield
        return
    import wandb

    offline = mode != "online"
    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        init_timeout=WANDB_PATIENCE_S,
        finish_timeout=WANDB_PATIENCE_S,
        x_save_requirements=False,
        x_disable_stats=offline,
        x_disable_machine_info=offline,
    )
    stage, key = directory.parent.name, directory.name
    metrics.mirror = Mirror(
        lambda: wandb.init(
            project=project,
            name=f"{stage} {key[:8]}",
            id=key,
            resume="allow",
            dir=directory,
            mode="offline" if offline else "online",
            config=settings,
            settings=quiet,
        )
    )
    failed = True
    try:
        yield
        failed = False
    finally:
        metrics.mirror.finish(failed=failed)
        metrics.mirror = None


def _installed(wish: str) -> bool:
    """Whether wandb can be imported. When only `auto` asks, a line in the log will do."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        missing = "wandb is not installed; `pip install wandb` for curves in a browser"
        if wish != "auto":
            raise BadInput(f"runtime.wandb is {wish} and {missing}, or set it to off") from None
        _tell(missing)
        return False
    return True


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
