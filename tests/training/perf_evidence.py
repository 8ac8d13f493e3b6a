"""What a measured and traced run must leave in perf/; by hand: `python tests/training/perf_evidence.py RUN`."""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PHASES = ("data", "forward", "backward", "opt_step", "zero_grad")
RATES = ("avg_effective_tokens_per_s", "avg_core_tokens_per_s")
TIMES = ("step_time_s", "core_step_time_s", *(f"phase_{name}_s" for name in (*PHASES, "optim", "train")))
GPU = ("avg_gpu_util_percent", "avg_gpu_power_watts", "gpu_memory_used_gib")
ALLOCATOR = tuple(f"gpu_memory_{what}_gib" for what in ("allocated", "peak", "reserved", "reserved_peak"))


def check(run: Path, *, ignore: Iterable[str] = (), phases_within: float = 0.02) -> dict[str, Any]:
    """Assert that every number, range and kernel is there; a summary for people.

    Args:
        run: made with --perf-profile-enable and --perf-profiler-steps, the window before the traced steps.
        ignore: of GPU, what this card does not offer.
        phases_within: of the core step is what phases leave uncovered, in the median step of the window.
    """
    resolved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    model, device = resolved["config"]["model"], resolved["resolved"]["device"]
    on_gpu = device.startswith("cuda")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    perf = run / "perf"
    baseline = json.loads((perf / "baseline_throughput.json").read_text(encoding="utf-8"))
    bottlenecks = json.loads((perf / "window_10m_bottlenecks.json").read_text(encoding="utf-8"))

    for content in (baseline, bottlenecks):
        assert content["device_time_mode"] == ("events" if on_gpu else "host")
        assert content["environment"]["gpu"] is not None if on_gpu else content["environment"]["gpu"] is None
        for key in GPU:
            known = on_gpu and key not in ignore
            assert (content[key] is not None) == known, f"{key} is {content[key]}"
        assert all((content["memory"].get(key, 0) > 0) == on_gpu for key in ALLOCATOR), content["memory"]
        assert all(content[key] > 0 for key in RATES)
    measured = [r for r in rows if baseline["first_step"] <= r["step"] <= baseline["last_step"]]
    assert len(measured) == baseline["measure_steps"] == len(baseline["samples"])
    for key in TIMES:
        assert close(baseline[f"avg_{key}"], sum(r[key] for r in measured) / len(measured), 1e-9), key
    covered = [sum(r[f"phase_{name}_s"] for name in PHASES) / r["core_step_time_s"] for r in baseline["samples"]]
    assert close(statistics.median(covered), 1, phases_within), covered
    assert baseline["avg_core_step_time_s"] <= baseline["avg_step_time_s"] * (1 + 1e-9)
    assert baseline["profiled_steps_in_window"] == 0

    for part, stages in (
        ("stages", {"data", "train", "other", "loop"}),
        ("train_phase", {"forward", "optim"}),
        ("optimizer_phase", {"backward", "opt_step", "zero_grad"}),
    ):
        shares = [entry["percent"] for entry in bottlenecks[part]]
        assert {entry["stage"] for entry in bottlenecks[part]} == stages
        assert shares == sorted(shares, reverse=True)
        assert close(sum(shares), 100, 1e-9), part
    assert bottlenecks["dominant_stage"] == bottlenecks["stages"][0]["stage"]
    profiler = bottlenecks["profiler"]
    assert profiler["clock"] == ("self_device_time" if on_gpu else "self_cpu_time")
    assert profiler["rows"] and profiler["memory_rows"]  # noqa: PT018  (both lists)
    assert close(sum(row["percent"] for row in profiler["rows"]), 100, 0.5)

    with gzip.open(perf / profiler["trace"], "rt", encoding="utf-8") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    names = {f"eco/{name}": 0 for name in PHASES}
    for index in range(model["n_layers"]):
        period = model["mamba_ratio"] + model["attention_ratio"]
        kind = "mamba" if index % period < model["mamba_ratio"] else "mla"
        names |= {f"eco/block_{index:02d}_{kind}": 0, f"eco/block_{index:02d}_{kind}_backward": 0}
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in names]
    for event in ranges:
        names[event["name"]] += 1
    too_few = {name: count for name, count in names.items() if count < profiler["steps"]}
    assert not too_few, f"ranges that are not in each of {profiler['steps']} traced steps: {too_few}"
    unknown = {e["name"] for e in events if e["name"].startswith("eco/block_")} - names.keys()
    assert not unknown, f"ranges of no block: {unknown}"
    if on_gpu:
        ran = {e["args"].get("correlation") for e in events if e.get("cat") == "kernel"} - {None}
        launched = [
            e for e in events
            if e.get("cat") in ("cuda_runtime", "cuda_driver") and e["args"].get("correlation") in ran
        ]  # fmt: skip
        inside: dict[str, int] = dict.fromkeys(names, 0)
        for outer in ranges:
            begin, end = outer["ts"], outer["ts"] + outer["dur"]
            inside[outer["name"]] += sum(e["tid"] == outer["tid"] and begin <= e["ts"] <= end for e in launched)
        empty = {name for name in names if not inside[name] and name.startswith("eco/block_")}
        assert not empty, f"ranges in which no kernel was launched: {empty}"
    return {
        "device": device,
        "events": len(events),
        "kernels": sum(e.get("cat") == "kernel" for e in events),
        "ranges on the GPU's rows": sum(e.get("cat") == "gpu_user_annotation" for e in events),
        "ranges": names,
        **{key: baseline[key] for key in (*RATES, *GPU, "avg_step_time_s", "avg_core_step_time_s")},
    }


def close(a: float, b: float, relative: float) -> bool:
    return abs(a - b) <= relative * abs(b)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(check(Path(sys.argv[1])), indent=1) + "\n")
