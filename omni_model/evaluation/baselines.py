"""What a score must be compared with: guesses that hear nothing, and a probe of what was there to hear.

Each baseline gives one score per item in 0..1, in the order of the items, so that every comparison with
the model can be paired. Kinds: `no_audio` knows the question but not the sound, `ablation` hears something
broken, `ceiling` bounds what the features hold.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from omni_model.audio.probe import fit_probe, pool
from omni_model.audio.reader import FeatureReader
from omni_model.evaluation.benchmark import Item
from omni_model.text.questions import LETTERS

MAX_REPAIRS = 10_000


def guess_blindly(items: Sequence[Item]) -> np.ndarray:
    """The expected score of a fair guess: 1/4 for every item. Returns (N,)."""
    return np.full(len(items), 1 / len(LETTERS))


def guess_one_letter(items: Sequence[Item]) -> np.ndarray:
    """Always the letter that is the key most often, in the items' own order of options. Returns (N,)."""
    keys = np.array([item.answer for item in items])
    return (keys == np.bincount(keys, minlength=len(LETTERS)).argmax()).astype(np.float64)


def guess_longest(items: Sequence[Item]) -> np.ndarray:
    """The longest option; equally long ones share the credit. Returns (N,)."""
    scores = np.zeros(len(items))
    for row, item in enumerate(items):
        longest = max(map(len, item.options))
        tied = [index for index, option in enumerate(item.options) if len(option) == longest]
        scores[row] = (item.answer in tied) / len(tied)
    return scores


def derange(clips: Sequence[str], rng: np.random.Generator) -> list[int]:
    """A random permutation p in which no place keeps its own clip: clips[p[i]] != clips[i] for every i.

    Raises:
        ValueError: no such permutation was found, as when one clip fills more than half of the places.
    """
    order = [int(i) for i in rng.permutation(len(clips))]
    for _ in range(MAX_REPAIRS):
        kept = [place for place, source in enumerate(order) if clips[source] == clips[place]]
        if not kept:
            return order
        first, second = kept[0], int(rng.integers(len(order)))
        order[first], order[second] = order[second], order[first]
    raise ValueError(
        f"{len(clips)} places with {len(set(clips))} different clips cannot all hear another clip"
    )


def probe(items: Sequence[Item], features: FeatureReader) -> np.ndarray:
    """A linear classifier per category on pooled encoder features, answering among each item's options.

    Trained on the train split, its strength chosen on the validation split, used on the test clips of the
    items. Returns (N,), 1 where its answer is right.
    """
    pooled = {clip["key"]: pool(features.frames(clip["key"])) for clip in features.clips}
    scores = np.zeros(len(items))
    for category in dict.fromkeys(item.category for item in items):
        asked = [row for row, item in enumerate(items) if item.category == category]
        labels = sorted({option for row in asked for option in items[row].options})
        answers = _probe_category(category, labels, [items[row].clip for row in asked], features, pooled)
        for row, answer in zip(asked, answers, strict=True):
            places = [labels.index(option) for option in items[row].options]
            scores[row] = int(np.argmax(answer[places])) == items[row].answer
    return scores


def _probe_category(
    category: str,
    labels: list[str],
    clips: list[str],
    features: FeatureReader,
    pooled: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Scores (len(clips), len(labels)) of the ridge classifier that does best on validation."""

    def labelled(split: str) -> tuple[np.ndarray, np.ndarray]:
        kept = [clip for clip in features.by_split(split) if clip["labels"].get(category) in labels]
        truth = np.array([labels.index(clip["labels"][category]) for clip in kept], dtype=np.int64)
        return np.array([pooled[clip["key"]] for clip in kept]), truth

    train, truth = labelled("train")
    if not len(train):
        return np.zeros((len(clips), len(labels)))
    reader = fit_probe(train, truth, len(labels), labelled("validation"))
    return reader.scores(np.array([pooled[clip] for clip in clips]))
