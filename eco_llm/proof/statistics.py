"""Whether B is faster than A: an estimate, an honest interval and a verdict from paired times.

The measure is d = ln(seconds of A / seconds of B) of two adjacent windows, so B's rate is e^d times A's. Which of the
two windows came first is decided by a coin. So, where A and B do not differ, every d would as likely have been -d,
whatever the machine did meanwhile (drift, heat, neighbours, noise that remembers): the sign-flip null holds by design
and not by assumption. The test is Wilcoxon's signed-rank test, whose null is known exactly for any number of pairs, and
which a few wild pairs cannot move far; the interval is all shifts that the test does not reject, and the estimate
(Hodges and Lehmann's) is in its middle: the median of the means of all pairs of d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eco_llm.config import FEWEST_PAIRS

Verdict = Literal["faster", "slower", "no difference shown"]

CONFIDENCE = 0.99
"""Of every interval here. At 95% a comparison of A with itself would find a difference in 1 of 20."""


PRECISION = 2.0
"""Half-width in percent at which an interval is narrow enough to stop measuring."""


@dataclass(frozen=True)
class Difference:
    """By how much B's rate differs from A's."""

    percent: float
    """Hodges-Lehmann estimate of 100 · (rate of B / rate of A - 1)."""
    low: float
    high: float
    """Ends of the interval, percent."""
    bootstrap_low: float
    bootstrap_high: float
    """Ends of the paired bootstrap interval of 100 · (median rate of B / median rate of A - 1). For the reader: its
    coverage is approximate, so no verdict rests on it."""
    pairs: int
    confidence: float
    """Coverage of [low, high], exact: the smallest at or above CONFIDENCE that the number of pairs allows."""

    def verdict(self, min_effect: float) -> Verdict:
        """`faster` or `slower` where 0 is outside the interval and the estimate is at least `min_effect` percent."""
        if self.low > 0 and self.percent >= min_effect:
            return "faster"
        if self.high < 0 and self.percent <= -min_effect:
            return "slower"
        return "no difference shown"


def difference(seconds_a: Sequence[float], seconds_b: Sequence[float], *, confidence: float = CONFIDENCE) -> Difference:
    """Compare paired times, `seconds_a[i]` beside `seconds_b[i]`, in one unit, all positive.

    Raises:
        ValueError: fewer than FEWEST_PAIRS pairs, or a time that is not positive and finite.
    """
    times = np.array([seconds_a, seconds_b], dtype=np.float64)  # [2, pairs]
    if times.shape[1] < FEWEST_PAIRS:
        raise ValueError(f"{times.shape[1]} pairs: the interval needs at least {FEWEST_PAIRS}")
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise ValueError("a time is zero, negative or not finite")
    estimate, low, high, covered = signed_rank_interval(np.log(times[0] / times[1]), confidence)
    bootstrap_low, bootstrap_high = _bootstrap(times, confidence)
    return Difference(
        percent=_percent(estimate), low=_percent(low), high=_percent(high),
        bootstrap_low=bootstrap_low, bootstrap_high=bootstrap_high,
        pairs=times.shape[1], confidence=covered,
    )  # fmt: skip


def precise(seconds_a: Sequence[float], seconds_b: Sequence[float]) -> bool:
    """Whether more pairs are not needed: the interval is no wider than ±PRECISION.

    To stop by this is fair: the width depends on the sizes of the differences, hardly on their signs, and on the signs
    alone the test rests (tests/proof/test_statistics.py counts).
    """
    _, low, high, _ = signed_rank_interval(np.log(np.divide(seconds_a, seconds_b)), CONFIDENCE)
    return _percent(high) - _percent(low) <= 2 * PRECISION


def _percent(log_ratio: float) -> float:
    return 100.0 * math.expm1(log_ratio)


def signed_rank_interval(d: np.ndarray, confidence: float) -> tuple[float, float, float, float]:
    """(estimate, low, high, exact coverage) of the centre of symmetry of `d`, float64 [n], n >= FEWEST_PAIRS.

    The interval's ends are the k-th smallest and k-th largest of the n (n + 1) / 2 means of two values (a value with
    itself included), where k - 1 is the largest rank sum whose lower tail is within (1 - confidence) / 2.
    """
    i, j = np.triu_indices(len(d))
    means = np.sort((d[i] + d[j]) / 2)
    tail = np.cumsum(signed_rank_null(len(d)))
    k = int(np.searchsorted(tail, (1 - confidence) / 2, side="right"))  # rank sums 0 … k - 1 may be rejected
    if k == 0:
        raise ValueError(f"{len(d)} pairs cannot give an interval of {confidence:.0%}")
    return float(np.median(means)), float(means[k - 1]), float(means[-k]), float(1 - 2 * tail[k - 1])


def signed_rank_null(n: int) -> np.ndarray:
    """Probability of each sum 0 … n (n + 1) / 2 of the ranks 1 … n that a fair coin each chooses: float64."""
    probability = np.zeros(n * (n + 1) // 2 + 1)
    probability[0] = 1.0
    for rank in range(1, n + 1):
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[:-rank]
        probability = (probability + shifted) / 2
    return probability


def _bootstrap(times: np.ndarray, confidence: float, resamples: int = 4_000) -> tuple[float, float]:
    """Percentile interval of the ratio of median rates, percent; whole pairs are drawn."""
    n = times.shape[1]
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    a, b = np.median(times[0][draws], axis=1), np.median(times[1][draws], axis=1)
    low, high = np.quantile(a / b, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(100 * (low - 1)), float(100 * (high - 1))


def coin_order(pairs: int, seed: int) -> list[bool]:
    """For each pair, whether A goes first: fair coins, the same for the same seed."""
    return [bool(heads) for heads in np.random.default_rng(seed).integers(2, size=pairs)]
