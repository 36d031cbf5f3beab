"""The picture of the embedding map: one panel per category, clips as dots, words as text."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN, HEIGHT_IN, DPI = 10.5, 4.1, 110
LABEL_WIDTH_PX, LABEL_GAP_PX = 58.0, 21.0  # words closer than this in both directions would overlap

INK = {"light": "#1b2228", "dark": "#e9e7e1"}
SOFT = {"light": "#56626c", "dark": "#a3adb4"}
LINE = {"light": "#dfdbd1", "dark": "#2b3237"}
GROUND = {"light": "#fffefb", "dark": "#181d20"}
# Answers that name a colour are drawn in it, made legible on either ground.
NAMED = {
    "red": "#d1495b",
    "green": "#4f9d5d",
    "blue": "#3f7fc4",
    "yellow": "#d9b23c",
    "black": "#4d545a",
    "white": "#f4f2ec",
    "orange": "#df7f35",
    "purple": "#8e62b5",
}
PALETTE = (
    "#138086",
    "#d1495b",
    "#c68a2b",
    "#7a6ac0",
    "#4f9d5d",
    "#b0568f",
    "#3f7fc4",
    "#8a7a5c",
    "#98a1a8",
    "#df7f35",
)


@dataclass(frozen=True)
class Panel:
    """A category, its answers, and the answer that holds for each clip ("" where none does)."""

    category: str
    options: Sequence[str]
    labels: Sequence[str]

    def colour(self, option: str) -> str:
        """What an answer is drawn in."""
        return NAMED.get(option, PALETTE[self.options.index(option) % len(PALETTE)])


def draw_map(
    panels: Sequence[Panel],
    words: Sequence[str],
    word_places: np.ndarray,
    clip_places: np.ndarray,
    explained: np.ndarray,
    ground: str,
) -> bytes:
    """A PNG on "light" or "dark" ground; places of words (M, K) and clips (N, K); the first two are drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, facecolor=GROUND[ground], layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0])
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, words, word_places, clip_places, ground)
    small: dict[str, Any] = {"color": SOFT[ground], "fontsize": 9}
    figure.supxlabel(f"first component of text ({explained[0]:.0%} of its variance)", **small)
    figure.supylabel(f"second component ({explained[1]:.0%})", **small)
    canvas.draw()  # fixes the layout, so that labels can be parted in pixels
    figure.set_layout_engine("none")
    for axis, panel in zip(axes, panels, strict=True):
        _write_answers(axis, panel, words, word_places, ground)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=GROUND[ground], metadata={"Software": None})
    return file.getvalue()


def _draw_panel(
    axis: "Axes",
    panel: Panel,
    words: Sequence[str],
    word_places: np.ndarray,
    clip_places: np.ndarray,
    ground: str,
) -> None:
    """Other words as faint crosses, clips as dots in the colour of their answer."""
    axis.set_facecolor(GROUND[ground])
    axis.set_title(panel.category, color=INK[ground], fontsize=11, fontweight="bold", loc="left")
    axis.tick_params(colors=SOFT[ground], labelsize=7, length=0)
    axis.grid(color=LINE[ground], linewidth=0.6)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_color(LINE[ground])
    others = [row for row, word in enumerate(words) if word not in panel.options]
    axis.scatter(*word_places[others, :2].T, marker="+", s=22, linewidths=0.9, color=SOFT[ground], alpha=0.55)
    heard = [row for row, label in enumerate(panel.labels) if label]
    axis.scatter(
        *clip_places[heard, :2].T,
        s=26,
        c=[panel.colour(panel.labels[row]) for row in heard],
        edgecolors=SOFT[ground],
        linewidths=0.5,
        alpha=0.85,
    )
    axis.margins(0.12)


def _write_answers(
    axis: "Axes", panel: Panel, words: Sequence[str], word_places: np.ndarray, ground: str
) -> None:
    """Answers of the category as words at their place, moved apart vertically where they would overlap."""
    rows = [row for row, word in enumerate(words) if word in panel.options]
    pixels = axis.transData.transform(word_places[rows, :2])
    moved = part_labels(pixels, LABEL_WIDTH_PX, LABEL_GAP_PX)
    back = axis.transData.inverted().transform(moved)
    for row, place in zip(rows, back, strict=True):
        axis.annotate(
            words[row],
            xy=word_places[row, :2],
            xytext=place,
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=INK[ground],
            bbox={
                "boxstyle": "round,pad=0.22",
                "fc": GROUND[ground],
                "ec": panel.colour(words[row]),
                "lw": 1.6,
            },
            arrowprops={"arrowstyle": "-", "color": SOFT[ground], "lw": 0.6},
        )


def part_labels(places: np.ndarray, width: float, gap: float) -> np.ndarray:
    """Places (N, 2), pushed up along the second axis until none within `width` are closer than `gap`."""
    moved = places.astype(np.float64).copy()
    order = np.lexsort((moved[:, 0], moved[:, 1]))
    for rank, row in enumerate(order):
        near = [other for other in order[:rank] if abs(moved[other, 0] - moved[row, 0]) < width]
        for other in sorted(near, key=lambda index: moved[index, 1]):
            if abs(moved[row, 1] - moved[other, 1]) < gap:
                moved[row, 1] = moved[other, 1] + gap
    return moved
