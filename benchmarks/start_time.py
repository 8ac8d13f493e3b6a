"""Claim: how long from typing the command to the end of the first step, from cold and from warm caches.

    python benchmarks/start_time.py [--rounds N] [--modes eager,compiled,eager_graph,compiled_graph] [FLAGS OF train …]

Runs `eco_train FLAGS --steps 1` in processes of their own, with the default GPU profile where there is a GPU and the
quickstart elsewhere, on data prepared beforehand (kept where FLAGS name a --data-cache). Cold: the kernel caches
(.runtime_cache's two and CUDA's own) are empty folders; the files of Python and PyTorch are in the page cache all the
same. Warm: the same folders, again; the median of N rounds is reported. The evidence is written anew after each mode.

Each process runs the command itself and also says where its time went (`--start-marks`, the private mode in which this
script calls itself): marks, which follow one another and add up to the total, and spans, the calls and imports inside
them. A span holds those that it encloses, and ends when the device is idle; threads of the start have theirs beside the
others. The start ends with the last mark: what the process does or imports later (a checkpoint, this script's own
questions) is no part of it.

Python's bytecode of all packages is there, as pip leaves it and Python keeps it; here in a folder of its own
(PYTHONPYCACHEPREFIX), filled by the run that prepares the data and by the cold start. One more warm start of each mode
has none and keeps none (PYTHONDONTWRITEBYTECODE), as in some containers: it compiles PyTorch's sources first, and
`eco_train doctor` warns of that.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MODES = {
    "eager": ["--no-torch-compile", "--cuda-graph", "off"],
    "compiled": ["--torch-compile", "--cuda-graph", "off"],
    "eager_graph": ["--no-torch-compile", "--cuda-graph", "auto"],
    "compiled_graph": ["--torch-compile", "--cuda-graph", "auto"],
}
MARKS = ("arguments", "import_torch", "import_trainer", "device_and_data", "model_and_hooks", "prepare", "first_step")
IMPORTS = ("torch", "triton", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard")
# span → what is called, as module:attribute, looked up when the trainer has been imported
CALLS = {
    "device": "eco_llm.runtime:Runtime.detect",
    "data": "eco_llm.training.launch:prepare",
    "seed_context_compiler": "eco_llm.runtime:Runtime.setup",
    "model": "eco_llm.training.launch:SigmaLLM",
    "optimizer": "eco_llm.training.launch:build_optimizer",
    "loader": "eco_llm.training.launch:TokenLoader",
    "compile_blocks": "eco_llm.model.sigma_llm:SigmaLLM.compile_blocks",
    "nvml": "eco_llm.training.launch:DeviceCounters",
    "settings": "eco_llm.training.launch:_Launch._record_settings",
    "environment": "eco_llm.training.launch:collect_environment",
    "tensorboard": "eco_llm.training.launch:TensorBoard",
    "step": "eco_llm.training.launch:_Launch._make_step",
    "optimizer_state": "eco_llm.optim.update:Update.make_capturable",
    "warm_up": "eco_llm.training.graph:CudaGraph.warm_up",
    "capture": "eco_llm.training.graph:CudaGraph.capture",
    "core_step": "eco_llm.training.step:TrainStep.run",
    "core_replay": "eco_llm.training.graph:GraphedStep.run",
}
COLD, WARM, NO_BYTECODE = "cold", "warm", "warm, no bytecode"
THREADS = {"wake_gpu": "_wake", "ready_triton": "_ready_triton"}  # beside the others; functions of eco_llm.head_start


class Clock:
    """Seconds since `began`, of marks and of spans: each span's calls one after another, as [begin, end]."""

    def __init__(self, began: float) -> None:
        self._began = began
        self.marks: dict[str, float] = {}
        self.spans: dict[str, list[list[float]]] = {}
        self.processor = 0.0  # seconds of this process at the last mark
        self._over = False

    def now(self) -> float:
        return time.time() - self._began

    def mark(self, name: str) -> None:
        """The first call counts, and the last mark ends the start."""
        if name not in self.marks:
            self.marks[name] = self.now()
            self.processor = time.process_time()
        self._over |= name == MARKS[-1]

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self.now()
        try:
            yield
        finally:
            if not self._over:
                if threading.current_thread() is threading.main_thread():
                    _idle()
                self.spans.setdefault(name, []).append([begin, self.now()])

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls in a span."""

        @functools.wraps(function)
        def spanned(*args: Any, **keywords: Any) -> Any:
            with self.span(name):
                return function(*args, **keywords)

        return spanned


def _idle() -> None:
    """Wait for the device, if one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class TimedImports(importlib.abc.MetaPathFinder):
    """Times the imports of some modules, and calls what waits for the end of one."""

    def __init__(self, clock: Clock, names: tuple[str, ...], after: dict[str, Callable[[], None]]) -> None:
        self._clock, self._names, self._after = clock, names, after
        self._asking: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname in self._asking or not (fullname in self._names or fullname in self._after):
            return None
        self._asking.add(fullname)  # the next line asks every finder, this one too
        spec = importlib.util.find_spec(fullname)
        self._asking.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def timed(module: ModuleType) -> None:
            with self._clock.span(f"import {fullname}"):
                execute(module)
            if fullname in self._after:
                self._after[fullname]()

        spec.loader.exec_module = timed  # type: ignore[method-assign]
        return spec


def train_with_marks(flags: list[str]) -> int:
    """Train as `eco_train` does, and print when each part of the start was over, seconds since BEGAN_AT."""
    clock = Clock(float(os.environ["BEGAN_AT"]))
    after = {"eco_llm.head_start": lambda: _observe_threads(clock), "eco_llm.training.launch": lambda: _observe(clock)}
    sys.meta_path.insert(0, TimedImports(clock, IMPORTS, after))
    from eco_llm.cli.main import main as eco_train

    code = eco_train(["train", *flags])
    if code != 0:
        return code
    torch_import = clock.spans["import torch"][0]
    clock.marks |= {"arguments": torch_import[0], "import_torch": torch_import[1]}
    from eco_llm.perf import environment

    spent, cached = _of_compiler()
    where = json.loads((_run_directory(flags) / "config.json").read_text(encoding="utf-8"))["resolved"]["device"]
    report = {
        "marks": clock.marks,
        "spans": clock.spans,
        "compiler": spent,
        "caches": cached,
        "compiler_imported": "import torch._dynamo" in clock.spans,
        "processor_s": clock.processor,  # what follows the step, a checkpoint, is not the start
        "environment": environment.collect(where),
    }
    print("MARKS " + json.dumps(report))
    return 0


def _of_compiler() -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of torch.compile's phases and how often its caches were asked; nothing of a process that has none."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return {}, {}
    spent = {name: sum(seconds) for name, seconds in dynamo.compilation_time_metrics.items()}
    counted = [*dynamo.counters["aot_autograd"].items(), *dynamo.counters["inductor"].items()]
    return spent, {name: int(times) for name, times in counted if "cache" in name}


def _run_directory(flags: list[str]) -> Path:
    return Path(flags[len(flags) - 1 - flags[::-1].index("--output-dir") + 1])


def _observe_threads(clock: Clock) -> None:
    head_start = sys.modules["eco_llm.head_start"]
    for name, function in THREADS.items():
        setattr(head_start, function, clock.around(name, getattr(head_start, function)))


def _observe(clock: Clock) -> None:
    """Put clocks into the trainer, which has just been imported."""
    clock.mark("import_trainer")
    for name, where in CALLS.items():
        module, _, attribute = where.partition(":")
        owner: Any = sys.modules[module]
        *path, last = attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        function = getattr(owner, last)
        spanned: Any = clock.around(name, function)
        if isinstance(owner, type) and isinstance(owner.__dict__[last], staticmethod):
            spanned = staticmethod(spanned)
        setattr(owner, last, spanned)

    from eco_llm.training import launch
    from eco_llm.training.sigma_trainer import SigmaTrainer

    build, turn = launch._Launch._build, SigmaTrainer._turn

    def marked_build(self: Any, *args: Any) -> Any:
        clock.mark("device_and_data")
        built = build(self, *args)
        _idle()
        clock.mark("model_and_hooks")
        return built

    def marked_turn(self: Any, step: int) -> None:
        step_prepare = self._step.prepare

        def prepare() -> None:
            step_prepare()
            _idle()
            clock.mark("prepare")

        self._step.prepare = prepare
        turn(self, step)
        _idle()
        clock.mark("first_step")

    launch._Launch._build = marked_build  # type: ignore[method-assign, assignment]
    SigmaTrainer._turn = marked_turn  # type: ignore[method-assign]


def start(flags: list[str], caches: Path, run: Path, bytecode: Path | None) -> dict[str, Any]:
    """One process: seconds each part of its start took, their sum `total_s`, spans, and its `environment`.

    Args:
        flags: of `eco_train train`.
        caches: the folder of the kernel caches.
        run: the run directory, removed afterwards.
        bytecode: where Python finds and keeps it; None: nowhere.

    Raises:
        RuntimeError: it ended badly, or said nothing.
    """
    folders = {
        "TRITON_CACHE_DIR": caches / "triton",
        "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
        "CUDA_CACHE_PATH": caches / "cuda",
    }
    environment = {**os.environ, **{name: str(path) for name, path in folders.items()}, "BEGAN_AT": repr(time.time())}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode or caches / "no_bytecode")
    environment["PYTHONDONTWRITEBYTECODE"] = "" if bytecode else "1"  # empty: as if unset
    command = [sys.executable, __file__, "--start-marks", *flags, "--no-resume", "--output-dir", str(run)]
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(run, ignore_errors=True)  # gigabytes of checkpoint
    said = [line for line in done.stdout.splitlines() if line.startswith("MARKS ")]
    if done.returncode != 0 or not said:
        raise RuntimeError(f"eco_train ended with exit code {done.returncode}:\n{done.stdout}")
    report = json.loads(said[-1].removeprefix("MARKS "))
    reached = report.pop("marks")
    marks = [0.0, *(reached[name] for name in MARKS)]
    parts = {f"{name}_s": after - before for name, before, after in zip(MARKS, marks, marks[1:], strict=False)}
    return {**parts, "total_s": marks[-1], **report}


def show(label: str, taken: dict[str, Any]) -> None:
    """Print one start: its parts, its spans in the order in which they began, what compiling spent."""
    compiler = "imported" if taken["compiler_imported"] else "not imported"
    print(f"{label}  total {taken['total_s']:.2f} s, processor {taken['processor_s']:.2f} s, compiler {compiler}")
    print("  parts     " + "  ".join(f"{name} {taken[f'{name}_s']:.2f}" for name in MARKS))
    calls = sorted((begin, end, name) for name, times in taken["spans"].items() for begin, end in times)
    print("  spans     " + "  ".join(f"{name} {end - begin:.2f}" for begin, end, name in calls if end - begin >= 0.005))
    spent = sorted(taken["compiler"].items(), key=lambda item: -item[1])[:10]
    if spent or taken["caches"]:
        print("  compiler  " + "  ".join(f"{name} {seconds:.2f}" for name, seconds in spent), taken["caches"])
    sys.stdout.flush()


def table_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians in seconds, a row for each mode's cold and warm starts, and where the time goes."""
    header = ["mode", "caches", "starts", "typing to the end of step 1, s", "import of torch", "import of its compiler",
              "compiling or loading, capture", "all else"]  # fmt: skip
    rows = []
    for mode, caches in dict.fromkeys((s["mode"], s["start"]) for s in samples):
        these = [s for s in samples if (s["mode"], s["start"]) == (mode, caches)]
        parts = []
        for one in these:
            torch = one["import_torch_s"]
            compiler = sum(
                end - begin
                for name in ("import torch._dynamo", "import torch._inductor.compile_fx")
                for begin, end in one["spans"].get(name, [])
            )
            rest = one["total_s"] - torch - compiler - one["prepare_s"]
            parts.append((one["total_s"], torch, compiler, one["prepare_s"], rest))
        medians = [f"{statistics.median(column):.1f}" for column in zip(*parts, strict=True)]
        rows.append([mode, caches, len(these), *medians])
    return {"header": header, "rows": rows}


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    from common import write_evidence

    from eco_llm.perf.environment import command_line

    rounds, modes = 3, list(MODES)
    while argv[:1] and argv[0] in ("--rounds", "--modes"):
        if argv[0] == "--rounds":
            rounds = int(argv[1])
        else:
            modes = argv[1].split(",")
        argv = argv[2:]
    import torch

    on_gpu = torch.cuda.is_available()  # asked only: this process stays off the device
    if not on_gpu:
        modes = [mode for mode in modes if not mode.endswith("_graph")]
    profile = argv or (["@train_sigma_args.txt"] if on_gpu else ["@presets/quickstart_cpu.txt"])
    once = ["--steps", "1", "--eval-interval", "0", "--sample-tokens", "0"]
    name = "start_time" if not argv else "start_time_custom"
    samples: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        kept = any(flag.startswith("--data-cache") for flag in argv)
        flags = [*profile, *once, *([] if kept else ["--data-cache", str(place / "data")])]
        # Prepares the data and fills the page cache; on the CPU, where no kernel needs compiling.
        bytecode, run = place / "bytecode", place / "run"
        start([*flags, *MODES["eager"], "--device", "cpu", "--batch-size", "1"], place / "unused", run, bytecode)
        for mode in modes:
            for kind in (COLD, *[WARM] * rounds, NO_BYTECODE):
                kept_at = None if kind == NO_BYTECODE else bytecode
                one = start([*flags, *MODES[mode]], place / mode, run, kept_at)
                environment = {**one.pop("environment"), "command": command_line(sys.argv)}
                samples.append({"mode": mode, "start": kind, **one})
                show(f"{mode} {kind}", one)
            for key, kind in (("cold", COLD), ("warm", WARM), ("warm_without_bytecode", NO_BYTECODE)):
                times = [s["total_s"] for s in samples if (s["mode"], s["start"]) == (mode, kind)]
                summary[f"{mode}_{key}_s"] = statistics.median(times)
            payload = {
                "flags": [*profile, *once], "unit": "s", "summary": summary, "table": table_of(samples),
                "samples": samples,
            }  # fmt: skip
            path = write_evidence(name, payload, recorded=environment)
    print(json.dumps(summary, indent=1))
    print(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start-marks"]:
        sys.exit(train_with_marks(sys.argv[2:]))
    main(sys.argv[1:])
