"""The default profile on a GPU: window, trace and counters, as the report's own command line writes them."""

from __future__ import annotations

import json
from pathlib import Path

import perf_evidence
import pytest
import torch

from eco_llm.cli.main import main
from eco_llm.perf.device_counters import DeviceCounters

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("graph", ["on", "off"])
def test_the_default_profile_measures_and_traces_itself(
    graph: str, corpus: Path, data_cache: Path, tmp_path: Path
) -> None:
    """18 blocks, 4 × 512 tokens. The window is long beside NVML's fifth of a second."""
    window = "--perf-profile-enable --perf-warmup-steps 10 --perf-measure-steps 80 --perf-profiler-steps 2 --steps 100"
    places = ["--data", str(corpus), "--data-cache", str(data_cache), "--output-dir", str(tmp_path / "run")]
    small = "--vocab-size 300 --eval-interval 0 --sample-tokens 0 --no-torch-compile"  # the corpus is
    flags = [f"@{ROOT / 'train_sigma_args.txt'}", *places, *window.split(), *small.split(), "--cuda-graph", graph]
    assert main(flags) == 0
    with DeviceCounters(torch.device("cuda")) as counters:
        counters.sample_now()
        seen = counters.read()
    offered = {
        "avg_gpu_util_percent": seen.gpu_util_percent,
        "avg_gpu_power_watts": seen.gpu_power_watts,
        "gpu_memory_used_gib": seen.gpu_memory_used_gib,
    }
    found = perf_evidence.check(tmp_path / "run", ignore=[key for key, value in offered.items() if value is None])
    assert found["kernels"] > 18 * 10
    assert sum(name.endswith("_backward") and "block" in name for name in found["ranges"]) == 18


def test_a_trace_holds_no_kernels_of_steps_before_it(corpus: Path, data_cache: Path, tmp_path: Path) -> None:
    """A host that is ahead has replays queued when the profiler starts: twice the steps, twice the kernels, no more."""
    kernels = []
    for traced in (1, 2):
        window = f"--perf-profile-enable --perf-warmup-steps 2 --perf-measure-steps 20 --perf-profiler-steps {traced}"
        places = ["--data", str(corpus), "--data-cache", str(data_cache), "--output-dir", str(tmp_path / str(traced))]
        small = "--vocab-size 300 --eval-interval 0 --sample-tokens 0 --no-torch-compile --cuda-graph on --steps 26"
        assert main([f"@{ROOT / 'train_sigma_args.txt'}", *places, *window.split(), *small.split()]) == 0
        perf = json.loads((tmp_path / str(traced) / "perf" / "window_10m_bottlenecks.json").read_text(encoding="utf-8"))
        table = perf["profiler"]
        assert table["steps"] == traced
        kernels.append(sum(row["calls"] for row in table["rows"]))
    assert kernels[1] == pytest.approx(2 * kernels[0], rel=0.05)
