"""What each label sounds like in numbers, and how the splits stay apart.

A label is a range of a physical quantity, with gaps between labels so that no clip is on a border. Each range
is cut into ten equal cells (on a logarithmic scale where the ear is logarithmic). Training, validation and
test own different cells of every range: a test clip never has a pitch, a tempo or a loudness from training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_model.audio.corpora import clip_rng

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
    return values[clip_rng(seed, f"{name}/{block}").permutation(len(values))[place]]


def at_level(samples: np.ndarray, level_dbfs: float) -> np.ndarray:
    """Samples (N,) scaled so that the parts that sound have this root mean square, in dB of full scale.

    Sounding means: within 30 dB of the loudest 20 ms. Pauses therefore do not make a clip louder.
    """
    window = 320
    padded = np.pad(samples, (0, -len(samples) % window)).reshape(-1, window)
    power = np.square(padded, dtype=np.float64).mean(axis=1)
    sounding = power[power > power.max() * 1e-3].mean()
    return samples * (10 ** (level_dbfs / 20) / math.sqrt(sounding))


def with_room(samples: np.ndarray, level_dbfs: float, rng: np.random.Generator) -> np.ndarray:
    """Samples (N,) float32 with white noise added, as any microphone adds it, and kept within full scale."""
    noise = rng.standard_normal(len(samples)) * 10 ** (level_dbfs / 20)
    return np.clip(samples + noise, -0.999, 0.999).astype(np.float32)
