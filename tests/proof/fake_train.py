"""Stands in for `eco_train` where a test is about what starts it: leaves what a run of its batch size would."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

args = {}
for i, word in enumerate(sys.argv[1:], 1):
    name, equals, value = word.partition("=")
    args[name] = value if equals else sys.argv[i + 1] if i + 1 < len(sys.argv) else ""
run, batch = Path(args["--output-dir"]), int(args["--batch-size"])
behaviour = json.loads(os.environ.get("FAKE", "{}")).get(str(batch), "done")
run.mkdir(parents=True)
with (run.parent / "started.txt").open("a") as log:
    log.write(f"{batch}\n")
(run / "checkpoints").mkdir()
(run / "checkpoints" / "big").write_bytes(b"0" * 1000)
if behaviour == "slow":
    time.sleep(60)
if behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "refused":
    sys.stderr.write("eco_train: error: the text is too short\n")
    sys.exit(2)
if behaviour in ("out_of_memory", "crashed"):
    (run / "errors").mkdir()
    report = {"kind": behaviour, "exception": "RuntimeError", "message": "no room\nat all"}
    (run / "errors" / "crash_20260101T000000_step1.json").write_text(json.dumps(report))
    sys.exit({"out_of_memory": 3, "crashed": 1}[behaviour])
(run / "metrics.jsonl").write_text(
    json.dumps({"step": 1, "loss": 5.0, "step_time_s": 0.5, "memory_peak_gib": 1.5}) + "\n"
)
phases = ("data", "forward", "backward", "opt_step", "zero_grad")
baseline = {
    "avg_effective_tokens_per_s": 100.0 * batch if batch < 8 else 10.0, "avg_core_tokens_per_s": 1.0,
    "avg_step_time_s": 1.0, "avg_core_step_time_s": 1.0, "avg_gpu_util_percent": None,
    **{f"avg_phase_{p}_s": 0.1 for p in phases},
    "tokens_per_step": batch, "environment": {"commit": "abc"},
}  # fmt: skip
(run / "perf").mkdir()
(run / "perf" / "baseline_throughput.json").write_text(json.dumps(baseline))
