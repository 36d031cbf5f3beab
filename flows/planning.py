"""Planning a named run, and its plan as a table for a terminal or the UI. Standard library only."""

from pathlib import Path

import omni_model
from flows.recipes import Run
from omni_model.storage import Store
from omni_model.telemetry import markdown_table
from tasks.fingerprint import CodeBase
from tasks.identity import Identifier
from tasks.planner import CURRENT, UNDECIDED, WILL_RUN, Planner, Step

MARKS = {CURRENT: "✓", WILL_RUN: "▸", UNDECIDED: "?"}


def plan(run: Run, store: Store) -> tuple[list[Step], Identifier]:
    """What the run would do, and the identifier that carrying it out must use."""
    code = CodeBase(Path(omni_model.__file__).parent.parent, memo=store.root / ".fingerprints.json")
    identifier = Identifier(code, run.recipe.seed)
    planner = Planner(store, identifier)
    run.flow(planner, run.recipe)
    return planner.steps, identifier


def nothing_to_do(steps: list[Step]) -> bool:
    """Whether every stage is current."""
    return all(step.status == CURRENT for step in steps)


def plan_summary(steps: list[Step]) -> str:
    """The plan in one line."""
    if nothing_to_do(steps):
        return "nothing to do"
    running, open_still = (sum(step.status == status for step in steps) for status in (WILL_RUN, UNDECIDED))
    follow = f", {open_still} more unless their inputs come out the same" if open_still else ""
    known_s = sum(step.predicted_s or 0 for step in steps if step.status != CURRENT)
    before = f"; all of them took {seconds(known_s)} before" if known_s else ""
    return f"{running} of {len(steps)} stages will run{follow}{before}"


def plan_rows(steps: list[Step]) -> list[list[str]]:
    """Mark, stage, status, key, prediction and reason of every step."""
    return [
        [
            MARKS[step.status],
            step.label,
            step.status,
            step.identity.key[:8] if step.identity else "",
            _prediction(step),
            "; ".join(step.why),
        ]
        for step in steps
    ]


def _prediction(step: Step) -> str:
    if step.predicted_s is None or step.status == CURRENT:
        return ""
    memory, size = step.predicted_memory_bytes or 0, step.predicted_bytes or 0
    return f"about {seconds(step.predicted_s)}, {memory / 2**30:.1f} GiB memory, {size / 2**20:.1f} MiB disk"


def seconds(value: float) -> str:
    """A duration as a person would say it."""
    if value < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def plan_markdown(steps: list[Step]) -> str:
    """The plan as a Markdown table."""
    return markdown_table(["", "stage", "status", "key", "earlier run", "why"], plan_rows(steps))


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; the last one is left ragged, empty columns are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table
    )
