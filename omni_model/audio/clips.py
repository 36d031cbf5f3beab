"""The vocabulary of corpora: a clip before and after it is made, what sounds in it when, a shard of clips.

A synthesized clip is planned first: its *plan* says its key, split, labels and parameters, and a *renderer*
turns it into samples. Every random number of a clip comes from the stage's seed and the clip's own key, so
clips can be made in any order, one at a time, again after a kill, and come out the same.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from omni_model.artifacts import sha256_text
from omni_model.config import BadInput

SPLITS = ("train", "validation", "test")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
SYNTHETIC_LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class ClipPlan:
    """One clip before it is made. `parameters` is what the renderer needs, in plain JSON.

    Attributes:
        labels: category -> value, only what can be heard in this clip.
        speaker: the voice's name, or "" where nobody speaks.
        exchanges: questions about this clip and their answers, where somebody published them with it.
    """

    key: str
    split: str
    labels: dict[str, str]
    parameters: dict[str, Any]
    transcript: str = ""
    speaker: str = ""
    licence: str = SYNTHETIC_LICENCE
    exchanges: tuple[tuple[str, str], ...] = ()

    def plain(self) -> dict[str, Any]:
        """All that it says as plain values; of exchanges nothing where there are none."""
        return {name: value for name, value in asdict(self).items() if value or name != "exchanges"}


@dataclass(frozen=True)
class Event:
    """What sounds from when to when, in seconds of the clip: a word, a beep, a rise of the pitch."""

    track: str
    value: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Clip:
    """A clip as made: samples (N,) float32 at 16 kHz and what came to light while making it.

    Attributes:
        timeline: what sounds when, where whoever made the clip knows it.
        changes: what was done to a recording so that it fits, such as "resampled".
    """

    samples: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)
    timeline: tuple[Event, ...] = ()
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A recording that gives no clip, and why: `reason` is one of a few words that can be counted."""

    name: str
    reason: str


@dataclass(frozen=True)
class ShardPlan:
    """One tar before it is made.

    Attributes:
        name: what follows `clips-` in its file name.
        made_from: digest of everything that decides its content, beyond the stage's code, packages and seed.
        make: its clips, one by one, and what had to be left out.
    """

    name: str
    made_from: str
    make: Callable[[], Iterator[tuple[ClipPlan, Clip] | Dropped]]


def clip_rng(seed: int, key: str) -> np.random.Generator:
    """Random numbers that belong to one clip (or any other named thing) under one seed."""
    return np.random.default_rng([seed, int(sha256_text(key)[:16], 16)])


def check(plan: ClipPlan) -> None:
    """Refuse a plan whose key or split no corpus could hold."""
    # webdataset cuts a key at its first dot, and tar members are paths.
    if not KEY_PATTERN.fullmatch(plan.key):
        raise BadInput(f"the clip key {plan.key!r} may hold only letters, digits, - and _.")
    if plan.split not in SPLITS:
        raise BadInput(f"the split {plan.split!r} of clip {plan.key} is none of {', '.join(SPLITS)}.")
