"""From verdicts to the numbers that are told: intervals, margins, groups, pairs, and whether it passed.

Everything follows from per-item scores alone. Items that share a clip are drawn together by the bootstrap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_model.artifacts import canonical_json
from omni_model.config import JSON
from omni_model.evaluation.benchmark_item import (
    GROUPS,
    MACRO_GROUPS,
    PAIR_CHANCE,
    PASS_MARK,
    Item,
    pairs_of,
)
from omni_model.evaluation.scorers import UNREADABLE, Verdicts, read_answer
from omni_model.evaluation.statistics import Bootstrap, holm, mcnemar_exact

NO_AUDIO, ABLATION, CEILING = "no_audio", "ablation", "ceiling"
UNHEARD, SHUFFLED = "no audio", "shuffled audio"


@dataclass(frozen=True)
class Baseline:
    """One score per item, (items,), and how much it may know.

    Attributes:
        chosen: the option that it takes, (items,), where it takes one.
        first: whether it is right in the options' own order, (items,), where it was asked in several.
    """

    kind: str
    scores: np.ndarray
    chosen: np.ndarray | None = None
    first: np.ndarray | None = None

    @classmethod
    def of(cls, kind: str, verdicts: Verdicts) -> "Baseline":
        """A baseline that answers as the model does."""
        return cls(kind, verdicts.scores, verdicts.options.argmax(axis=1), verdicts.correct[:, 0])


@dataclass(frozen=True)
class Answers:
    """What the model answers by each of the three scorers.

    Attributes:
        letters: the primary one.
        gains: likelihood of each option with the clips less that without, (items, options).
        texts: what it writes, one text an item.
    """

    letters: Verdicts
    gains: np.ndarray
    texts: Sequence[str]

    def written(self, items: Sequence[Item]) -> np.ndarray:
        """The options that the texts name, (items,); UNREADABLE where they name none."""
        return np.array([read_answer(t, item.options) for t, item in zip(self.texts, items, strict=True)])


def clusters_of(items: Sequence[Item]) -> np.ndarray:
    """A number for each item, (items,); those that share a clip, directly or through others, share it."""
    numbers = list(range(len(items)))
    first: dict[str, int] = {}
    for row, item in enumerate(items):
        for clip in item.clips:
            old, new = numbers[row], numbers[first.setdefault(clip, row)]
            numbers = [new if number == old else number for number in numbers]
    return np.array(numbers)


def summarise(
    items: Sequence[Item], answers: Answers, beside: Mapping[str, Baseline], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Everything `scores.json` holds."""
    heard = answers.letters
    clusters = clusters_of(items)

    def measured(scores: np.ndarray, rows: Sequence[int] | None = None) -> dict[str, Any]:
        picked = slice(None) if rows is None else list(rows)
        interval = bootstrap.interval(scores[picked], clusters[picked])
        return {"accuracy": round(float(scores[picked].mean()), 6), "ci95": interval.rounded()}

    def lead(over: np.ndarray, rows: Sequence[int] | None = None) -> dict[str, Any]:
        picked = slice(None) if rows is None else list(rows)
        interval = bootstrap.margin(heard.scores[picked], over[picked], clusters[picked])
        margin = float(heard.scores[picked].mean() - over[picked].mean())
        return {"margin": round(margin, 6), "margin_ci95": interval.rounded()}

    macro = {
        name: rows
        for name, parts in MACRO_GROUPS.items()
        if (rows := [row for row, item in enumerate(items) if item.group in parts])
    }
    guesses = {name: baseline.scores for name, baseline in beside.items() if baseline.kind == NO_AUDIO}
    best = max(guesses, key=lambda name: (guesses[name].mean(), name))
    margin = lead(guesses[best])
    accuracy = float(heard.scores.mean())
    right = np.array([item.answer for item in items])
    written = answers.written(items)
    per_group: dict[str, Any] = {}
    for name, rows in macro.items():
        over = lead(beside[SHUFFLED].scores, rows)
        per_group[name] = {
            **measured(heard.scores, rows),
            "n": len(rows),
            **lead(guesses[best], rows),
            "over_shuffled": over["margin"],
            "over_shuffled_ci95": over["margin_ci95"],
            "above_shuffled": over["margin_ci95"][0] > 0,
            "categories": _categories(items, rows, heard, measured),
        }
    return {
        "schema": 1,
        **measured(heard.scores),
        "strict": round(float(heard.strict.mean()), 6),
        "consistent": round(float(heard.consistent.mean()), 6),
        **margin,
        "margin_over": best,
        "passed": bool(accuracy >= PASS_MARK and margin["margin_ci95"][0] > 0),
        "groups": per_group,
        "parts": _parts(items, heard, beside[UNHEARD], measured),
        "baselines": {
            name: measured(b.scores)
            | {"kind": b.kind, "groups": {g: measured(b.scores, rows) for g, rows in macro.items()}}
            for name, b in beside.items()
        },
        "letters": dict(heard.letters),
        "scorers": {
            "letters": measured(heard.scores),
            "likelihood": measured((answers.gains.argmax(axis=1) == right).astype(np.float64)),
            "text": measured((written == right).astype(np.float64))
            | {"unreadable": int((written == UNREADABLE).sum())},
        },
        "pairs": _pairs(items, heard, bootstrap),
        "lures": _lures(items, heard),
        "mcnemar_p": _differs(heard, beside[UNHEARD]),
    }


def _categories(items: Sequence[Item], rows: Sequence[int], heard: Verdicts, measured: Any) -> dict[str, Any]:
    """Accuracy of what was asked in a macro group; a category of two of its groups is told for each."""
    asked: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        asked.setdefault((items[row].category, items[row].group), []).append(row)
    names = [category for category, _ in asked]
    return {
        f"{category} ({group})" if names.count(category) > 1 else category: measured(heard.scores, of)
        | {"n": len(of)}
        for (category, group), of in asked.items()
    }


def _parts(items: Sequence[Item], heard: Verdicts, unheard: Baseline, measured: Any) -> dict[str, Any]:
    """Each of the small groups, with the chance that it is not better than without audio: Holm over all."""
    rows_of = {
        group: rows
        for group in GROUPS
        if (rows := [row for row, item in enumerate(items) if item.group == group])
    }
    p_values = {group: _differs(heard, unheard, rows) for group, rows in rows_of.items()}
    adjusted = holm(p_values)
    return {
        group: {
            **measured(heard.scores, rows),
            "n": len(rows),
            "mcnemar_p": p_values[group],
            "holm_p": float(f"{adjusted[group]:.4g}"),
        }
        for group, rows in rows_of.items()
    }


def _differs(heard: Verdicts, unheard: Baseline, rows: Sequence[int] | None = None) -> float:
    """McNemar's p of the model against itself without audio."""
    # All rotations would count an item four times, so the exact test takes the order as written.
    picked = slice(None) if rows is None else list(rows)
    assert unheard.first is not None
    return float(f"{mcnemar_exact(heard.correct[:, 0][picked], unheard.first[picked]):.4g}")


def _pairs(items: Sequence[Item], heard: Verdicts, bootstrap: Bootstrap) -> dict[str, Any]:
    """How often both items of a pair are right, over all combinations of their four option orders."""
    both = np.array([heard.scores[one] * heard.scores[other] for one, other in pairs_of(items)])
    if not len(both):
        return {"n": 0}
    interval = bootstrap.interval(both).rounded()
    accuracy = round(float(both.mean()), 6)
    return {"n": len(both), "accuracy": accuracy, "ci95": interval, "chance": PAIR_CHANCE}


def _lures(items: Sequence[Item], heard: Verdicts) -> dict[str, Any]:
    """Of the items with a lure: how many there are, and in how many the lure was taken."""
    chosen = heard.options.argmax(axis=1)
    lured = [item.options[chosen[row]] == item.lure for row, item in enumerate(items) if item.lure]
    return {"n": len(lured), "followed": sum(lured)}


def answer_lines(items: Sequence[Item], answers: Answers, beside: Mapping[str, Baseline]) -> str:
    """One JSON object a line: what each scorer and each baseline took.

    `probabilities` are those of the letters scorer, `likelihood` are gains in nats per token; `chosen` is the
    primary verdict, `text_chosen` is null where the text names no option.
    """
    lines = []
    heard, written = answers.letters, answers.written(items)
    for row, item in enumerate(items):
        chosen = int(heard.options[row].argmax())
        gains = answers.gains[row]
        plain: dict[str, JSON] = {
            "id": item.id,
            "probabilities": _by_option(item, heard.options[row]),
            "chosen": item.options[chosen],
            "key": item.key,
            "right": chosen == item.answer,
            "right_rotations": int(heard.correct[row].sum()),
            "likelihood": _by_option(item, gains),
            "likelihood_chosen": item.options[int(gains.argmax())],
            "text": answers.texts[row],
            "text_chosen": None if written[row] == UNREADABLE else item.options[int(written[row])],
            "beside": {
                name: item.options[int(baseline.chosen[row])]
                for name, baseline in beside.items()
                if baseline.chosen is not None
            },
        }
        lines.append(canonical_json(plain))
    return "".join(f"{line}\n" for line in lines)


def _by_option(item: Item, values: np.ndarray) -> dict[str, JSON]:
    return {option: round(float(value), 4) for option, value in zip(item.options, values, strict=True)}
