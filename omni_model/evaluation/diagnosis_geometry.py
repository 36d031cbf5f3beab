"""How clouds of points lie to each other: principal components, cluster numbers, and who finds whom.

Two dimensions may hide what all of them hold; therefore every number is taken in the full space, and every
clip is left out of its own centroid.

Legend: N clips, M words or texts, C width, K components.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni_model.config import JSON, BadInput
from omni_model.evaluation.statistics import wilson_interval
from omni_model.text.questions import grammar

Word = tuple[str, str]  # a category and one of its answers
RANKS = (1, 10)


@dataclass(frozen=True)
class Plane:
    """Principal components: mean (C,), axes (K, C) of unit length, shares of variance explained (K,)."""

    mean: np.ndarray
    axes: np.ndarray
    explained: np.ndarray

    def project(self, points: np.ndarray) -> np.ndarray:
        """(N, C) -> (N, K)."""
        return np.asarray((points - self.mean) @ self.axes.T)


def fit_plane(clouds: Sequence[np.ndarray], components: int) -> Plane:
    """Principal components of one or more clouds (N, C), each cloud counting as much as any other.

    Each axis is turned so that its largest coordinate is positive.

    Raises:
        BadInput: fewer points or dimensions than components.
    """
    points = np.concatenate(clouds)
    most = min(len(points) - 1, points.shape[1])
    if not 2 <= components <= most:
        raise BadInput(f"diagnosis.components is {components}; use 2 to {most}")
    weights = np.concatenate([np.full(len(cloud), 1 / (len(cloud) * len(clouds))) for cloud in clouds])
    mean = weights @ points
    spread = np.sqrt(weights)[:, None] * (points - mean)
    _, singular, axes = np.linalg.svd(spread, full_matrices=False)
    axes = axes[:components]
    signs = np.sign(axes[np.arange(components), np.abs(axes).argmax(axis=1)])
    return Plane(mean, axes * signs[:, None], (singular**2 / (singular**2).sum())[:components])


def modality_gap(audio: np.ndarray, text: np.ndarray) -> float:
    """Distance of the two centroids over the mean distance of points to their own centroid."""
    centres = [points.mean(axis=0) for points in (audio, text)]
    radii = [np.linalg.norm(p - c, axis=1).mean() for p, c in zip((audio, text), centres, strict=True)]
    return float(np.linalg.norm(centres[0] - centres[1]) / max(np.mean(radii), 1e-12))


def category_numbers(
    audio: np.ndarray, labels: Sequence[Mapping[str, str]], words: Mapping[Word, np.ndarray]
) -> dict[str, JSON]:
    """Cluster numbers per category over the clips that carry its label.

    `word_match`: share of clips nearest to their own word, both seen from the middle of their kind.
    """
    found: dict[str, JSON] = {}
    for name, category in grammar().categories.items():
        rows = [row for row, label in enumerate(labels) if name in label]
        truth = np.array([category.options.index(labels[row][name]) for row in rows], dtype=np.int64)
        if len(rows) < 2 or len(set(truth)) < 2 or np.bincount(truth)[truth].min() < 2:
            continue
        points = audio[rows]
        vocabulary = np.stack([words[name, option] for option in category.options])
        nearest = cosines(points - audio.mean(axis=0), vocabulary - vocabulary.mean(axis=0)).argmax(axis=1)
        found[name] = {
            "n": len(rows),
            "chance": round(1 / len(category.options), 4),
            **centroid_numbers(points, truth),
            "word_match": round(float((nearest == truth).mean()), 4),
        }
    return found


def centroid_numbers(points: np.ndarray, truth: np.ndarray) -> dict[str, JSON]:
    """How well labels `truth` (N,) part `points` (N, C); every label needs at least two points.

    `centroid_accuracy`: share of points nearest to the centroid of their own label, itself left out.
    `separation`: mean of (b - a) / max(a, b) with a the distance to the own centroid and b to the nearest
    other one, in -1..1 (a silhouette on centroids; P. Rousseeuw, J. Comput. Appl. Math. 20, 1987).
    """
    names, own = np.unique(truth, return_inverse=True)
    members = np.eye(len(names))[own]
    counts = members.sum(axis=0)
    sums = members.T @ points
    centres = sums / counts[:, None]
    distances = np.stack([np.linalg.norm(points - centre, axis=1) for centre in centres], axis=1)
    left_out = (sums[own] - points) / (counts[own] - 1)[:, None]
    rows = np.arange(len(points))
    distances[rows, own] = np.linalg.norm(points - left_out, axis=1)
    inside = distances[rows, own].copy()
    accuracy = float((distances.argmin(axis=1) == own).mean())
    distances[rows, own] = np.inf
    outside = distances.min(axis=1)
    separation = float(((outside - inside) / np.maximum(np.maximum(inside, outside), 1e-12)).mean())
    return {"centroid_accuracy": round(accuracy, 4), "separation": round(separation, 4)}


def retrieval(audio: np.ndarray, texts: np.ndarray, confidence: float) -> dict[str, JSON]:
    """How often a clip (N, C) finds its own text (N, C) among all N, by cosine from the middle of each kind.

    A text that is as near as the own one counts as nearer.
    """
    near = cosines(audio - audio.mean(axis=0), texts - texts.mean(axis=0))
    ranks = (near >= np.diagonal(near)[:, None]).sum(axis=1)
    num = len(ranks)
    found: dict[str, JSON] = {"n": num}
    for rank in RANKS:
        hits = int((ranks <= rank).sum())
        found[f"r{rank}"] = round(hits / num, 4)
        found[f"r{rank}_ci95"] = list(wilson_interval(hits, num, confidence).rounded())
        found[f"r{rank}_chance"] = round(min(1.0, rank / num), 6)
    return found


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N, C) and (M, C) -> (N, M)."""
    lengths = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)[None]
    return np.asarray(first @ second.T / np.maximum(lengths, 1e-12))
