"""The statistics of a comparison: exact against enumeration, and honest on noise like that of real machines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from eco_llm.config import FEWEST_PAIRS
from eco_llm.proof.statistics import (
    CONFIDENCE,
    coin_order,
    difference,
    precise,
    signed_rank_interval,
    signed_rank_null,
)


def test_the_null_is_that_of_fair_coins() -> None:
    for n in (1, 5, 8):
        sums = [sum(r for r, heads in zip(range(1, n + 1), coins, strict=True) if heads)
                for coins in itertools.product((0, 1), repeat=n)]  # fmt: skip
        counted = np.bincount(sums, minlength=n * (n + 1) // 2 + 1) / 2**n
        np.testing.assert_allclose(signed_rank_null(n), counted, atol=1e-15)
    assert signed_rank_null(1000).sum() == pytest.approx(1.0)


def rank_test_p(d: np.ndarray) -> float:
    """Two-sided p-value by trying all signs: the slow twin. No zeros, no ties."""
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    seen = ranks[d > 0].sum()
    sums = np.array([ranks[list(signs)].sum() for signs in itertools.product((False, True), repeat=len(d))])
    return float(min(1.0, 2 * min((sums <= seen).mean(), (sums >= seen).mean())))


@pytest.mark.parametrize(("n", "confidence"), [(8, 0.99), (9, 0.95), (11, 0.9)])
def test_the_interval_is_what_the_test_does_not_reject(n: int, confidence: float) -> None:
    rng = np.random.default_rng(n)
    for _ in range(5):
        d = rng.standard_normal(n) + 0.3
        estimate, low, high, coverage = signed_rank_interval(d, confidence)
        assert low < estimate < high
        assert coverage >= confidence
        assert rank_test_p(d - low + 1e-9) <= 1 - confidence < rank_test_p(d - low - 1e-9)
        assert rank_test_p(d - high - 1e-9) <= 1 - confidence < rank_test_p(d - high + 1e-9)


def test_a_known_ratio_is_found_in_percent() -> None:
    a = np.linspace(1.0, 2.0, 20)  # drifts to twice the time; the ratio does not
    found = difference(a, a / 1.05)
    assert (found.percent, found.low, found.high) == pytest.approx((5.0, 5.0, 5.0))
    assert found.verdict(1.0) == "faster"
    assert found.verdict(6.0) == "no difference shown"
    back = difference(a / 1.05, a)
    assert back.percent == pytest.approx(100 / 1.05 - 100)
    assert back.verdict(1.0) == "slower"
    assert found.bootstrap_low <= 5.0 + 1e-9
    assert found.bootstrap_high >= 5.0 - 1e-9


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="zero, negative or not finite"):
        difference([1.0] * 9 + [wrong], [1.0] * 10)


def test_too_few_pairs_are_refused_and_the_fewest_can_show_something() -> None:
    with pytest.raises(ValueError, match="pairs"):
        difference([1.0] * (FEWEST_PAIRS - 1), [1.1] * (FEWEST_PAIRS - 1))
    rng = np.random.default_rng(0)
    a = 1 + 0.001 * rng.random(FEWEST_PAIRS)
    assert difference(a, 1.1 * a).verdict(1.0) == "slower"


# -- honesty on noise ------------------------------------------------------------------------------------------


def autoregressive(rng: np.random.Generator, n: int, memory: float, sd: float) -> np.ndarray:
    x, shocks = np.zeros(n), rng.standard_normal(n) * sd * np.sqrt(1 - memory**2)
    x[0] = sd * rng.standard_normal()
    for i in range(1, n):
        x[i] = memory * x[i - 1] + shocks[i]
    return x


def noise(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Log step times of n adjacent windows on a machine with its own life, fp64 [n]."""
    if kind == "white":
        return 0.02 * rng.standard_normal(n)
    if kind == "remembers":
        return autoregressive(rng, n, 0.5, 0.03)
    if kind == "remembers long":
        return autoregressive(rng, n, 0.9, 0.06)
    if kind == "random walk":
        return np.cumsum(0.02 * rng.standard_normal(n))
    if kind == "heats up, with spikes":
        return np.linspace(0, 0.2, n) + 0.01 * rng.standard_normal(n) + (rng.random(n) < 0.1) * rng.exponential(0.3, n)
    assert kind == "a neighbour comes and goes"
    busy, state = np.zeros(n), False
    for i in range(n):
        state = bool(rng.random() < (0.85 if state else 0.05))
        busy[i] = 0.5 * state
    return busy + 0.01 * rng.standard_normal(n)


def paired(kind: str, rng: np.random.Generator, pairs: int, slowdown: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of A and B as the comparison takes them: adjacent windows, order by coin."""
    slots = noise(kind, rng, 2 * pairs).reshape(pairs, 2)
    first = np.array(coin_order(pairs, int(rng.integers(2**31))))
    a, b = np.where(first, slots[:, 0], slots[:, 1]), np.where(first, slots[:, 1], slots[:, 0])
    return np.exp(a), np.exp(b) * (1 + slowdown)


KINDS = ("white", "remembers", "remembers long", "random walk", "heats up, with spikes", "a neighbour comes and goes")


@pytest.mark.parametrize("pairs", [FEWEST_PAIRS, 12, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_against_itself_is_no_difference(kind: str, pairs: int) -> None:
    """The interval misses the truth in at most 1 of 100, whatever the noise; 8 of 400 would have a chance of 5%."""
    rng = np.random.default_rng(KINDS.index(kind) + 100 * pairs)
    misses = 0
    for _ in range(400):
        d = np.log(np.divide(*paired(kind, rng, pairs, 0.0)))
        _, low, high, coverage = signed_rank_interval(d, CONFIDENCE)
        assert coverage >= CONFIDENCE
        misses += not low <= 0.0 <= high
    assert misses <= 10  # expected: 4; more than 10 has a chance of 0.3%


@pytest.mark.parametrize("kind", KINDS)
def test_five_percent_are_found(kind: str) -> None:
    """In 19 of 20 comparisons of 40 pairs, the default, and never with the wrong sign."""
    rng = np.random.default_rng(KINDS.index(kind))
    verdicts = [difference(*paired(kind, rng, 40, 0.05)).verdict(1.0) for _ in range(100)]
    assert verdicts.count("slower") >= 95
    assert "faster" not in verdicts


def test_the_coin_is_what_makes_it_honest() -> None:
    """With A always first, a machine that heats up makes B slower; the coin takes that away."""
    rng = np.random.default_rng(5)

    def rejected(a_first: bool) -> int:
        count = 0
        for _ in range(100):
            slots = (np.linspace(0, 1.6, 80) + 0.01 * rng.standard_normal(80)).reshape(40, 2)
            first = np.full(40, True) if a_first else np.array(coin_order(40, int(rng.integers(2**31))))
            d = np.where(first, slots[:, 0] - slots[:, 1], slots[:, 1] - slots[:, 0])
            _, low, high, _ = signed_rank_interval(d, CONFIDENCE)
            count += not low <= 0.0 <= high
        return count

    assert rejected(a_first=True) == 100
    assert rejected(a_first=False) <= 5


def test_the_coin_is_fair_and_repeats() -> None:
    assert coin_order(40, 7) == coin_order(40, 7)
    assert coin_order(40, 7) != coin_order(40, 8)
    assert coin_order(400, 7)[:40] == coin_order(40, 7)  # so that a comparison may stop early
    assert 900 < sum(coin_order(2000, 0)) < 1100


@pytest.mark.parametrize("kind", ["white", "a neighbour comes and goes", "heats up, with spikes"])
def test_measuring_until_the_interval_is_narrow_is_fair(kind: str) -> None:
    """The comparison looks every 20 pairs from 40 to 400 whether it may stop; A against itself still shows nothing."""
    rng = np.random.default_rng(KINDS.index(kind) + 7)
    misses, stopped_at = 0, []
    for _ in range(100):
        a, b = paired(kind, rng, 400, 0.0)
        b *= np.exp(0.06 * rng.standard_normal(400))  # noise that 40 pairs do not beat
        n = next((n for n in range(40, 400, 20) if precise(a[:n], b[:n])), 400)
        d = np.log(a[:n] / b[:n])
        _, low, high, _ = signed_rank_interval(d, CONFIDENCE)
        misses += not low <= 0.0 <= high
        stopped_at.append(n)
    assert misses <= 5  # expected: 1; more than 5 has a chance of 0.05%
    assert len(set(stopped_at)) > 1
