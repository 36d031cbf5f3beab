"""What the listener does not know, and whether it says so."""

from html import escape

from omni_model.artifacts import Familiarity
from omni_model.evaluation import page
from omni_model.evaluation.charts import Bar, interval_bars, percent
from omni_model.evaluation.familiarity import read_familiarity

MAY_BE_MARKED = 0.05  # of the clips that are like what was taught
NAMES = {"music": "music", "words": "words never taught", "noise": "foreign noise"}


def out_of_range(familiarity: Familiarity) -> str:
    """The share of strange sounds and of known ones that is marked "not sure", and a foreign synthesizer."""
    found = read_familiarity(familiarity.out)
    bars = [
        Bar(NAMES.get(kind, kind), one["marked"], tuple(one["ci95"]), "model")
        for kind, one in found["strange"].items()
    ]
    if known := found["in_range"]:
        bars.append(Bar("test clips, as taught", known["marked"], tuple(known["ci95"]), "no_audio"))
    drawn = interval_bars("marked", bars, chance=MAY_BE_MARKED)
    cards = [page.card('Marked "not sure"', "the dashed line: 5 %, what may be of the known", drawn)]
    note = ""
    if foreign := found["foreign"]:
        rows = [
            (
                name,
                str(one["questions"]),
                percent(one["accuracy"]),
                f"{100 * one['ci95'][0]:.0f} to {100 * one['ci95'][1]:.0f}",
            )
            for name, one in foreign["categories"].items()
        ]
        heads = ("another synthesizer says", "questions", "right", "interval")
        heard = page.table(heads, rows)
        cards.append(page.card("A synthesizer it never met", f"{foreign['clips']} clips", heard))
        note = (
            f"Guessing is right in 25 %. The foreign clips lie {foreign['median_distance']:.2f} times as far "
            "from training as the limit from which the listener is not sure (median)."
        )
    return page.section(
        "What it does not know",
        "A model asked about a sound that it was never taught answers all the same. So what it hears is "
        "compared with what it was taught, and far from that it says that it is not sure.",
        page.grid(cards, wide=True) + (f'<p class="note">{escape(note)}</p>' if note else ""),
    )
