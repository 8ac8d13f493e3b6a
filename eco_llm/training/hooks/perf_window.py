"""perf/: the measured window (`--perf-profile-enable`), the rolling bottleneck list and the profiler's trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eco_llm.config import PerfConfig
from eco_llm.files import write_json
from eco_llm.perf.phases import STEP_TIMES, PhaseTimer, StepTimes
from eco_llm.perf.profiler import Annotated, StepProfiler
from eco_llm.perf.window import BASELINE_FILE, GpuState, PerfWindow, RollingWindow
from eco_llm.training.hooks.base import Hook

_REWRITE_EVERY_S = 30.0


class PerfFiles(Hook):
    """Feeds records to the windows of `eco_llm.perf` and writes their files.

    window_10m_bottlenecks.json is kept in every run, rewritten twice a minute and at the end; the measured window
    and the trace only on request. The profiler follows the window; where the run is too short for that, it traces
    the window's last steps, and the file says how many (`profiled_steps_in_window`), since they are slower for it.
    It is started and stopped between steps, so that no step's time holds that; only a trace that begins with the run's
    first step starts inside it, after what is compiled and captured there.

    Args:
        folder: the run's perf/ directory.
        environment: what the numbers were measured on (eco_llm.perf.environment.collect).
        say: shows a person one line.
        memory: this process's memory now (eco_llm.perf.device_counters.memory_stats).
        annotated: who, beside the timer, names its work in a trace.
    """

    def __init__(
        self,
        config: PerfConfig,
        folder: Path,
        timer: PhaseTimer,
        *,
        device: Any,
        tokens_per_step: int,
        environment: dict[str, Any],
        say: Callable[[str], None],
        memory: Callable[[], dict[str, float | None]],
        annotated: Sequence[Annotated] = (),
    ) -> None:
        self._config, self._folder, self._environment, self._say = config, folder, environment, say
        self._memory = memory
        clock: dict[str, Any] = {"mode": timer.mode, "sync_boundaries": timer.sync_boundaries}
        self._rolling = RollingWindow(tokens_per_step, **clock)
        self._window: PerfWindow | None = None
        self._profiler: StepProfiler | None = None
        if config.perf_profile_enable:
            self._window = PerfWindow(config.perf_warmup_steps, config.perf_measure_steps, tokens_per_step, **clock)
            if config.perf_profiler_steps:
                self._profiler = StepProfiler(config.perf_profiler_steps, device, folder, (timer, *annotated))
        self._profiled = range(0)
        self._profiled_in_window = 0
        self._profiled_apart = False
        self._tracing = False
        self._any_record = False
        self._written_at = 0.0

    def on_start(self, first_step: int, last_step: int) -> None:
        """Place the profiled steps, and say so if the window cannot be finished."""
        self._last_step = last_step
        if self._window is None:
            return
        window_end = first_step + self._window.warmup_steps + self._window.measure_steps  # first step after it
        if window_end - 1 > last_step:
            self._say(f"perf window: only {last_step - first_step + 1} steps are left; it will not be complete")
        if self._profiler is not None:
            wanted = self._config.perf_profiler_steps
            start = max(min(window_end, last_step + 1 - wanted), first_step)
            self._profiled = range(start, start + wanted)
            self._profiled_apart = start == window_end
            window_start = first_step + self._window.warmup_steps
            self._profiled_in_window = max(0, min(window_end, last_step + 1) - max(start, window_start))
            if self._profiled_in_window:
                self._say(
                    f"perf window: no steps are left after it, so its last {self._profiled_in_window} are profiled and"
                    " slower for it; raise --steps for clean numbers"
                )

    def on_step(self, step: int) -> None:
        """Start a trace that begins with the run's first step."""
        if self._profiler is not None and step == self._profiled.start and not self._tracing:
            self._profiler.start()
            self._tracing = True

    def on_step_end(self, step: int) -> None:
        """Start and stop the profiler between steps; what follows the last one belongs in no trace."""
        if self._profiler is None:
            return
        if step in self._profiled:
            self._profiler.end_step()
            if step == self._last_step:
                self._profiler.stop()
        elif step + 1 == self._profiled.start:
            self._profiler.start()
            self._tracing = True

    def on_record(self, record: dict[str, Any]) -> None:
        """Feed one step."""
        times, gpu = StepTimes(**{name: record[name] for name in STEP_TIMES}), GpuState.of(record)
        validated = "val_loss" in record and times.step != self._last_step  # after the last step, not inside it
        if not (self._profiled_apart and times.step in self._profiled):
            self._rolling.add(times, gpu)
            self._any_record = True
        if self._window is not None and self._window.add(times, gpu, validated=validated):
            report = self._window.report(self._environment)
            report["profiled_steps_in_window"] = self._profiled_in_window
            report["memory"] = self._memory()
            inside = self._window.validations
            counted = f"; {inside} validation{'s' * (inside > 1)} inside, in the effective rate" if inside else ""
            write_json(self._folder / BASELINE_FILE, report)
            self._say(
                f"perf window of {self._window.measure_steps} steps: {report['avg_effective_tokens_per_s']:,.1f}"
                f" tokens/s effective, {report['avg_core_tokens_per_s']:,.1f} core → {BASELINE_FILE}{counted}"
            )
        if time.monotonic() - self._written_at > _REWRITE_EVERY_S:
            self._write_rolling()

    def on_end(self) -> None:
        """Finish the trace and write the last state."""
        if self._profiler is not None:
            self._profiler.stop()  # where the run ended before its traced steps did
        self._write_rolling()

    def _write_rolling(self) -> None:
        if not self._any_record:
            return
        table = self._profiler.table if self._profiler is not None else None
        self._rolling.write(self._folder, self._environment, table, self._memory())
        self._written_at = time.monotonic()
