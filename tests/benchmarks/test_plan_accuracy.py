"""The claim script for the plan: its configurations are accepted, its evidence is what the tests of the plan read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eco_llm.instant.plan.search import job_of, modes_of
from eco_llm.instant.plan.sizes import Job
from eco_llm.instant.plan.step import estimate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def accuracy(script: Callable[[str], Any]) -> Any:
    """benchmarks/plan_accuracy.py."""
    return script("plan_accuracy")


def test_every_configuration_is_accepted_and_all_modes_are_there(accuracy: Any) -> None:
    jobs = {name: job_of(accuracy.settings_of(flags)) for name, flags in accuracy.CONFIGURATIONS.items()}
    assert len(jobs) >= 12
    modes = {mode for job in jobs.values() for mode in job.modes}
    assert modes == {"none", "recompute", "compress", "fixed-point", "coupled"}
    assert {job.compiled for job in jobs.values()} == {job.graph for job in jobs.values()} == {True, False}
    for job in jobs.values():
        assert 0 < estimate(job).peak < 139 * 2**30  # an H200


def test_evidence_gives_the_job_back(accuracy: Any) -> None:
    name = "compress 16x1024, 4 bits"
    config = accuracy.settings_of(accuracy.CONFIGURATIONS[name])
    job = job_of(config)
    stored = json.loads(json.dumps(accuracy.job_fields(job)))
    assert Job(config.model, modes=modes_of(config.instant.instant_mode, config.model), **stored) == job


def test_the_payload_says_how_far_off_the_plan_was(accuracy: Any) -> None:
    sample = {
        "name": "x", "parameters": 10**6, "measured_peak": 2**30, "estimated_peak": 1.1 * 2**30, "error": 0.1,
        "measured_reserved": 2**31, "estimated_reserved": 2**31, "reserved_error": 0.0, "outside": 2**29,
    }  # fmt: skip
    payload = accuracy.payload_of([sample, {**sample, "error": -0.01}])
    assert payload["summary"]["worst_error"] == 0.1
    assert payload["summary"]["within_5_percent"] == 1
    assert payload["table"]["rows"][0][4] == "+10.0%"


def test_it_refuses_a_machine_without_a_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_accuracy.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr
