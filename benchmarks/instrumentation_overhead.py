"""Claim: what eco_train's measuring and logging cost, against the same steps without any (the bar: 1% of a step).

    python benchmarks/instrumentation_overhead.py [--rounds N] [FLAGS OF train …]

Two runs as `eco_train` builds them (model, optimizer, data, step), the same seed; one is advanced by the trainer's own
loop (`on`), the other by a bare loop of the same steps (`off`), in turn, in samples of equally many steps:

- on: phase timer and its event nodes, values copied to the host, NVML's thread, metrics.jsonl, TensorBoard, the perf
  files and a window, the display's lines (to a file). One sample begins and ends with an idle device, and holds the
  delivery of as many records as steps.
- off: fetch, learning rate, the step. No timer, no thread, nothing is read from the device.

Validation and checkpoints are work, and in neither. Compilation is off on a GPU, where it would only shorten what the
host does in an eager step; a step as one CUDA graph is measured as well. Gate: both sides' losses after the first
sample. Other work on the machine widens the interval, and the load is in the file. Beside it stands what the measuring
takes alone: processor time of all threads for turns of the trainer's loop whose step does nothing (so without the marks
inside a step). On a CPU that is the whole cost; on a GPU what of it the device does not hide. Torch has one thread on a
CPU, so that nothing depends on how many cores are free.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from common import NoTimer, interleave, require_close, write_evidence

from eco_llm.cli.args_file import expand
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.runtime import set_cache_dirs

ENDLESS = 1_000_000
QUIET = [
    "--eval-interval", "0", "--save-interval", str(ENDLESS), "--steps", str(ENDLESS), "--sample-tokens", "0",
    "--no-resume", "--perf-profile-enable", "--perf-measure-steps", "20",
]  # fmt: skip
SAMPLE_SECONDS = {"cuda": 0.4, "cpu": 1.0}  # long beside the sampling period of NVML's thread, 0.2 s


class Side:
    """One run, built by `eco_train`'s own code in a folder of its own; `instrumented` says which loop advances it."""

    def __init__(self, flags: list[str], place: Path, *, instrumented: bool) -> None:
        from eco_llm.data.prepare import prepare
        from eco_llm.runtime import Runtime
        from eco_llm.training.launch import _Launch, resolve_shape
        from eco_llm.training.run_directory import RunDirectory
        from eco_llm.training.step import TrainStep

        config = parse(TrainConfig, [*flags, "--output-dir", str(place)], prog="instrumentation_overhead")
        config.validate()
        self.runtime = Runtime.detect(config.runtime)
        data = prepare(config.data, config.model.vocab_size)
        self._run = RunDirectory(place)
        self._run.open()
        self._screen = io.TextIOWrapper((place / "screen.txt").open("wb"))
        with contextlib.redirect_stdout(self._screen):  # the display keeps the stream that it finds
            shape = resolve_shape(config, data)
            self._launch = _Launch(self._run, config, shape, self.runtime, data, sys.argv, [])
            self._trainer, self._hooks = self._launch._build(None)
        self._instrumented, self._done = instrumented, 0
        if instrumented:
            for hook in self._hooks:
                hook.on_start(1, ENDLESS)
            self._trainer._timer.begin_step(1)
            self._keep_outputs()
        else:
            step: Any = self._trainer._step
            (step if isinstance(step, TrainStep) else step._step).timer = NoTimer()
        self.processor_seconds: list[float] = []
        self._launch.loader.__enter__()

    def advance(self, steps: int) -> None:
        """So many steps, and wait for the device."""
        for _ in range(steps):
            self._done += 1
            if self._instrumented:
                self._trainer._turn(self._done)
            else:
                self._bare_turn(self._done)
        self.wait()

    def _bare_turn(self, step: int) -> None:
        from eco_llm.optim.schedule import lr_at

        trainer = self._trainer
        trainer._step.prepare()
        trainer._update.set_lr(lr_at(step - 1, config=trainer._optimizer, total_steps=trainer._training.steps))
        self.output = trainer._step.run()

    def wait(self) -> None:
        """Until the device is idle."""
        if self.runtime.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def last_loss(self) -> float:
        """Of the last step."""
        if not self._instrumented:
            return float(self.output.values[0])
        self._trainer._drain()
        assert self._trainer.last_record is not None
        return float(self._trainer.last_record["loss"])

    def seconds(self, steps: int) -> float:
        """Of `steps` steps; NVML's thread runs only while an instrumented sample is taken."""
        from eco_llm.perf.device_counters import DeviceCounters

        if not self._instrumented:
            return self._timed(steps)
        self._launch.counters = DeviceCounters(self.runtime.device)
        with self._launch.counters:
            return self._timed(steps)

    def _timed(self, steps: int) -> float:
        self.wait()
        started, used = time.perf_counter(), time.process_time()
        self.advance(steps)
        elapsed = time.perf_counter() - started
        self.processor_seconds.append(time.process_time() - used)
        return elapsed

    def _keep_outputs(self) -> None:
        step: Any = self._trainer._step
        run = step.run

        def kept() -> Any:
            self.output = run()
            return self.output

        step.run = kept

    def alone(self, turns: int = 300) -> float:
        """Processor seconds of a turn whose step gives the last output again, over all threads."""
        self.wait()
        step, kept = self._trainer._step, self.output
        still: Any = types.SimpleNamespace(prepare=lambda: None, run=lambda: kept)
        self._trainer._step = still
        self.advance(turns)  # once unmeasured
        used = time.process_time()
        self.advance(turns)
        used = time.process_time() - used
        self._trainer._step = step
        return used / turns

    def close(self) -> None:
        """Release files and the loader's thread."""
        for hook in self._hooks:
            hook.on_end()
        self._launch.loader.__exit__(None, None, None)
        self._run.close()
        self._screen.close()


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    rounds = 15
    if argv[:1] == ["--rounds"]:
        rounds, argv = int(argv[1]), argv[2:]
    set_cache_dirs()
    import torch
    from steps import clean

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    profile = argv or (["@train_sigma_args.txt"] if device == "cuda" else ["@presets/quickstart_cpu.txt"])
    paths = {"eager": ["--no-torch-compile", "--cuda-graph", "off"]}
    if device == "cuda":
        paths["one CUDA graph"] = ["--no-torch-compile", "--cuda-graph", "on"]
    summary: dict[str, Any] = {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    rows, samples = [], []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        text = Path(sysconfig.get_paths()["stdlib"], "asyncio")  # what the tokens say is no matter here
        words = [*profile, *QUIET, "--data", str(text), "--data-cache", str(place / "data")]
        for name, switches in paths.items():
            flags = expand([*words, *switches])
            folder = place / name.replace(" ", "_")
            folder.mkdir()
            sides = [Side(flags, folder / kind, instrumented=kind == "on") for kind in ("on", "off")]
            for side in sides:
                side.advance(3)  # compiles, captures, allocates
            on, off = sides
            require_close(on.last_loss(), off.last_loss(), relative=1e-2 if device == "cuda" else 1e-6)
            steps = max(2, math.ceil(SAMPLE_SECONDS[device] / (off.seconds(3) / 3)))
            found = interleave(functools.partial(on.seconds, steps), functools.partial(off.seconds, steps), rounds)
            alone = on.alone()
            for side in sides:
                side.close()
            key = name.replace(" ", "_")
            summary |= {f"{key}_{k}": v for k, v in found.summary().items()} | {f"{key}_steps_per_sample": steps}
            summary[f"{key}_alone_s"] = alone
            used = [side.processor_seconds[-rounds:] for side in sides]
            samples += [
                {"path": name, "steps": steps, **sample, "a_processor": a, "b_processor": b}
                for sample, a, b in zip(found.samples(), *used, strict=True)
            ]
            interval = f"{100 * (found.ratio_low - 1):+.2f} to {100 * (found.ratio_high - 1):+.2f}"
            each = [1000 * median / steps for median in (found.median_a, found.median_b)]
            rows.append([name, f"{each[0]:.3f}", f"{each[1]:.3f}", f"{100 * (found.ratio - 1):+.2f}", interval])
            rows[-1] += [f"{1000 * alone:.3f}", f"{100 * alone * steps / found.median_b:.2f}", str(rounds)]
            print(rows[-1], flush=True)
            del sides, on, off, side, found
            clean(torch.device(device))
    header = [
        "step",
        "with, ms",
        "without, ms",
        "cost, %",
        "95% interval",
        "alone, ms",
        "alone, % of a step",
        "pairs",
    ]
    name = "instrumentation_overhead" if not argv else "instrumentation_overhead_custom"
    payload = {
        "flags": profile, "unit": "s", "a": "with", "b": "without",
        "table": {"header": header, "rows": rows}, "summary": summary, "samples": samples,
    }  # fmt: skip
    print(f"load average {summary['load_average']}")
    print(write_evidence(name, payload, device=device))


if __name__ == "__main__":
    main(sys.argv[1:])
