"""The report in short, as Markdown with its pictures inside: what the Prefect UI shows of a run."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from omni_model.evaluation.charts import CURVE_HEIGHT, CURVE_WIDTH, curve, percent
from omni_model.telemetry import markdown_table

# The page's stylesheet is not at hand where Markdown is shown, so a picture brings what it needs.
CURVE_STYLE = (
    "<style>svg{background:#fff}text{font:11px sans-serif;fill:#56626c}.value{text-anchor:end}"
    ".rule{stroke:#dfdbd1}.line{fill:none;stroke:#0b6e74;stroke-width:2}</style>"
)


def score_table(scores: Mapping[str, Any]) -> str:
    """The model and every baseline, overall and by group, with the overall interval."""
    groups = sorted(scores["groups"])
    rows = [_score_row("**this model**", scores, groups)]
    by_kind = sorted(scores["baselines"].items(), key=lambda pair: pair[1]["kind"], reverse=True)
    rows += [_score_row(f"{name} ({one['kind']})", one, groups) for name, one in by_kind]
    return markdown_table(["", "all questions", "interval", *groups], rows)


def _score_row(name: str, scores: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    low, high = scores["ci95"]
    shares = [percent(scores["groups"][group]["accuracy"]) for group in groups]
    return [name, percent(scores["accuracy"]), f"{100 * low:.1f} to {100 * high:.1f}", *shares]


def inline_png(title: str, content: bytes) -> str:
    """A PNG as an image inside the text."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(content).decode()})"


def inline_curve(title: str, name: str, points: Sequence[tuple[float, float]]) -> str:
    """A curve of (step, value) points as an image inside the text, under its title."""
    if not points:
        return f"{title} ({name}): no curve was recorded"
    alone = f'<svg xmlns="http://www.w3.org/2000/svg" width="{CURVE_WIDTH}" height="{CURVE_HEIGHT}" '
    svg = curve(title, [(name, points)]).replace("<svg ", alone, 1)
    head, end, body = svg.partition(">")
    picture = base64.b64encode(f"{head}{end}{CURVE_STYLE}{body}".encode()).decode()
    return f"{title} ({name})\n\n![{title}](data:image/svg+xml;base64,{picture})"
