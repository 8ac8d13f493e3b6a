"""benchmarks/preset_learning.py: what counts as a result, how the best is named, and a study of two tiny runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Flags = Callable[..., list[str]]


def test_the_best_is_that_of_the_mean_and_the_noise_that_of_the_seeds(script: Callable[[str], Any]) -> None:
    def run(sphere: float, lr: float, seed: int, loss: float) -> dict[str, Any]:
        more = {"val_bits_per_byte": loss / 2, "tokens": 2_000_000, "steps": 500}
        return {"sphere": sphere, "lr": lr, "seed": seed, "val_loss": loss, **more}

    runs = [run(0.0, 0.004, 1, 5.1), run(0.0, 0.004, 0, 5.0), run(0.0, 0.008, 0, 5.04), run(1.0, 0.016, 0, 4.7)]
    summary, table = script("preset_learning").tabulated(runs)
    assert (summary["best_sphere"], summary["best_lr"]) == (1.0, 0.016)
    assert summary["best_without_sphere_lr"] == 0.008  # 5.04 is less than the mean of 5.0 and 5.1
    assert summary["best_minus_without_sphere"] == pytest.approx(4.7 - 5.04)
    assert summary["noise"] == pytest.approx(0.1)
    assert [row[0] for row in table["rows"]] == ["off", "off", "1"]
    assert table["rows"][0][4] == "5.0000 / 5.1000"
    assert [row[-1] for row in table["rows"]] == ["", "", "best"]


def test_points_are_trained_once_and_a_failed_run_is_no_result(
    script: Callable[[str], Any], tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("preset_learning")
    written: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(module, "write_evidence", lambda claim, payload, **_: written.append((claim, payload)))
    flags = tiny_flags("--steps 3 --eval-batches 1")
    at = flags.index("--output-dir")
    preset = tmp_path / "tiny.txt"
    preset.write_text("\n".join(json.dumps(word) for word in flags[:at] + flags[at + 2 :]), encoding="utf-8")
    command = [f"@{preset}", "--runs", str(tmp_path / "runs"), "--points", "0:0.004,1:0.016", "--jobs", "2"]
    module.main(command)
    ((claim, payload),) = written
    assert claim == "preset_learning_tiny"
    assert len(payload["samples"]) == 2
    first = [run.stat().st_mtime_ns for run in sorted((tmp_path / "runs").glob("*/metrics.jsonl"))]
    module.main(command)
    assert [run.stat().st_mtime_ns for run in sorted((tmp_path / "runs").glob("*/metrics.jsonl"))] == first
    assert written[1][1]["samples"] == payload["samples"]

    with pytest.raises(SystemExit, match=r"sphere-0-lr-200-seed-0 ended with 2"):
        module.main([*command[:-3], "0:200", "--jobs", "1"])
    assert module.finished(tmp_path / "runs" / "sphere-0-lr-200-seed-0") is None
