"""Learning-rate schedules at every boundary."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eco_llm.config import OptimizerConfig
from eco_llm.optim.schedule import lr_at, warmup_length

BASE = OptimizerConfig(lr=2.0, warmup_steps=10, min_lr_ratio=0.1, decay_fraction=0.2)


def rates(total: int, **changes: object) -> list[float]:
    config = dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]
    return [lr_at(s, config, total) for s in range(total)]


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    assert rates(200)[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])


def test_warmup_is_capped_at_a_tenth_and_can_be_off() -> None:
    assert warmup_length(BASE, 50) == 5
    assert warmup_length(BASE, 3) == 1
    assert warmup_length(dataclasses.replace(BASE, warmup_steps=0), 50) == 0
    assert rates(50, warmup_steps=0)[0] == 2.0


def test_cosine_hits_peak_middle_and_minimum() -> None:
    r = rates(111)  # peak at step 9, end at 110, half way at 59.5
    assert r[9] == pytest.approx(2.0)
    assert (r[59] + r[60]) / 2 == pytest.approx(2.0 * (0.1 + 0.9 / 2), rel=1e-3)
    assert r[110] == pytest.approx(0.2)
    assert r[9:] == sorted(r[9:], reverse=True)


def test_wsd_is_flat_then_linear_to_the_minimum() -> None:
    r = rates(100, schedule="wsd")
    assert r[9:80] == [2.0] * 71
    drops = [a - b for a, b in itertools.pairwise(r[79:])]
    assert drops == pytest.approx([1.8 / 20] * 20)
    assert r[99] == pytest.approx(0.2)


def test_constant_stays_at_the_peak() -> None:
    assert rates(100, schedule="constant")[10:] == [2.0] * 90


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_steps_past_the_end_keep_the_last_rate(schedule: str) -> None:
    config = dataclasses.replace(BASE, schedule=schedule)  # type: ignore[arg-type]
    assert lr_at(500, config, 100) == lr_at(99, config, 100)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_ends_at_exact_extremes(schedule: str) -> None:
    assert rates(100, schedule=schedule, min_lr_ratio=0.0)[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates(100, schedule=schedule, min_lr_ratio=1.0)[20:] == pytest.approx([2.0] * 80)


def test_wsd_decay_never_overlaps_warmup() -> None:
    r = rates(100, schedule="wsd", decay_fraction=1.0)
    assert r[9] == pytest.approx(2.0)
    assert r[10] == pytest.approx(2.0 - 1.8 / 90)
    assert rates(100, schedule="wsd", decay_fraction=0.0)[10:] == [2.0] * 90


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 500),
    fraction=st.floats(0, 1),
    low=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_rates_stay_in_range(total: int, warmup: int, fraction: float, low: float, schedule: str) -> None:
    for r in rates(total, warmup_steps=warmup, decay_fraction=fraction, min_lr_ratio=low, schedule=schedule):
        assert math.isfinite(r)
        assert 0 <= r <= 2.0 + 1e-12


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)])
def test_nonsense_is_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="lr_at"):
        lr_at(step, BASE, total)


def test_module_does_not_import_torch() -> None:
    code = "import sys, eco_llm.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
