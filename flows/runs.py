"""One run as a record: what its stages came to, its summary, its report, and the link to the latest.

`{store}/runs/{id}/` holds `summary.json`, `report.html` and what other pages the report has; `{store}/latest`
tells the newest. A run with nothing to do writes none: it points `latest` back at the record that tells it.
"""

import contextlib
import html
import json
import os
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_model.artifacts import Manifest, Report, Scores, write_atomically
from omni_model.storage import Store
from omni_model.telemetry import markdown_table
from tasks.planner import Step

SCHEMA = 1
VERDICT_COLUMNS = 100
PROVENANCE = "<!-- run provenance -->"  # where a report's page takes in the table of its run


@dataclass(frozen=True)
class StageRow:
    """One line of the closing table."""

    name: str
    key: str
    status: str
    seconds: float
    figure: str
    metrics: dict[str, Any]


def stage_row(step: Step, manifest: Manifest, computed: bool) -> StageRow:
    """What a finished stage came to. `seconds` is the time it took to compute, also when it was reused."""
    values = {**manifest.facts, **manifest.metrics}
    figure = step.stage.figure
    text = _short(values[figure]) if figure in values else ""
    if text and " " not in text:  # a sentence needs no name in front
        text = f"{figure.replace('_', ' ')} {text}"
    status = "computed" if computed else "reused"
    return StageRow(step.label, manifest.key, status, manifest.timings["seconds"], text, manifest.metrics)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def record(store: Store, recipe: str, wall_s: float, rows: list[StageRow], manifests: list[Manifest]) -> Path:
    """Write a run's summary and report and point `latest` at them. Returns the run's directory."""
    started = time.strftime("%Y%m%d-%H%M%S", time.gmtime(time.time() - wall_s))
    directory = store.root / "runs" / f"{started}-{recipe}-{os.getpid()}"
    directory.mkdir(parents=True)
    report = directory / "report.html"
    made = next(manifest for manifest in manifests if manifest.handle == Report.__name__)
    store.fetch(made.stage, made.key)
    for page in sorted((store.directory(made.stage, made.key) / "out").glob("*.html")):
        told = provenance(rows, manifests, wall_s) if page.name == report.name else ""
        write_atomically(directory / page.name, page.read_text().replace(PROVENANCE, told))
    summary = {
        "schema": SCHEMA,
        "recipe": recipe,
        "wall_s": round(wall_s, 2),
        **made.facts,
        "stages": [asdict(row) for row in rows],
        "audiobench_mini": audiobench_mini(store, manifests),
        "report": store.uri(report),
    }
    write_atomically(directory / "summary.json", json.dumps(summary, indent=1))
    store.announce(directory)
    return directory


def audiobench_mini(store: Store, manifests: list[Manifest]) -> dict[str, Any] | None:
    """The benchmark's part of the summary, or None where the run has no scores."""
    for manifest in manifests:
        if manifest.handle == Scores.__name__:
            store.fetch(manifest.stage, manifest.key)
            path = store.directory(manifest.stage, manifest.key) / "out" / "scores.json"
            return dict(json.loads(path.read_text()))
    return None


def provenance(rows: list[StageRow], manifests: list[Manifest], wall_s: float) -> str:
    """The run's stages, what they cost, on what they ran and with which recipes, as HTML."""
    lines = "".join(
        f"<tr><td>{html.escape(r.name)}</td><td>{r.status}</td><td class=number>{r.seconds:.1f} s</td>"
        f"<td>{html.escape(r.figure)}</td><td><code>{r.key[:8]}</code></td></tr>"
        for r in rows
    )
    recipes = {row.name: made.components.get("recipe") for row, made in zip(rows, manifests, strict=True)}
    told = html.escape(json.dumps(recipes, indent=1))
    return (
        "<section id=provenance><h2>How this run was made</h2>"
        f"<p>{len(rows)} stages, {wall_s:.0f} s of wall time. Seconds are the time each stage took to "
        f"compute, also where an earlier result was reused. {html.escape(_cost(rows, manifests))}</p>"
        "<div class=scroll><table>"
        "<thead><tr><th>stage</th><th>status</th><th>time</th><th>figure</th><th>key</th></tr>"
        f"</thead><tbody>{lines}</tbody></table></div>"
        f"<details><summary>Every recipe</summary><pre>{told}</pre></details></section>"
    )


def _cost(rows: list[StageRow], manifests: list[Manifest]) -> str:
    """How long which machine computed, what was reused of it, and the most memory that a stage took."""
    spent: dict[str, float] = {}
    for made in manifests:
        name = made.versions.get("machine", "a machine that was not noted")
        spent[name] = spent.get(name, 0.0) + made.timings["seconds"]
    reused = sum(row.seconds for row in rows if row.status == "reused")
    peak = max(made.timings["peak_memory_bytes"] for made in manifests) / 2**30
    machines = "; ".join(f"{took / 60:.1f} min on {name}" for name, took in spent.items())
    return (
        f"Computing took {machines}; {reused / 60:.1f} min of it were reused. "
        f"The largest stage took {peak:.1f} GiB."
    )


def settle(store: Store, recipe: str, wall_s: float, rows: list[StageRow], manifests: list[Manifest]) -> Path:
    """Record a finished run; one that computed nothing points `latest` back at the record it repeats."""
    if all(row.status == "reused" for row in rows):
        known = find_record(store, recipe, [row.key for row in rows])
        if known is not None:
            store.announce(known)
            return known
    return record(store, recipe, wall_s, rows, manifests)


def table_rows(rows: list[StageRow]) -> list[list[str]]:
    """Name, status, time and figure of every stage, as cells."""
    return [[r.name, r.status, f"{r.seconds:.1f}", r.figure] for r in rows]


def read_rows(directory: Path) -> list[StageRow]:
    """The stages of a recorded run."""
    summary = json.loads((directory / "summary.json").read_text())
    return [StageRow(**stage) for stage in summary["stages"]]


def verdict(directory: Path) -> str:
    """The run's result and what it means."""
    summary = json.loads((directory / "summary.json").read_text())
    return f"{summary['headline']}\n{textwrap.fill(summary['meaning'], VERDICT_COLUMNS)}"


TABLE_HEAD = ["stage", "status", "seconds", "figure"]


def rows_markdown(rows: list[StageRow]) -> str:
    """Every stage with all its metrics as a Markdown table."""
    cells = [
        [*line, ", ".join(f"{k} {_short(v)}" for k, v in r.metrics.items())]
        for line, r in zip(table_rows(rows), rows, strict=True)
    ]
    return markdown_table([*TABLE_HEAD, "metrics"], cells)


def find_record(store: Store, recipe: str, keys: list[str]) -> Path | None:
    """The newest recorded run of a recipe with exactly these stage keys."""
    for path in sorted((store.root / "runs").glob(f"*-{recipe}-*/summary.json"), reverse=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged record tells nothing
            if [stage["key"] for stage in json.loads(path.read_text())["stages"]] == keys:
                return path.parent
    return None
