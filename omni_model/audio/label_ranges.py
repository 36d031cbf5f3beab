"""What each label sounds like in numbers, and how the splits stay apart.

A label is a range of a physical quantity, with gaps between labels so that no clip is on a border. Each range
is cut into ten equal cells (on a logarithmic scale where the ear is logarithmic). Training, validation and
test own different cells of every range: a test clip never has a pitch, a tempo or a loudness from training.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_model.audio.clips import clip_rng

NUM_CELLS = 10
CELLS = {"train": (0, 1, 3, 4, 6, 8, 9), "validation": (5,), "test": (2, 7)}
CELL_MARGIN = 0.05  # share of a cell left empty at each end, so that neighbours never touch


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`; `log` says that equal ratios, not differences, are equal steps."""

    low: float
    high: float
    log: bool = False

    def at(self, position: float) -> float:
        """The value at `position` 0..1 of the range."""
        if self.log:
            return math.exp(math.log(self.low) + position * math.log(self.high / self.low))
        return self.low + position * (self.high - self.low)

    def cell(self, value: float) -> int:
        """The cell, 0..9, that holds `value`."""
        share = (value - self.low) / (self.high - self.low)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return min(NUM_CELLS - 1, max(0, int(share * NUM_CELLS)))


# dB relative to full scale (root mean square over what sounds). Low enough that speech peaks stay below 0 dB.
LOUDNESS_DBFS = {
    "faint": Range(-49, -45),
    "soft": Range(-40, -36),
    "medium": Range(-31, -27),
    "loud": Range(-22, -18),
}
ROOM_NOISE_DBFS = Range(-72, -64)
FULL_SCALE = 0.999
LEVEL_WINDOW = 320  # samples, 20 ms


def draw(rng: np.random.Generator, values: Range, split: str) -> float:
    """A value of the range out of a cell of this split, rounded to six significant digits."""
    cell = CELLS[split][rng.integers(len(CELLS[split]))]
    inside = rng.uniform(CELL_MARGIN, 1 - CELL_MARGIN)
    return float(f"{values.at((cell + inside) / NUM_CELLS):.6g}")


def balanced(values: Sequence[str], index: int, seed: int, name: str) -> str:
    """Item `index` of an endless random sequence in which every run of len(values) holds each value once.

    Sequences of different names are independent; lengthening a corpus leaves its first items as they were.
    """
    block, place = divmod(index, len(values))
    return values[_deal(len(values), seed, f"{name}/{block}")[place]]


@functools.lru_cache(maxsize=4096)
def _deal(count: int, seed: int, name: str) -> tuple[int, ...]:
    """0 to count - 1 in an order of this name's own. Kept, since a whole block of clips asks for it."""
    return tuple(clip_rng(seed, name).permutation(count).tolist())


def loudness_of(level_dbfs: float) -> str | None:
    """The loudness label whose range this level lies in, or is within 1 dB of; None between labels."""
    for label, values in LOUDNESS_DBFS.items():
        if values.low - 1 <= level_dbfs <= values.high + 1:
            return label
    return None


def frame_powers(samples: np.ndarray) -> np.ndarray:
    """Mean square (M,) of each 20 ms of samples (N,), M = ceil(N / 320)."""
    frames = np.zeros(-(-len(samples) // LEVEL_WINDOW) * LEVEL_WINDOW, np.float32)
    frames[: len(samples)] = samples
    frames = frames.reshape(-1, LEVEL_WINDOW)
    return np.einsum("mn,mn->m", frames, frames).astype(np.float64) / LEVEL_WINDOW


def level_dbfs(samples: np.ndarray, within_db: float = 30) -> float:
    """Root mean square of the parts of samples (N,) that sound, in dB of full scale.

    Sounding means: within so many dB of the loudest 20 ms. Pauses therefore do not make a clip quieter.
    """
    powers = frame_powers(samples)
    return 10 * math.log10(powers[powers > powers.max() * 10 ** (-within_db / 10)].mean())


def at_level(samples: np.ndarray, target_dbfs: float, within_db: float = 30) -> np.ndarray:
    """Samples (N,) float32 scaled so that what sounds in them has this level, as `level_dbfs` measures it."""
    gain = 10 ** ((target_dbfs - level_dbfs(samples, within_db)) / 20)
    return (samples * gain).astype(np.float32, copy=False)


def with_room(samples: np.ndarray, noise_dbfs: float, rng: np.random.Generator) -> np.ndarray:
    """Samples (N,) float32 with white noise added, as any microphone adds it, and kept within full scale."""
    # Evenly distributed numbers cost a fifth of Gaussian ones, and sound the same.
    noise = rng.random(len(samples), dtype=np.float32)
    noise -= np.float32(0.5)
    noise *= np.float32(math.sqrt(12) * 10 ** (noise_dbfs / 20))
    noise += samples
    return np.clip(noise, -FULL_SCALE, FULL_SCALE)
