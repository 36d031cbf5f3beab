"""What a straight line can read from frozen features: ridge classifiers on frames pooled over time.

A probe is the plainest reader there is, so what it finds was already there. It learns on the train split; the
strength of its regularisation is chosen on clips that are neither learned from nor scored.

Legend: T encoder frames, D feature width, N clips, P = 3 D pooled numbers, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PROBES = "probes.json"  # what an encoder that was taught here tells of itself, in its payload
RIDGE_STRENGTHS = tuple(10.0**power for power in range(-1, 6))


def pool(frames: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and maximum over time: frames (T, D) -> (3 D,) float64."""
    frames = frames.astype(np.float64)
    return np.concatenate([frames.mean(axis=0), frames.std(axis=0), frames.max(axis=0)])


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardised inputs: centre and spread (P,), weights (P + 1, K)."""

    centre: np.ndarray
    spread: np.ndarray
    weights: np.ndarray

    def scores(self, inputs: np.ndarray) -> np.ndarray:
        """One number per class, larger for the likelier: inputs (N, P) -> (N, K)."""
        scores: np.ndarray = ((inputs - self.centre) / self.spread) @ self.weights[:-1] + self.weights[-1]
        return scores


def fit_probe(
    inputs: np.ndarray, truth: np.ndarray, num_classes: int, chosen_on: tuple[np.ndarray, np.ndarray]
) -> LinearProbe:
    """The ridge classifier of inputs (N, P) with classes truth (N,) that does best on other clips.

    Args:
        chosen_on: inputs and truth by which the strength is chosen; where empty, the middle one is taken.
    """
    centre, spread = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    solutions = ridge((inputs - centre) / spread, np.eye(num_classes)[truth], RIDGE_STRENGTHS)
    probes = [LinearProbe(centre, spread, weights) for weights in solutions]
    others, others_truth = chosen_on
    if not len(others):
        return probes[len(probes) // 2]
    right = [int((probe.scores(others).argmax(axis=1) == others_truth).sum()) for probe in probes]
    # Of equally good strengths the largest: it moves least with noise.
    return probes[len(right) - 1 - int(np.argmax(right[::-1]))]


def probe_accuracies(
    clips: Sequence[Mapping[str, Any]], pooled: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Category -> share of validation clips whose label a probe of pooled frames reads rightly.

    Each half of the validation clips is scored by a probe whose strength the other half chose. Categories
    that only one of the two splits knows are left out.

    Args:
        clips: metadata of train and validation clips.
        pooled: what `pool` gave for each of them, by key.
    """
    accuracies = {}
    for category in sorted({category for clip in clips for category in clip["labels"]}):
        labelled = [clip for clip in clips if category in clip["labels"]]
        values = sorted({clip["labels"][category] for clip in labelled if clip["split"] == "train"})
        train, *halves = (
            _examples(
                [clip for clip in chosen if clip["labels"][category] in values], category, values, pooled
            )
            for chosen in _parts(labelled)
        )
        if not len(train[0]) or not all(len(inputs) for inputs, _ in halves):
            continue
        right = 0
        for scored, chosen_on in (halves, halves[::-1]):
            probe = fit_probe(*train, len(values), chosen_on)
            right += int((probe.scores(scored[0]).argmax(axis=1) == scored[1]).sum())
        accuracies[category] = round(right / sum(len(inputs) for inputs, _ in halves), 4)
    return accuracies


def _parts(clips: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The train clips, and every second validation clip from the first and from the second on."""
    validation = [clip for clip in clips if clip["split"] == "validation"]
    return [[clip for clip in clips if clip["split"] == "train"], validation[::2], validation[1::2]]


def _examples(
    clips: Sequence[Mapping[str, Any]],
    category: str,
    values: Sequence[str],
    pooled: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled frames (N, P) of clips and the numbers (N,) of their values."""
    truth = np.array([values.index(clip["labels"][category]) for clip in clips], dtype=np.int64)
    return np.array([pooled[clip["key"]] for clip in clips]), truth


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
