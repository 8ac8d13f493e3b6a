"""Claim: how long from typing the command to the end of the first step, from cold and from warm caches.

    python benchmarks/start_time.py [--rounds N] [--modes eager,compiled,eager_graph,compiled_graph] [FLAGS OF train …]

Runs `eco_train FLAGS --steps 1` in processes of their own, with the default GPU profile where there is a GPU and the
quickstart elsewhere, on data prepared beforehand. Cold: the kernel caches (.runtime_cache's two and CUDA's own) are
empty folders; the files of Python and PyTorch are in the page cache all the same. Warm: the same folders, again; the
median of N rounds is reported. Each process also says where its time went (`--start-marks`, the private mode in which
this script calls itself).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write_evidence

MODES = {
    "eager": ["--no-torch-compile", "--cuda-graph", "off"],
    "compiled": ["--torch-compile", "--cuda-graph", "off"],
    "eager_graph": ["--no-torch-compile", "--cuda-graph", "auto"],
    "compiled_graph": ["--torch-compile", "--cuda-graph", "auto"],
}
MARKS = ("arguments", "import_torch", "import_trainer", "device_and_data", "model_and_hooks", "prepare", "first_step")


def train_with_marks(flags: list[str]) -> int:
    """Train as `eco_train` would, and print when each part of the start was over, seconds since BEGAN_AT."""
    began = float(os.environ["BEGAN_AT"])
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks.setdefault(name, time.time() - began)

    from eco_llm.cli.args_file import expand
    from eco_llm.cli.parse import parse
    from eco_llm.cli.train import TrainCommand
    from eco_llm.runtime import set_cache_dirs

    config = parse(TrainCommand, expand(flags), prog="eco_train train").config
    config.validate()
    set_cache_dirs()
    mark("arguments")
    import torch

    mark("import_torch")
    from eco_llm.training import launch
    from eco_llm.training.sigma_trainer import SigmaTrainer

    mark("import_trainer")
    build, turn = launch._Launch._build, SigmaTrainer._turn

    def marked_build(self: Any, *args: Any) -> Any:
        mark("device_and_data")
        built = build(self, *args)
        mark("model_and_hooks")
        return built

    def marked_turn(self: Any, step: int) -> None:
        step_prepare = self._step.prepare

        def prepare() -> None:
            step_prepare()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            mark("prepare")

        self._step.prepare = prepare
        turn(self, step)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        mark("first_step")

    launch._Launch._build = marked_build  # type: ignore[method-assign, assignment]
    SigmaTrainer._turn = marked_turn  # type: ignore[method-assign]
    code = launch.train(config, command=sys.argv)
    from torch._dynamo.utils import counters

    cached = {k: int(v) for k, v in counters["aot_autograd"].items() if "cache" in k}
    cached |= {k: int(v) for k, v in counters["inductor"].items() if "cache" in k}
    print("MARKS " + json.dumps({"marks": marks, "caches": cached}))
    return int(code)


def start(flags: list[str], caches: Path, run: Path) -> dict[str, Any]:
    """One process: seconds each part of its start took, and their sum `total`."""
    folders = {
        "TRITON_CACHE_DIR": caches / "triton",
        "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
        "CUDA_CACHE_PATH": caches / "cuda",
    }
    environment = {**os.environ, **{name: str(path) for name, path in folders.items()}, "BEGAN_AT": repr(time.time())}
    command = [sys.executable, __file__, "--start-marks", *flags, "--output-dir", str(run), "--no-resume"]
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("MARKS ")]
    if done.returncode != 0 or not said:
        raise RuntimeError(f"eco_train ended with exit code {done.returncode}:\n{done.stdout}")
    report = json.loads(said[-1].removeprefix("MARKS "))
    marks = [0.0, *(report["marks"][name] for name in MARKS)]
    parts = {f"{name}_s": after - before for name, before, after in zip(MARKS, marks, marks[1:], strict=False)}
    return {**parts, "total_s": marks[-1], "caches": report["caches"]}


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    rounds, modes = 3, list(MODES)
    while argv[:1] and argv[0] in ("--rounds", "--modes"):
        if argv[0] == "--rounds":
            rounds = int(argv[1])
        else:
            modes = argv[1].split(",")
        argv = argv[2:]
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        modes = [mode for mode in modes if not mode.endswith("_graph")]
    profile = argv or (["@train_sigma_args.txt"] if device == "cuda" else ["@presets/quickstart_cpu.txt"])
    once = ["--steps", "1", "--eval-interval", "0", "--sample-tokens", "0"]
    samples: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        flags = [*profile, *once, "--data-cache", str(place / "data")]
        start([*flags, *MODES["eager"]], place / "unused", place / "run")  # prepares the data, fills the page cache
        for mode in modes:
            caches = place / mode
            taken = [start([*flags, *MODES[mode]], caches, place / "run") for _ in range(1 + rounds)]
            samples += [{"mode": mode, "start": "warm" if i else "cold", **t} for i, t in enumerate(taken)]
            summary[f"{mode}_cold_s"] = taken[0]["total_s"]
            summary[f"{mode}_warm_s"] = statistics.median(t["total_s"] for t in taken[1:])
            for label, t in (("cold", taken[0]), ("warm", taken[-1])):
                parts = "  ".join(f"{name} {t[f'{name}_s']:.2f}" for name in MARKS)
                print(f"{mode:>15} {label}  total {t['total_s']:6.2f} s = {parts}  {t['caches']}", flush=True)
    print(json.dumps(summary, indent=1))
    name = "start_time" if not argv else "start_time_custom"
    payload = {"flags": [*profile, *once], "unit": "s", "summary": summary, "samples": samples}
    print(write_evidence(name, payload, device=device))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start-marks"]:
        sys.exit(train_with_marks(sys.argv[2:]))
    main(sys.argv[1:])
