"""What a score must be compared with: guesses that hear nothing, and a probe of what was there to hear.

Each baseline gives one score per item in 0..1, in the order of the items, so that every comparison with
the model can be paired. Kinds: `no_audio` knows the question but not the sound, `ablation` hears something
broken, `ceiling` bounds what the features hold.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from omni_model.audio.features import FeatureReader
from omni_model.evaluation.benchmark import Item
from omni_model.text.questions import LETTERS

RIDGE_STRENGTHS = tuple(10.0**power for power in range(-1, 6))
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


def pool(frames: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and maximum over time: frames (T, D) -> (3 D,) float64."""
    frames = frames.astype(np.float64)
    return np.concatenate([frames.mean(axis=0), frames.std(axis=0), frames.max(axis=0)])


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
    centre, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    weights = ridge((train - centre) / spread, np.eye(len(labels))[truth], RIDGE_STRENGTHS)
    held_out, held_truth = labelled("validation")
    best = weights[len(weights) // 2]
    if len(held_out):
        guesses = [(((held_out - centre) / spread) @ w[:-1] + w[-1]).argmax(axis=1) for w in weights]
        right = [int((guess == held_truth).sum()) for guess in guesses]
        # Of equally good strengths the largest: it moves least with noise.
        best = weights[len(right) - 1 - int(np.argmax(right[::-1]))]
    asked = np.array([pooled[clip] for clip in clips])
    return ((asked - centre) / spread) @ best[:-1] + best[-1]


def ridge(inputs: np.ndarray, targets: np.ndarray, strengths: Sequence[float]) -> list[np.ndarray]:
    """Closed-form ridge regression for several strengths from one eigendecomposition.

    Args:
        inputs: (N, P), each column with mean 0.
        targets: (N, K).

    Returns:
        One (P + 1, K) array per strength; its last row is the intercept.
    """
    mean = targets.mean(axis=0)
    centred = targets - mean
    if inputs.shape[1] <= len(inputs):
        values, vectors = np.linalg.eigh(inputs.T @ inputs)
        left, right = vectors, vectors.T @ (inputs.T @ centred)
    else:  # fewer clips than dimensions: the dual problem is the smaller one
        values, vectors = np.linalg.eigh(inputs @ inputs.T)
        left, right = inputs.T @ vectors, vectors.T @ centred
    values = np.maximum(values, 0.0)[:, None]
    return [np.vstack([left @ (right / (values + strength)), mean]) for strength in strengths]
