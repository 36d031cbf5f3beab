"""Small charts as inline SVG text, so that the report needs neither a script nor a picture file.

Bars, gauges and waveforms place things by percentage across and by pixels down: they fill whatever width the
page gives them and their text keeps its size on a phone. Colours are CSS classes of `report.css`, which knows
light and dark. Every chart carries its content in words for those who do not see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

ROW_PX = 36
CURVE_WIDTH, CURVE_HEIGHT = 340, 176
CURVE_LEFT, CURVE_RIGHT, CURVE_TOP, CURVE_BOTTOM = 40, 10, 12, 26
MAX_CURVE_POINTS = 240


@dataclass(frozen=True)
class Bar:
    """One row: a share in 0..1 with its interval (None where it is exact) and a CSS class for its kind."""

    label: str
    share: float
    interval: tuple[float, float] | None
    kind: str


def percent(share: float) -> str:
    """0.285 -> `28.5 %`."""
    return f"{100 * share:.1f} %"


def _across(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _svg(body: str, *, words: str, name: str, height: int) -> str:
    return (
        f'<svg class="{name}" role="img" aria-label="{escape(words)}" width="100%" height="{height}">'
        f"<title>{escape(words)}</title>{body}</svg>"
    )


def interval_bars(title: str, bars: Sequence[Bar], *, chance: float) -> str:
    """Horizontal bars from 0 to 100 %, each with its interval, and a dashed line at `chance`."""
    parts, words = [], []
    for row, bar in enumerate(bars):
        top = row * ROW_PX
        spread = f", {percent(bar.interval[0])} to {percent(bar.interval[1])}" if bar.interval else ""
        words.append(f"{bar.label} {percent(bar.share)}{spread}")
        parts.append(
            f'<text x="0" y="{top + 13}">{escape(bar.label)}</text>'
            f'<text class="value" x="100%" y="{top + 13}">{percent(bar.share)}</text>'
            f'<rect class="track" x="0" y="{top + 19}" width="100%" height="8" rx="2"/>'
            f'<rect class="{bar.kind}" x="0" y="{top + 19}" width="{_across(bar.share)}" height="8" rx="2"/>'
        )
        parts.append(_tick("chance", chance, top + 17, top + 29))
        if bar.interval:
            low, high = bar.interval
            parts.append(
                _span("halo", low, high, top + 23)
                + _span("whisker", low, high, top + 23)
                + _tick("whisker", low, top + 20, top + 26)
                + _tick("whisker", high, top + 20, top + 26)
            )
    bottom = len(bars) * ROW_PX
    parts.append(_axis(chance, bottom + 13))
    return _svg("".join(parts), words=f"{title}: {'; '.join(words)}", name="bars", height=bottom + 18)


def _tick(name: str, share: float, top: int, bottom: int) -> str:
    return f'<line class="{name}" x1="{_across(share)}" x2="{_across(share)}" y1="{top}" y2="{bottom}"/>'


def _span(name: str, low: float, high: float, y: int) -> str:
    return f'<line class="{name}" x1="{_across(low)}" x2="{_across(high)}" y1="{y}" y2="{y}"/>'


def _axis(chance: float, baseline: int) -> str:
    name = f'<text class="axis middle" x="{_across(chance)}" y="{baseline}">chance</text>'
    return (
        f'<text class="axis" x="0" y="{baseline}">0</text>{name if chance > 0.1 else ""}'
        f'<text class="axis middle" x="50%" y="{baseline}">50</text>'
        f'<text class="axis value" x="100%" y="{baseline}">100 %</text>'
    )


def gauge(share: float, interval: tuple[float, float], *, chance: float, goal: float) -> str:
    """One wide scale from 0 to 100 %: the score, its interval, chance and the pass mark."""
    words = (
        f"Score {percent(share)}, interval {percent(interval[0])} to {percent(interval[1])}, "
        f"chance {percent(chance)}, pass mark {percent(goal)}"
    )
    low, high = interval
    body = (
        '<rect class="track" x="0" y="26" width="100%" height="10" rx="5"/>'
        f'<rect class="range" x="{_across(low)}" y="26" width="{_across(high - low)}" height="10" rx="5"/>'
        + _tick("chance", chance, 20, 42)
        + _tick("goal", goal, 20, 42)
        + f'<circle class="model" cx="{_across(share)}" cy="31" r="8"/>'
        f'<text class="axis value" x="{_across(chance)}" y="14" dx="4">chance {100 * chance:.0f} %</text>'
        f'<text class="axis" x="{_across(goal)}" y="14" dx="-4">pass mark {100 * goal:.0f} %</text>'
        '<text class="axis" x="0" y="58">0 %</text><text class="axis value" x="100%" y="58">100 %</text>'
    )
    return _svg(body, words=words, name="gauge", height=64)


def waveform(samples: np.ndarray, *, words: str, bars: int = 72) -> str:
    """The envelope of a clip: `samples` (N,) in -1..1, loudest stretch at full height.

    The height is relative to the clip's own peak, so a faint clip can be seen too.
    """
    edges = np.linspace(0, len(samples), bars + 1).astype(int)
    peaks = [float(np.abs(samples[a:b]).max(initial=0.0)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    loudest = max(peaks) or 1.0
    body = ""
    for index, peak in enumerate(peaks):
        height = max(1.5, 34 * peak / loudest)
        left = 100 * (index + 0.15) / bars
        body += f'<rect x="{left:.2f}%" y="{18 - height / 2:.1f}" width="{70 / bars:.2f}%" '
        body += f'height="{height:.1f}" rx="1"/>'
    return _svg(body, words=words, name="wave", height=36)


def curve(title: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """One or more (name, [(step, value), ...]) lines over shared axes; the first is drawn strongest."""
    drawn = [(name, _thin(points)) for name, points in lines if points]
    if not drawn:
        return '<p class="quiet">No curve was recorded.</p>'
    values = [value for _, points in drawn for _, value in points]
    last_step = max(step for _, points in drawn for step, _ in points) or 1.0
    ticks = _nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = CURVE_LEFT + (CURVE_WIDTH - CURVE_LEFT - CURVE_RIGHT) * step / last_step
        y = CURVE_TOP + (CURVE_HEIGHT - CURVE_TOP - CURVE_BOTTOM) * (high - value) / (high - low)
        return x, y

    body, right = "", CURVE_WIDTH - CURVE_RIGHT
    for tick in ticks:
        y = place(0, tick)[1]
        body += f'<line class="rule" x1="{CURVE_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += f'<text class="axis value" x="{CURVE_LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>'
    floor = CURVE_HEIGHT - 8
    body += f'<text class="axis" x="{CURVE_LEFT}" y="{floor}">step 0</text>'
    body += f'<text class="axis value" x="{right}" y="{floor}">{last_step:g}</text>'
    for rank, (_, points) in enumerate(drawn):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        body += f'<polyline class="line line{rank}" points="{path}"/>'
    ends = "; ".join(f"{name} from {points[0][1]:.2f} to {points[-1][1]:.2f}" for name, points in drawn)
    words = escape(f"{title}: {ends}")
    return (
        f'<svg class="curve" role="img" aria-label="{words}" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}">'
        f"<title>{words}</title>{body}</svg>"
    )


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS points: means of equal stretches, first and last kept as they are."""
    if len(points) <= MAX_CURVE_POINTS:
        return list(points)
    stretches = np.array_split(np.asarray(points, dtype=np.float64), MAX_CURVE_POINTS)
    means = [(float(s[:, 0].mean()), float(s[:, 1].mean())) for s in stretches]
    return [points[0], *means, points[-1]]


def _nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high]; zero is included for positive values that come near it."""
    if 0 < low < 0.35 * high:
        low = 0.0
    raw = max(high - low, 1e-6) / count
    power = 10 ** np.floor(np.log10(raw))
    step = float(next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999))
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [round(k * step, 9) for k in range(first, max(last, first + 1) + 1)]
