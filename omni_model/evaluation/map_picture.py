"""The picture of the map: a column per depth, a row per category, clips as dots, words as text."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN, ROW_IN, TITLE_IN, DPI = 10.5, 2.2, 0.3, 110
NUM_COLOURS = 256
LABEL_WIDTH_PX, LABEL_GAP_PX = 48.0, 17.0  # words closer than this in both directions would overlap

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
    "white": "#d8d3c5",
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


@dataclass(frozen=True)
class Plot:
    """Where words (M, K) and clips (N, K) lie in a plane, and the shares of variance it explains (K,)."""

    words: np.ndarray
    clips: np.ndarray
    explained: np.ndarray


def draw_map(
    panels: Sequence[Panel],
    words: Sequence[tuple[str, str]],
    columns: Mapping[str, Mapping[str, Plot]],
    ground: str,
) -> bytes:
    """A PNG on "light" or "dark" ground: a column a depth, a row a category, the first two components.

    The rows of categories are drawn in the plane that was fitted on text; a last row shows all clips and all
    words in the plane of both.

    Args:
        words: (category, answer) in the order of the places.
        columns: name of a depth -> its plots `text` and `joint`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    num_rows = len(panels) + 1
    height = ROW_IN * num_rows + TITLE_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, facecolor=GROUND[ground])
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.03, right=0.995, bottom=0.01, top=1 - TITLE_IN / height, wspace=0.03, hspace=0.09
    )
    for column, (name, plots) in enumerate(columns.items()):
        for row, panel in enumerate(panels):
            _dress(axes[row, column], panel.category if column == 0 else "", ground)
            _draw_panel(axes[row, column], panel, words, plots["text"], ground)
            axes[row, column].sharex(axes[0, column])
            axes[row, column].sharey(axes[0, column])
        _dress(axes[-1, column], "clips and words" if column == 0 else "", ground)
        _draw_both(axes[-1, column], plots["joint"], ground)
        axes[0, column].set_title(
            f"{name}  ({_shares(plots['text'])})", color=INK[ground], fontsize=10, loc="left"
        )
        axes[-1, column].set_title(_shares(plots["joint"]), color=SOFT[ground], fontsize=8, loc="left")
    for column, plots in enumerate(columns.values()):
        for row, panel in enumerate(panels):
            _write_answers(axes[row, column], panel, words, plots["text"], ground)
    file = io.BytesIO()
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(NUM_COLOURS).save(file, format="png", optimize=True)  # a quarter of the bytes
    return file.getvalue()


def _shares(plot: Plot) -> str:
    return " + ".join(f"{share:.0%}" for share in plot.explained[:2])


def _dress(axis: "Axes", name: str, ground: str) -> None:
    axis.set_facecolor(GROUND[ground])
    axis.set_ylabel(name, color=INK[ground], fontsize=10, fontweight="bold")
    axis.tick_params(length=0, labelbottom=False, labelleft=False)  # no unit, so no numbers
    axis.grid(color=LINE[ground], linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(0.12)
    for side in axis.spines.values():
        side.set_color(LINE[ground])


def _draw_panel(
    axis: "Axes", panel: Panel, words: Sequence[tuple[str, str]], plot: Plot, ground: str
) -> None:
    """Other words as faint crosses, clips as dots in the colour of their answer."""
    others = [row for row, (category, _) in enumerate(words) if category != panel.category]
    axis.scatter(*plot.words[others, :2].T, marker="+", s=16, linewidths=0.8, color=SOFT[ground], alpha=0.5)
    heard = [row for row, label in enumerate(panel.labels) if label]
    axis.scatter(
        *plot.clips[heard, :2].T,
        s=18,
        c=[panel.colour(panel.labels[row]) for row in heard],
        edgecolors=SOFT[ground],
        linewidths=0.4,
        alpha=0.85,
    )


def _draw_both(axis: "Axes", plot: Plot, ground: str) -> None:
    """Clips as dots and words as crosses, whatever they say."""
    axis.scatter(
        *plot.clips[:, :2].T, s=18, color=PALETTE[0], edgecolors=SOFT[ground], linewidths=0.4, alpha=0.85
    )
    axis.scatter(*plot.words[:, :2].T, marker="+", s=28, linewidths=1.1, color=PALETTE[1])


def _write_answers(
    axis: "Axes", panel: Panel, words: Sequence[tuple[str, str]], plot: Plot, ground: str
) -> None:
    """Answers of the category as words at their place, moved apart vertically where they would overlap."""
    rows = [row for row, (category, _) in enumerate(words) if category == panel.category]
    axis.get_xlim(), axis.get_ylim()  # settles the limits, so that labels can be parted in pixels
    pixels = axis.transData.transform(plot.words[rows, :2])
    moved = part_labels(pixels, LABEL_WIDTH_PX, LABEL_GAP_PX)
    back = axis.transData.inverted().transform(moved)
    for row, place in zip(rows, back, strict=True):
        word = words[row][1]
        axis.annotate(
            word,
            xy=plot.words[row, :2],
            xytext=place,
            ha="center",
            va="center",
            fontsize=7,
            fontweight="bold",
            color=INK[ground],
            bbox={"boxstyle": "round,pad=0.18", "fc": GROUND[ground], "ec": panel.colour(word), "lw": 1.3},
            arrowprops={"arrowstyle": "-", "color": SOFT[ground], "lw": 0.5},
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
