"""Intervals and tests for a benchmark of a few hundred items.

An accuracy without an interval says little: 80 right of 200 is compatible with 33.5 % and with 46.9 %. The
unit is always the *item*. Asking one item in four option orders gives four correlated verdicts, so they are
averaged into one score per item first, and items are what the bootstrap draws. Items that share a sound are
correlated as well: they form a *cluster*, which is drawn as a whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends in the unit of what was estimated."""

    low: float
    high: float

    def rounded(self) -> list[float]:
        """`[low, high]` with six decimals, for JSON."""
        return [round(self.low, 6), round(self.high, 6)]


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> Interval:
    """Interval of a proportion, from `successes` of `total` trials.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22,
    1927.

    Raises:
        ValueError: `total` is not positive, or `successes` lies outside 0..total.
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials is not a proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    shrink = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrink
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


class Bootstrap:
    """Percentile bootstrap over items, with one table of resamples for every figure of equal length.

    Two figures over the same items are compared on the same resamples, which makes their difference paired.
    `clusters` (N,) are numbers; items of one number are drawn together, and each is its own where none are
    given.
    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """

    def __init__(self, seed: int, draws: int = 10_000, confidence: float = 0.95) -> None:
        if draws < 1 or not 0 < confidence < 1:
            raise ValueError(f"{draws} draws at confidence {confidence} give no interval")
        self._seed, self._draws, self._confidence = seed, draws, confidence
        self._tables: dict[int, np.ndarray] = {}

    def means(self, scores: np.ndarray, clusters: np.ndarray | None = None) -> np.ndarray:
        """Means over the items of resampled clusters: `scores` (N,) -> (draws,).

        Raises:
            ValueError: there is no item.
        """
        if len(scores) == 0:
            raise ValueError("an interval needs at least one item")
        _, member = np.unique(np.arange(len(scores)) if clusters is None else clusters, return_inverse=True)
        sizes = np.bincount(member).astype(np.float64)
        counts = self._counts(len(sizes))
        means: np.ndarray = counts @ np.bincount(member, weights=scores) / (counts @ sizes)
        return means

    def _counts(self, clusters: int) -> np.ndarray:
        """How often each cluster is drawn in each resample: (draws, clusters)."""
        if clusters not in self._tables:
            # These counts are multinomial, so that a resample's sum is one row times the scores.
            rng = np.random.default_rng([self._seed, clusters])
            counts = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=self._draws)
            self._tables[clusters] = counts.astype(np.float64)
        return self._tables[clusters]

    def interval(self, scores: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
        """Interval of the mean of per-item `scores` (N,), each in 0..1."""
        return self._percentiles(self.means(np.asarray(scores, dtype=np.float64), clusters))

    def margin(
        self, scores: np.ndarray, baseline: np.ndarray, clusters: np.ndarray | None = None
    ) -> Interval:
        """Interval of mean(scores) - mean(baseline), both (N,) over the same items in the same order.

        Raises:
            ValueError: the two have different lengths.
        """
        if len(scores) != len(baseline):
            raise ValueError(f"{len(scores)} scores cannot be paired with {len(baseline)}")
        lead = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
        return self.interval(lead, clusters)

    def ratio(self, parts: np.ndarray, wholes: np.ndarray) -> Interval:
        """Interval of sum(parts) / sum(wholes), both (N,) over the same items; every whole is positive."""
        return self._percentiles(self.means(parts) / self.means(wholes))

    def _percentiles(self, means: np.ndarray) -> Interval:
        tail = (1 - self._confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        return Interval(float(low), float(high))


def mcnemar_exact(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p-value that two sets of right/wrong verdicts (N,) on the same items are equally good.

    Only items on which the two differ count; under the hypothesis each of those is a fair coin.
    Source: Q. McNemar, Psychometrika 12 (1947), in the exact binomial form.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    if differing == 0:
        return 1.0
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**differing)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of several tests, adjusted so that all of them together err as rarely as one alone.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 6 (1979).
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
