"""The two sides of the overhead claim: the same training, one with everything eco_train measures, one without any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def overhead(script: Callable[[str], Any]) -> Any:
    """benchmarks/instrumentation_overhead.py."""
    return script("instrumentation_overhead")


def test_both_sides_train_alike_and_only_one_is_watched(
    overhead: Any, tiny_flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = tiny_flags()
    del words[words.index("--output-dir") : words.index("--output-dir") + 2]
    flags = [*words, *overhead.QUIET, "--perf-warmup-steps", "1", "--perf-measure-steps", "2"]
    on, off = (overhead.Side(flags, tmp_path / kind, instrumented=kind == "on") for kind in ("on", "off"))
    assert all(side.seconds(3) > 0 for side in (on, off))
    assert on.last_loss() == off.last_loss()
    assert 0 < on.alone(2) < 0.1
    for side in (on, off):
        side.close()
    rows = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]  # the last four with nothing in them
    assert rows[-1]["loss"] == off.last_loss()
    assert {path.name for path in (tmp_path / "on" / "perf").iterdir()} == {
        "baseline_throughput.json", "window_10m_bottlenecks.json"
    }  # fmt: skip
    assert "step      7/" in (tmp_path / "on" / "screen.txt").read_text(encoding="utf-8")
    assert (tmp_path / "off" / "metrics.jsonl").read_text(encoding="utf-8") == ""
    assert list((tmp_path / "off" / "perf").iterdir()) == []
    assert [len(side.processor_seconds) for side in (on, off)] == [1, 1]
