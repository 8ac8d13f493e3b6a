"""The report's experiments: a run on tiny shapes, red gates and failures recorded, words that follow the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm.config import C3OConfig, OptimizerConfig
from eco_llm.optim.factory import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--device", "cpu", "--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--mamba-ratio", "1",
    "--mamba-head-dim", "32", "--mamba-state-dim", "16", "--kv-latent-dim", "16", "--rope-head-dim", "8",
    "--vocab-size", "300", "--batch-size", "2", "--seq-len", "32",
]  # fmt: skip


@pytest.fixture
def reproduce(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/reproduce_report.py, which leaves this process's cache folders alone."""
    module = script("reproduce_report")
    monkeypatch.setattr(module, "set_cache_dirs", lambda: None)
    return module


def measure(reproduce: Any, results: Path, *names: str, rounds: int = 2) -> tuple[int, dict[str, Any]]:
    """(exit code, evidence) of a run of some experiments."""
    only = [word for name in names for word in ("--only", name)]
    flags = ["--rounds", str(rounds), "--seconds", "0.05", "--train-steps", "2", "--results", str(results)]
    code = reproduce.main([*only, *flags, *TINY])
    (path,) = results.glob("*/reproduce_report.json")
    return code, json.loads(path.read_text(encoding="utf-8"))


def row(evidence: dict[str, Any], start: str) -> dict[str, str]:
    """The table's row of an experiment, by column."""
    (found,) = [r for r in evidence["table"]["rows"] if r[0].startswith(start)]
    return dict(zip(evidence["table"]["header"], found, strict=True))


def test_experiments_are_measured_kept_and_added_to(reproduce: Any, tmp_path: Path) -> None:
    code, evidence = measure(reproduce, tmp_path, "hot_path", "int4")
    assert code == 0
    assert set(evidence["experiments"]) == {"hot_path", "int4"}
    for name, entry in evidence["experiments"].items():
        assert entry["gate"]["passed"]
        assert len(entry["gate"]["losses_a"]) == reproduce.GATE_STEPS
        assert entry["comparison"]["ratio_low"] <= entry["comparison"]["ratio"] <= entry["comparison"]["ratio_high"]
        assert all(value > 0 for value in entry["phases"]["a"].values())
        windows = [s for s in evidence["samples"] if s["experiment"] == name and "core_a" in s]
        assert len(windows) == 2
        assert evidence["summary"][f"{name}_gain_percent"] == pytest.approx(100 * entry["comparison"]["ratio"] - 100)
    # The slow twin reads a norm a parameter. In the product, on a CPU, whose memory the host reads anyway, PyTorch's
    # fused Adam reads each tensor's step count, and a few verdicts are read once a step.
    work = evidence["experiments"]["hot_path"]["facts"]["work"]
    parameters = evidence["experiments"]["hot_path"]["facts"]["parameters"]
    assert work["a"]["host_reads"] == parameters
    assert parameters < work["b"]["host_reads"] < parameters + 10
    assert "host reads" in row(evidence, "per-parameter")["what we saw"]
    assert row(evidence, "per-parameter")["author"] == "+13.889%"
    # Tried after every step, and never.
    int4 = evidence["experiments"]["int4"]["facts"]
    assert int4["probes"]["a"] == int4["steps"]["a"] > 0
    assert int4["probes"]["b"] == 0
    assert row(evidence, "torch.compile")["what we saw"] == "not run"

    code, more = measure(reproduce, tmp_path, "batch", "phases")
    assert code == 0
    assert more["experiments"]["hot_path"] == evidence["experiments"]["hot_path"]
    assert row(more, "batch")["what we saw"] == "not defined on a CPU: no memory cap"
    shares = more["experiments"]["phases"]["facts"]["optimizer_phase"]
    assert sum(shares.values()) == pytest.approx(100)
    assert set(shares) == {"backward", "opt_step", "zero_grad"}


def test_the_inversion_is_measured_against_exact_gradients(reproduce: Any, tmp_path: Path) -> None:
    code, evidence = measure(reproduce, tmp_path, "tolerance")
    assert code == 0
    entry = evidence["experiments"]["tolerance"]
    assert entry["facts"]["a"]["mamba_blocks"] == 1
    assert entry["facts"]["b"]["gradient_error"] < 1e-2  # recomputed, or inverted to the tolerance
    assert set(entry["phases"]) == {"a", "b", "none"}
    assert {row(evidence, "reversible inversion")["author"], row(evidence, "reversible tolerance")["author"]} == {
        "≈ 3.0 iterations", "relaxed, no figure",
    }  # fmt: skip


def test_a_red_gate_and_a_failure_are_recorded_and_end_nothing(
    reproduce: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = script("per_parameter_c3o")
    right = twin.reference_step
    monkeypatch.setattr(twin, "reference_step", lambda p, g, *rest: right(p, -g, *rest))

    def broken(bench: Any, entry: dict[str, Any]) -> None:
        entry["comparison"] = {"ratio": 2.0}
        raise RuntimeError("planted")

    monkeypatch.setitem(reproduce.EXPERIMENTS, "chunk", broken)
    code, evidence = measure(reproduce, tmp_path, "hot_path", "trust_skip", "chunk")
    assert code == 1
    red, failed = evidence["experiments"]["hot_path"], evidence["experiments"]["chunk"]
    assert not red["gate"]["passed"]
    assert "no speed is reported" in red["gate"]["said"]
    assert red["gate"]["losses_a"][0] == red["gate"]["losses_b"][0], "the same weights"
    assert red["gate"]["losses_a"][-1] != red["gate"]["losses_b"][-1]
    assert not {"comparison", "core", "phases", "facts", "also"} & set(red)
    assert not [s for s in evidence["samples"] if s["experiment"] == "hot_path" and "round" in s]
    for start in ("per-parameter", "the same, core"):
        assert row(evidence, start)["here"] == "–"
        assert row(evidence, start)["what we saw"].startswith("gate red, no speed: loss of step")
    assert failed["failed"] == "RuntimeError: planted"
    assert "comparison" not in failed
    assert row(evidence, "Mamba chunk")["what we saw"] == "failed: RuntimeError: planted"
    assert evidence["experiments"]["trust_skip"]["gate"]["passed"]
    assert evidence["summary"]["red"] == evidence["summary"]["failed"] == 1


def test_bad_arguments_are_refused_before_anything_runs(
    reproduce: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(["--results", str(tmp_path), "--d-modle", "8"]) == 2
    assert "--d-modle" in capsys.readouterr().err
    assert reproduce.main(["--results", str(tmp_path), "--rounds", "1", *TINY]) == 2
    code, _ = measure(reproduce, tmp_path, "batch")
    assert code == 0
    only = ["--only", "batch", "--results", str(tmp_path), "--rounds", "3", *TINY]
    assert reproduce.main(only) == 2
    assert "other arguments" in capsys.readouterr().err


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_the_slow_twin_is_the_same_rule(script: Any, clip: float) -> None:
    twin = script("per_parameter_c3o")
    settings = OptimizerConfig(lr=0.05, grad_clip=clip)
    results = []
    for build in (build_optimizer, twin.built_by(twin.PerParameterC3O), twin.built_by(twin.LoopC3O)):
        torch.manual_seed(0)
        matrix, vector = torch.nn.Parameter(torch.randn(9, 7)), torch.nn.Parameter(torch.zeros(7))
        groups = [
            {"params": [matrix], "weight_decay": 0.1, "name": "matrix"},
            {"params": [vector], "weight_decay": 0.0, "name": "vector"},
        ]
        optimizer = build(groups, settings, C3OConfig(), torch.device("cpu"))
        for number in range(4):
            matrix.grad, vector.grad = torch.randn(9, 7), torch.randn(7)
            if number == 2:  # refused by all alike
                matrix.grad[0, 0] = torch.nan
            norm, applied = optimizer.guarded_step(torch.zeros(()))
            assert bool(applied) == (number != 2)
        results.append((matrix.detach(), vector.detach(), norm))
        assert optimizer.metrics()["c3o_trust_capped"] >= 1  # the cap binds, so the decision is exercised
    for found in results[1:]:
        for expected, value in zip(results[0], found, strict=True):
            torch.testing.assert_close(value, expected)


def test_words_follow_the_numbers(script: Any) -> None:
    figures = script("report_figures")
    faster = {"ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3}
    slower = {"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.9}
    unsure = {"ratio": 1.2, "ratio_low": 0.9, "ratio_high": 1.3}
    assert figures.gain(slower) == "-20.0% (-30.0 to -10.0)"
    assert figures.verdict(faster, "b") == figures.verdict(slower, "a") == "For the author's choice"
    assert figures.verdict(faster, "a") == figures.verdict(slower, "b") == "Against the author's choice"
    assert figures.verdict(unsure, "a") == figures.verdict(unsure, "b") == "No difference shown"
    assert figures.bound(0.5, 1.0) == "+100.0%"
    author = figures.AUTHOR
    for before, after, percent in (
        ("baseline_tokens_per_s", "short_window_tokens_per_s", "short_window_gain_percent"),
        ("baseline_tokens_per_s", "long_run_core_tokens_per_s", "long_run_core_gain_percent"),
        ("compile_on_tokens_per_s", "compile_off_tokens_per_s", "compile_off_gain_percent"),
    ):
        assert 100 * (author[after] / author[before] - 1) == pytest.approx(author[percent], abs=1e-3)


def batch_entry(recomputed: dict[str, Any]) -> dict[str, Any]:
    """What the GPU's memory experiment records."""
    gib = 2**30
    free = {"peak_bytes": 5 * gib, "tokens_per_s": 1000.0}
    return {
        "gate": {"passed": True, "tolerance": 1e-2},
        "facts": {
            "small": 4, "large": 6, "cap_bytes": 6 * gib, "free_a": free, "capped_a": {**free, "tokens_per_s": 990.0},
            "free_b": {"peak_bytes": 7 * gib, "tokens_per_s": 1100.0}, "recomputed_b": recomputed,
        },
    }  # fmt: skip


def test_the_memory_experiments_row(script: Any) -> None:
    figures = script("report_figures")
    fits = batch_entry({"peak_bytes": 4 * 2**30, "tokens_per_s": 891.0})
    rows = {r[0]: r for r in figures.table({"batch": fits}, on_gpu=True)["rows"]}
    *_, here, saw, why = rows["batch 4 → 6"]
    assert here == "4 fits, 6 does not"
    assert "peaks 5.00 and 7.00 GiB; under 6.00 GiB" in saw
    assert "+10.0%" in why
    assert "at 891 tokens/s (-10.0%)" in why
    rows = {r[0]: r for r in figures.table({"batch": batch_entry({"out_of_memory": True})}, on_gpu=True)["rows"]}
    assert "6 does not fit either" in rows["batch 4 → 6"][-1]


def test_every_experiment_is_rendered_with_its_own_origin(script: Any) -> None:
    render = script("render")
    measured = {"date": "2026-11-23T00:00:00+00:00", "commit": "abcdef0123", "dirty": False, "load_average": 0.5}
    comparison = {"median_a": 0.2, "median_b": 0.1, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1, "rounds": 10,
                  "steps_per_window": 3}  # fmt: skip
    experiments = {
        "good": {"a": "x", "b": "y", "gate": {"passed": True, "tolerance": 1e-4}, "comparison": comparison},
        "red": {"a": "x", "b": "y", "gate": {"passed": False, "tolerance": 1e-4, "said": "loss differs"}},
        "bad": {"failed": "RuntimeError: planted"},
        "none": {"undefined": "not here"},
    }
    item = {
        "hardware": "cpu",
        "environment": {"date": "2020-01-01", "commit": None, "dirty": None, "source_sha256": "f" * 9},
        "experiments": {name: {**entry, "measured": measured} for name, entry in experiments.items()},
    }  # fmt: skip
    lines = render.experiments_table([item]).splitlines()
    assert lines[2].startswith(
        "| cpu | `good` | x | y | 0.2 s | 0.1 s | 2.000 | 1.900 – 2.100 | 10 × 3 | within 0.0001"
    )
    assert all(line.endswith("| 0.5 | 2026-11-23 | abcdef01 |") for line in lines[2:])
    assert "red: loss differs" in lines[3]
    assert "2.000" not in lines[3]
    assert "| failed |" in lines[4]
