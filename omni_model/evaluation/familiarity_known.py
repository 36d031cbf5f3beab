"""How far a sound lies from what was taught, so that a listener can say that it is not sure.

A model asked about a sound that it was never taught answers all the same, and as firmly as ever. Therefore
something else looks at what it hears. The frozen encoder's frames of a clip are summed up over time, and the
sum is compared with those of clips that are known: phrases, tones and noises such as were taught, and random
words, notes and hisses, which were not (see `audio.strange`). Each known clip votes for what it is, the more
the nearer it is to the clip in question (a kernel ridge regression; C. Saunders and others, ICML 1998). The
votes of what was taught, added up, are the clip's *familiarity*: about 1 for a sound as taught, about 0 for
nonsense, and about 0 as well for what is near to nothing at all.

*Distance* is what is lacking to 1, in units of a limit: above 1 the listener is not sure. Clips with words
have a limit of their own, since new voices sound less familiar than new tones do. Each limit is where the
given share of validation clips would be marked.

Axes: T encoder frames, D frame width, P = 7 D pooled numbers, K components, M known clips, N clips.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import Familiarity
from omni_model.config import BadInput

MODEL = "familiarity.safetensors"
# What a known clip votes for. The first two were taught.
VOTES = ("taught words", "taught sounds", "unknown words", "unknown sounds")
NUM_TAUGHT = 2
WIDTH = 1.0  # of the kernel, in root mean square lengths of a known clip
RIDGE = 0.3
SKETCHES, SKETCH_SPARE = 3, 32  # passes over the data, and columns beyond those that are kept


@dataclass(frozen=True)
class Known:
    """What is known, to be compared with: see the module.

    Attributes:
        centre: (P,) of the pooled frames.
        axes: (P, K) what is taken from the difference to the centre.
        clips: (M, K) the known clips in these.
        votes: (M, 4) what each votes for, with its weight.
        width: of the kernel.
        limits: least familiarity of what the listener is sure about, for words and for other sounds.
        policy: how the frames must be made.
    """

    centre: np.ndarray
    axes: np.ndarray
    clips: np.ndarray
    votes: np.ndarray
    width: float
    limits: tuple[float, float]
    policy: Mapping[str, Any]

    def votes_for(self, pooled: np.ndarray) -> np.ndarray:
        """What the known clips say of pooled frames (N, P): (N, 4), in the order of VOTES."""
        places = (pooled - self.centre) @ self.axes
        found: np.ndarray = _kernel(places, self.clips, self.width) @ self.votes
        return found

    def distances(self, votes: np.ndarray) -> np.ndarray:
        """Distances (N,) from training; more than 1 is too far."""
        limits = np.where(has_words(votes), *self.limits)
        distances: np.ndarray = np.maximum(1 - familiarity(votes), 0.0) / (1 - limits)
        return distances

    def judge(self, clips: Sequence[np.ndarray]) -> list["Judged"]:
        """What to think of clips, each given by its frames (T, D).

        Raises:
            BadInput: the frames are of another width than those that were learned from.
        """
        wanted = len(self.centre) // len(pool(np.zeros((1, 1))))
        if any(frames.shape[1] != wanted for frames in clips):
            raise BadInput(f"frames must be {wanted} wide, as those that familiarity was learned from.")
        votes = self.votes_for(np.stack([pool(frames) for frames in clips]))
        return [
            Judged(round(float(distance), 4), VOTES[NUM_TAUGHT + int(each[NUM_TAUGHT:].argmax())])
            for distance, each in zip(self.distances(votes), votes, strict=True)
        ]


@dataclass(frozen=True)
class Judged:
    """How far a clip lies from what was taught (1: the limit), and what it seems to be if it is too far."""

    distance: float
    seems: str

    @property
    def is_taught(self) -> bool:
        """Whether the listener may be sure."""
        return self.distance <= 1

    @property
    def why(self) -> str:
        """Why it is not sure, in words; nothing where it may be."""
        if self.is_taught:
            return ""
        if self.seems == "unknown words":
            return "these seem to be words that it was not taught"
        return "this sounds unlike anything that it was taught"


def pool(frames: np.ndarray) -> np.ndarray:
    """Frames (T, D) summed up over time: (7 D,) float64.

    Mean, spread, largest, smallest, second and eighth tenth, and how fast they change.
    """
    frames = frames.astype(np.float64)
    moved = np.abs(np.diff(frames, axis=0)).mean(axis=0) if len(frames) > 1 else np.zeros(frames.shape[1])
    tenths = np.quantile(frames, (0.2, 0.8), axis=0)
    ends = [frames.max(axis=0), frames.min(axis=0)]
    return np.concatenate([frames.mean(axis=0), frames.std(axis=0), *ends, *tenths, moved])


def familiarity(votes: np.ndarray) -> np.ndarray:
    """The votes (N, 4) of what was taught, together: (N,)."""
    total: np.ndarray = votes[:, :NUM_TAUGHT].sum(axis=1)
    return total


def has_words(votes: np.ndarray) -> np.ndarray:
    """Whether more of the votes (N, 4) are for words than for other sounds: (N,) booleans."""
    words: np.ndarray = votes[:, 0::2].sum(axis=1) > votes[:, 1::2].sum(axis=1)
    return words


def _kernel(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    """exp(-d^2 / 2 width^2) for the distances d of points (N, K) and (M, K): (N, M)."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    nearness: np.ndarray = np.exp(np.maximum(squares, 0) / (-2 * width**2))
    return nearness


# --- fitting -------------------------------------------------------------------------------------


def fit(pooled: np.ndarray, votes: Sequence[int], components: int, seed: int) -> Known:
    """What is known from pooled frames (M, P) of clips and what each is: no limits and no policy yet.

    The principal components are scaled by the fourth root of their variance: half-way between leaving them as
    they are, where a few drown all others, and making them all alike, where noise counts as much as sound.
    """
    centre, spread = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    scaled = (pooled - centre) / spread
    variances, directions = _components(scaled, min(components, len(pooled) - 1), seed)
    axes = directions / np.maximum(variances, 1e-9) ** 0.25 / spread[:, None]
    clips = (pooled - centre) @ axes
    width = WIDTH * float(np.sqrt((clips**2).sum(axis=1).mean()))
    kernel = _kernel(clips, clips, width)
    solved = np.linalg.solve(kernel + RIDGE * np.eye(len(clips)), np.eye(len(VOTES))[np.asarray(votes)])
    # Kept in 32 bits, and used as it is kept.
    centre, axes, clips, solved = (
        each.astype(np.float32).astype(np.float64) for each in (centre, axes, clips, solved)
    )
    return Known(centre, axes, clips, solved, width=width, limits=(0.0, 0.0), policy={})


def _components(scaled: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest `count` variances (K,) of centred rows (M, P), and their directions (P, K).

    Found in a random sketch of the rows. Source: Halko, Martinsson and Tropp, SIAM Review 53, 2011.
    """
    size = min(count + SKETCH_SPARE, *scaled.shape)
    sketch = np.random.default_rng([seed, 1]).standard_normal((scaled.shape[1], size))
    for _ in range(SKETCHES):
        rows, _ = np.linalg.qr(scaled @ sketch)
        sketch = scaled.T @ rows
    _, values, directions = np.linalg.svd(sketch.T, full_matrices=False)
    return values[:count] ** 2 / len(scaled), directions[:count].T


# --- files ---------------------------------------------------------------------------------------


def write_known(known: Known, directory: Path) -> None:
    """Write what is known: the same bytes for the same values."""
    from safetensors.numpy import save_file

    names = ("axes", "centre", "clips", "votes")
    # save_file writes an array's memory as it lies there, so that a transposed one would come back scrambled.
    tensors = {name: np.ascontiguousarray(getattr(known, name), dtype=np.float32) for name in names}
    plain = {"policy": known.policy, "limits": known.limits, "width": known.width}
    save_file(tensors, directory / MODEL, metadata={"known": json.dumps(plain, sort_keys=True)})


def load_known(artifact: Familiarity) -> Known:
    """What a finished artifact knows.

    Raises:
        BadInput: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = artifact.out / MODEL
    try:
        with safe_open(path, "np") as file:
            plain = json.loads(file.metadata()["known"])
            tensors = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        raise BadInput(f"{path} is missing or damaged; delete its artifact and run again.") from None
    return Known(**tensors, **plain | {"limits": tuple(plain["limits"])})
