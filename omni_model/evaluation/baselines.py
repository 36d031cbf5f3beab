"""What a score must be compared with: guesses that hear nothing, and a probe of what was there to hear.

Each baseline gives one score per item in 0..1, in the order of the items, so that every comparison with
the model can be paired. Kinds: `no_audio` knows the question but not the sound, `ablation` hears something
broken, `ceiling` bounds what the features hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_model.audio.probe import fit_probe, pool
from omni_model.audio.reader import FeatureReader
from omni_model.evaluation.benchmark_item import Item
from omni_model.text.questions import LETTERS, NOTHING

MAX_REPAIRS = 10_000
PROBE_CLIPS = 3000  # of a split at most; more make a straight line no straighter


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


# --- other clips ---------------------------------------------------------------------------------


def shuffled_clips(
    items: Sequence[Item], shuffles: int, seed: int, *, across: bool = False
) -> list[list[tuple[str, ...]]]:
    """For each shuffle, the clips every item hears: none of its own, but those of another item of its group.

    `across`: of another item of any group.
    """
    names = ["all" if across else item.group for item in items]
    drawn = []
    for number in range(shuffles):
        clips = [item.clips for item in items]
        for place, name in enumerate(dict.fromkeys(names)):
            rows = [row for row, other in enumerate(names) if other == name]
            own = [items[row].clips for row in rows]
            order = derange(own, np.random.default_rng([seed, number, place, int(across)]))
            for row, source in zip(rows, order, strict=True):
                clips[row] = own[source]
        drawn.append(clips)
    return drawn


def derange(clips: Sequence[tuple[str, ...]], rng: np.random.Generator) -> list[int]:
    """A random permutation p in which no place keeps a clip of its own: clips[p[i]] and clips[i] share none.

    Raises:
        ValueError: no such permutation was found, as when one clip fills more than half of the places.
    """
    order = [int(i) for i in rng.permutation(len(clips))]
    for _ in range(MAX_REPAIRS):
        kept = [place for place, source in enumerate(order) if set(clips[source]) & set(clips[place])]
        if not kept:
            return order
        first, second = kept[0], int(rng.integers(len(order)))
        order[first], order[second] = order[second], order[first]
    raise ValueError(
        f"{len(clips)} places with {len(set(clips))} different clips cannot all hear another clip"
    )


def silent_clips(items: Sequence[Item], silent: Sequence[str]) -> list[tuple[str, ...]]:
    """For each item as many silent clips as it has clips, taken in turn."""
    return [
        tuple(silent[(row + place) % len(silent)] for place in range(len(item.clips)))
        for row, item in enumerate(items)
    ]


# --- a probe -------------------------------------------------------------------------------------


def probe(items: Sequence[Item], features: FeatureReader) -> np.ndarray:
    """A linear classifier per category on pooled encoder features, answering among each item's options.

    Trained on the train split, its strength chosen on the validation split, used on the clip that each item
    asks about. Returns the indices (N,) of the options it takes.
    """
    pooled: dict[str, np.ndarray] = {}
    answers = np.zeros(len(items), dtype=np.int64)
    # A question that allows for silence is another question.
    asked = [(item.category, NOTHING in item.options) for item in items]
    for category, may_be_nothing in dict.fromkeys(asked):
        rows = [row for row, each in enumerate(asked) if each == (category, may_be_nothing)]
        labels = sorted({option for row in rows for option in items[row].options})
        clips = [items[row].clips[items[row].asked] for row in rows]
        scores = _probe_category(category, labels, clips, features, pooled)
        for row, score in zip(rows, scores, strict=True):
            answers[row] = int(np.argmax([score[labels.index(option)] for option in items[row].options]))
    return answers


def _probe_category(
    category: str,
    labels: list[str],
    clips: list[str],
    features: FeatureReader,
    pooled: dict[str, np.ndarray],
) -> np.ndarray:
    """Scores (len(clips), len(labels)) of the ridge classifier that does best on validation."""

    def read(key: str) -> np.ndarray:
        if key not in pooled:
            pooled[key] = pool(features.frames(key))
        return pooled[key]

    def labelled(split: str) -> tuple[np.ndarray, np.ndarray]:
        kept = [clip for clip in features.by_split(split) if _answer(clip, category) in labels]
        kept = kept[:: -(-len(kept) // PROBE_CLIPS) or 1]
        truth = np.array([labels.index(_answer(clip, category)) for clip in kept], dtype=np.int64)
        return np.array([read(clip["key"]) for clip in kept]), truth

    train, truth = labelled("train")
    if not len(train):
        return np.zeros((len(clips), len(labels)))
    reader = fit_probe(train, truth, len(labels), labelled("validation"))
    return reader.scores(np.array([read(clip) for clip in clips]))


def _answer(clip: Mapping[str, Any], category: str) -> str:
    """What is right about a clip: its label, or nothing where nobody says a word."""
    return str(clip["labels"].get(category, "" if clip["transcript"] else NOTHING))
