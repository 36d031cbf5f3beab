"""Where each texture lives, and where it gets lost: one linear reader per label and place on the way.

At every place the same clips are learned from, chosen on and judged, so that places differ by what they hold
and by nothing else. What no linear reader finds may still be there; what one finds has not been lost.

Legend: N clips, T rows of a clip at a place, D their width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omni_model.audio.clips import SPLITS, clip_rng
from omni_model.audio.probe import fit_probe, pool
from omni_model.config import JSON
from omni_model.evaluation.statistics import wilson_interval

MIN_TEST_CLIPS = 10  # fewer say nothing about a label


@dataclass(frozen=True)
class Place:
    """Somewhere on the way, by name, with what `pool` made of each clip's rows there, by key."""

    name: str
    pooled: dict[str, np.ndarray] = field(default_factory=dict)


def encoder_places(policy: Mapping[str, Any]) -> list[str]:
    """Names of the encoder layers that lie side by side in a frame, in order."""
    layers = [f"ear, {'last layer' if layer == 'last' else f'layer {layer}'}" for layer in policy["layers"]]
    return layers if policy["mix"] == "concat" else [f"ear, mean of {len(layers)} layers"]


def pool_layers(frames: np.ndarray, num_layers: int) -> list[np.ndarray]:
    """Frames (T, L E) that hold L layers side by side -> what `pool` makes of each, (3 E,)."""
    parts = pool(frames).reshape(3, num_layers, -1)
    return [parts[:, layer].ravel() for layer in range(num_layers)]


def choose_clips(clips: Sequence[Mapping[str, Any]], most: int, seed: int) -> list[Mapping[str, Any]]:
    """At most `most` clips by lot, in key order; of every label its equal share, where there are as many."""
    names = {name for clip in clips for name in clip["labels"]}
    share, taken = max(1, most // max(len(names), 1)), dict.fromkeys(names, 0)
    needed: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for clip in sorted(clips, key=lambda clip: float(clip_rng(seed, clip["key"]).random())):
        wanted = any(taken[name] < share for name in clip["labels"])
        (needed if wanted else others).append(clip)
        for name in clip["labels"]:
            taken[name] += 1
    return sorted([*needed, *others][:most], key=lambda clip: str(clip["key"]))


def probe_places(
    clips: Sequence[Mapping[str, Any]], places: Sequence[Place], encoder: Sequence[str], confidence: float
) -> dict[str, JSON]:
    """Label -> n, classes, chance (its commonest training value, always), and the accuracy at each place.

    `lost_at` names the first place behind the encoder whose interval lies below that of an earlier place;
    `best_layer` names the encoder layer that carries the label best. Labels of which a split has too little
    are left out.
    """
    found: dict[str, JSON] = {}
    for label in sorted({name for clip in clips for name in clip["labels"]}):
        parts = _parts(clips, label)
        (train, truth), _, (test, answers) = parts
        classes = len(set(truth.tolist()))
        if classes < 2 or len(test) < MIN_TEST_CLIPS:
            continue
        rights = {place.name: _rights(parts, place, classes) for place in places}
        intervals = {
            name: wilson_interval(right, len(test), confidence).rounded() for name, right in rights.items()
        }
        found[label] = {
            "n": len(test),
            "n_train": len(train),
            "classes": classes,
            "chance": round(float((answers == np.bincount(truth).argmax()).mean()), 4),
            "best_layer": max(encoder, key=lambda name: rights[name]),
            "lost_at": lost_at(intervals, set(encoder)),
            "places": {
                name: {"accuracy": round(right / len(test), 4), "ci95": list(intervals[name])}
                for name, right in rights.items()
            },
        }
    return found


def lost_at(intervals: Mapping[str, Sequence[float]], encoder: set[str]) -> str | None:
    """The first place behind the encoder, in order, whose interval ends below where an earlier one begins."""
    best_low = 0.0
    for name, (low, high) in intervals.items():
        if name not in encoder and high < best_low:
            return name
        best_low = max(best_low, low)
    return None


Part = tuple[list[str], np.ndarray]


def _parts(clips: Sequence[Mapping[str, Any]], label: str) -> list[Part]:
    """Keys and numbers of the values (N,) of each split's clips whose value was there to be learned."""
    labelled = [clip for clip in clips if label in clip["labels"]]
    values = sorted({clip["labels"][label] for clip in labelled if clip["split"] == "train"})
    parts = []
    for split in SPLITS:
        own = [clip for clip in labelled if clip["split"] == split and clip["labels"][label] in values]
        truth = np.array([values.index(clip["labels"][label]) for clip in own], dtype=np.int64)
        parts.append(([clip["key"] for clip in own], truth))
    return parts


def _rights(parts: Sequence[Part], place: Place, classes: int) -> int:
    """How many test clips a probe of that place gets right."""
    (train, truth), chosen_on, (test, answers) = (
        (np.array([place.pooled[key] for key in keys]), numbers) for keys, numbers in parts
    )
    probe = fit_probe(train, truth, classes, chosen_on)
    return int((probe.scores(test).argmax(axis=1) == answers).sum())
