"""How it learned: losses, and whether anything was heard while they fell."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from omni_model.artifacts import Checkpoint
from omni_model.evaluation import page
from omni_model.evaluation.charts import curve, percent
from omni_model.training.curve import CURVE_FILE
from omni_model.training.teaching import TRUTH

Points = list[tuple[float, float]]


def curves(learned: Sequence[tuple[str, str, Checkpoint]]) -> str:
    """The training loss of each stage that learned: its title, what its loss is, and what it made."""
    cards = []
    for title, what, checkpoint in learned:
        drawn = curve(title, [(what, read_loss(checkpoint))])
        note = f'<p class="note">{escape(what)}, nats per token</p>'
        cards.append(page.card(title, f"{checkpoint.steps:,} steps", drawn + note))
    return page.section("How it learned", "Training losses of the stages that learn.", page.grid(cards))


def listening(taught: Sequence[tuple[str, Checkpoint]]) -> str:
    """Of each stage that taught to hear: the gap that opened, first tokens, loudness, and text kept."""
    cards, rows = [], []
    for title, checkpoint in taught:
        found = read_truth(checkpoint.out)
        looks: list[dict[str, float]] = found["looks"]
        gaps = [(look["step"], look["gap"]) for look in looks]
        shares = [(look["step"], look["first_token_accuracy"]) for look in looks]
        drawn = curve(title, [("gap in nats", gaps), ("first token right, share", shares)])
        keys = page.legend(
            (("model", "gap, nats per token"), ("ablation-line", "first token of an answer right, share"))
        )
        cards.append(page.card(title, f"{len(looks)} looks", drawn + keys))
        last = looks[-1]
        gradients = [f"{value:.3g}" for name, value in sorted(last.items()) if name.endswith("_gradient")]
        rows.append(
            (
                title,
                f"{last['gap']:.2f}",
                percent(last["first_token_accuracy"]),
                f"{last['rms_ratio']:.2f}",
                ", ".join(gradients),
            )
        )
    heads = ("stage", "gap at the end", "first token right", "soft tokens / words, RMS", "gradient norms")
    return page.section(
        "Was it listening while it learned?",
        "On clips it does not learn from: how much higher is its loss when it hears somebody else's clip? "
        "A model that only guesses stays at zero, and its run is stopped half-way.",
        page.grid(cards)
        + page.details("At the last look", page.table(heads, rows))
        + _text_kept(taught[-1][1]),
    )


def _text_kept(checkpoint: Checkpoint) -> str:
    text = read_truth(checkpoint.out)["text"]
    if not text:
        return ""
    before, after = text["before"], text["after"]
    losses = f"{before['text_loss']:.3f} and {after['text_loss']:.3f}"
    words = f"Text without sound, before and after: loss {losses} nats per token"
    if "text_accuracy" in before:
        words += f", multiple choice {percent(before['text_accuracy'])} and {percent(after['text_accuracy'])}"
    return f'<p class="note">{escape(words)}.</p>'


def read_loss(checkpoint: Checkpoint) -> Points:
    """(step, loss) of a trained artifact's curve; lines without a loss are left out."""
    lines = json.loads((checkpoint.out / CURVE_FILE).read_text(encoding="utf-8"))
    return [(float(line["step"]), float(line["loss"])) for line in lines if "loss" in line]


def read_truth(directory: Path) -> dict[str, Any]:
    """`looks` and `text` of a taught artifact's payload."""
    return dict(json.loads((directory / TRUTH).read_text(encoding="utf-8")))
