"""Sweep and compare on a GPU: a batch that does not fit, and two live runs that share the card."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eco_llm.cli.main import main
from eco_llm.cli.turns import PLANTED_DELAY
from eco_llm.proof.compare import REPORT_FILE
from eco_llm.proof.report import write_report
from eco_llm.proof.runs import Program

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
Flags = Callable[..., list[str]]

CAPPED = Program((sys.executable, str(Path(__file__).with_name("capped_train.py"))), Program.this().environment)


def test_a_batch_of_six_does_not_fit_where_four_do(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The report's own incident, with a real allocator. The cap comes from what both batches take without one."""
    monkeypatch.setattr(Program, "this", staticmethod(lambda: CAPPED))
    model = (
        "--d-model 256 --n-layers 6 --n-heads 4 --mamba-ratio 5 --mamba-state-dim 64 --seq-len 2048 --cuda-graph off"
    )
    window = "--perf-warmup-steps 1 --perf-measure-steps 2 --device cuda"

    def sweep(name: str) -> tuple[int, dict[str, Any]]:
        code = main(["sweep", *tiny_flags(f"{model} {window}", run=name), "--batch-size", "4,6"])
        return code, json.loads((tmp_path / name / "perf" / "sweep.json").read_text(encoding="utf-8"))

    code, free = sweep("free")
    assert (code, free["largest_stable_batch"]) == (0, 6)
    memory = [
        json.loads((tmp_path / "free" / point["evidence"]).read_text(encoding="utf-8"))["memory"]
        for point in free["points"]
    ]
    enough, too_little = memory[0]["gpu_memory_reserved_peak_gib"], memory[1]["gpu_memory_peak_gib"]
    assert enough < too_little, "no cap parts these batches"
    monkeypatch.setenv("ECO_TEST_CAP_GIB", str((enough + too_little) / 2))
    code, capped = sweep("capped")
    assert (code, capped["largest_stable_batch"], capped["fastest_point"]) == (0, 4, "batch-size-4")
    four, six = capped["points"]
    assert (four["status"], six["status"], six["exit_code"]) == ("done", "out_of_memory", 3)
    crash = json.loads((tmp_path / "capped" / six["crash_reports"][0]).read_text(encoding="utf-8"))
    assert crash["kind"] == "out_of_memory"
    assert crash["memory"]["device_total_bytes"] > 0
    assert not (tmp_path / "capped" / "perf" / "sweep" / "batch-size-6").exists()
    assert "batch-size-6: out of memory" in capsys.readouterr().out
    report = write_report([tmp_path / "capped"])[0].read_text(encoding="utf-8")
    assert "None: no crash report" not in report


@pytest.mark.parametrize(("planted", "verdict"), [("b:0.3", "slower"), ("a:0.3", "faster")])
def test_two_live_runs_take_turns_on_one_gpu(
    planted: str, verdict: str, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLANTED_DELAY, planted)
    settings = "--device cuda --batch-size 4 --seq-len 64 --lr 4e-3 --perf-warmup-steps 5"
    sides = ["--a", "", "--b", "", "--pairs", "40", "--window-steps", "5"]
    assert main(["compare", *tiny_flags(settings), *sides]) == 0
    found = json.loads((tmp_path / "run" / REPORT_FILE).read_text(encoding="utf-8"))
    assert (found["verdict"], found["mode"], found["gate"]["passed"]) == (verdict, "in turns", True)
    assert found["environment"]["gpu"] is not None
    for side in "ab":
        assert found[side]["resolved"]["device"].startswith("cuda")
        assert found[side]["peak_memory_gib"] > 0
        assert found[side]["tail_forward_s"] > 0
    assert len(found["samples"]) == 40
