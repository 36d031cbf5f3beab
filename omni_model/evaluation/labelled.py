"""Clips whose labels are known, asked about each of them: somebody's recordings, or a foreign synthesizer's.

The questions are the grammar's first ones, with three wrong answers of the same category, put in every
rotation as in the benchmark. An answer is right where the likeliest option over all rotations is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_model.audio.clips import clip_rng
from omni_model.audio.reader import FeatureReader
from omni_model.audio.strange import FOREIGN
from omni_model.evaluation.answering import Listener
from omni_model.evaluation.benchmark_item import CHANCE, Item
from omni_model.evaluation.familiarity_known import Known
from omni_model.evaluation.scorers import ask
from omni_model.evaluation.statistics import wilson_interval
from omni_model.text.questions import askable, grammar, pick_options


def questions_about(key: str, labels: Mapping[str, str]) -> list[Item]:
    """One question for every label of a clip that the grammar has words for."""
    items = []
    for name, value in askable(labels).items():
        category = grammar().category(name)
        options = tuple(pick_options(name, value, clip_rng(0, f"{key}/{name}")))
        items.append(
            Item(
                id=f"{key}/{name}",
                group=category.group,
                category=name,
                clips=(key,),
                question=category.questions[0],
                options=options,
                answer=options.index(value),
                transcript="",
                licence="",
            )
        )
    return items


def score_labelled(listener: Listener, items: Sequence[Item], taught: Mapping[str, bool]) -> dict[str, Any]:
    """Accuracy in each category with its Wilson interval (95 %), and of the answers that are sure.

    Args:
        items: of `questions_about`; `listener` has the frames of their clips.
        taught: by clip key, whether it lies near enough to what was taught.
    """
    options = ask(items, listener.letters, [item.clips for item in items]).options
    right = options.argmax(axis=1) == np.array([item.answer for item in items])
    sure = np.array([taught.get(item.clips[0], True) for item in items])
    told = {}
    for name in dict.fromkeys(item.category for item in items):
        rows = np.array([item.category == name for item in items])
        told[name] = _share(right[rows]) | {"chance": CHANCE}
        if (rows & sure).any() and not sure[rows].all():
            told[name]["sure"] = _share(right[rows & sure])
    return told


def _share(right: np.ndarray) -> dict[str, Any]:
    return {
        "questions": len(right),
        "accuracy": round(float(right.mean()), 4),
        "ci95": wilson_interval(int(right.sum()), len(right)).rounded(),
    }


def score_foreign(listener: Listener, strange: FeatureReader, known: Known) -> dict[str, Any]:
    """What a listener understands of a synthesizer that it was not trained on.

    Args:
        listener: with the frames of `strange`.
        strange: features of a corpus by `synthesize_strange`.

    Returns:
        Accuracy by category, and how far the clips lie from training: mean and median, 1 being the limit.
    """
    clips = [clip for clip in strange.clips if clip["provenance"].get("kind") == FOREIGN]
    if not clips:
        return {}
    judged = known.judge([strange.frames(clip["key"]) for clip in clips])
    distances = [each.distance for each in judged]
    items = [item for clip in clips for item in questions_about(clip["key"], clip["labels"])]
    taught = {clip["key"]: each.is_taught for clip, each in zip(clips, judged, strict=True)}
    return {
        "clips": len(clips),
        "mean_distance": round(float(np.mean(distances)), 4),
        "median_distance": round(float(np.median(distances)), 4),
        "categories": score_labelled(listener, items, taught),
    }
