"""From step times to the two perf files: a measured window of steps, and the rolling list of bottlenecks."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eco_llm.files import write_json
from eco_llm.perf.phases import StepTimes

BASELINE_FILE = "baseline_throughput.json"
BOTTLENECKS_FILE = "window_10m_bottlenecks.json"

_TIMES = tuple(f.name for f in dataclasses.fields(StepTimes) if f.name.endswith("_s"))


@dataclass(frozen=True, slots=True)
class GpuState:
    """What NVML saw of the GPU since the step before; None is unknown (no GPU, or a step shorter than its period)."""

    gpu_util_percent: float | None = None
    gpu_power_watts: float | None = None
    gpu_memory_used_gib: float | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> GpuState:
        """That of a step's record."""
        return cls(**{f.name: record.get(f.name) for f in dataclasses.fields(cls)})


class _GpuSums:
    """Means and the most of known values, over steps."""

    def __init__(self) -> None:
        self._sums = {"gpu_util_percent": 0.0, "gpu_power_watts": 0.0}
        self._counts = dict.fromkeys(self._sums, 0)
        self._memory: float | None = None

    def add(self, gpu: GpuState | _GpuSums) -> None:
        """Take in one step, or what others have summed up."""
        if isinstance(gpu, _GpuSums):
            for name in self._sums:
                self._sums[name] += gpu._sums[name]
                self._counts[name] += gpu._counts[name]
            memory = gpu._memory
        else:
            for name in self._sums:
                if (value := getattr(gpu, name)) is not None:
                    self._sums[name] += value
                    self._counts[name] += 1
            memory = gpu.gpu_memory_used_gib
        self._memory = max((m for m in (self._memory, memory) if m is not None), default=None)

    def report(self) -> dict[str, float | int | None]:
        """`avg_gpu_util_percent`, `gpu_util_samples`, `avg_gpu_power_watts`, `gpu_memory_used_gib`."""
        mean = {name: self._sums[name] / n if n else None for name, n in self._counts.items()}
        return {
            "avg_gpu_util_percent": mean["gpu_util_percent"],
            "gpu_util_samples": self._counts["gpu_util_percent"],
            "avg_gpu_power_watts": mean["gpu_power_watts"],
            "gpu_memory_used_gib": self._memory,
        }


def rates(times: StepTimes, tokens_per_step: int) -> dict[str, float]:
    """`core_tokens_per_s` and `effective_tokens_per_s` of one step."""
    return {
        "core_tokens_per_s": tokens_per_step / times.core_step_time_s,
        "effective_tokens_per_s": tokens_per_step / times.step_time_s,
    }


class PerfWindow:
    """`measure_steps` consecutive steps after `warmup_steps`, averaged; the content of
    baseline_throughput.json.

    Averages of times are means over the window's steps. Average rates are total tokens / total time, which is
    not the mean of the steps' rates: a slow step weighs as much as it lasted.

    Args:
        warmup_steps: steps fed before the window (0 or more) that are left out.
        measure_steps: steps in the window, at least 1.
        tokens_per_step: tokens in one optimizer step (B·T·accumulation).
        mode, sync_boundaries: the PhaseTimer's, resolved; recorded beside the numbers.
    """

    def __init__(
        self, warmup_steps: int, measure_steps: int, tokens_per_step: int, *, mode: str, sync_boundaries: bool
    ) -> None:
        self.warmup_steps = warmup_steps
        self.measure_steps = measure_steps
        self.tokens_per_step = tokens_per_step
        self.mode = mode
        self.sync_boundaries = sync_boundaries
        self._left_out = 0
        self._samples: list[tuple[StepTimes, GpuState]] = []
        self.validations = 0
        """Validations inside the window: they are in the steps' whole time, and not in the core's."""

    @property
    def complete(self) -> bool:
        """Whether every step of the window has been fed."""
        return len(self._samples) == self.measure_steps

    def add(self, times: StepTimes, gpu: GpuState | None = None, *, validated: bool = False) -> bool:
        """Feed one step, in order. True exactly once: when this step completes the window.

        `validated`: its time holds a validation. Steps after the window are ignored.
        """
        if self._left_out < self.warmup_steps:
            self._left_out += 1
            return False
        if self.complete:
            return False
        self._samples.append((times, gpu or GpuState()))
        self.validations += validated
        return self.complete

    def report(self, environment: dict[str, Any]) -> dict[str, Any]:
        """The file's content (keys: docs/perf.md). `avg_gpu_util_percent` is the mean of the known samples.

        Raises:
            RuntimeError: the window is not complete.
        """
        if not self.complete:
            raise RuntimeError(f"{len(self._samples)} of {self.measure_steps} steps measured")
        steps = [times for times, _ in self._samples]
        gpu = _GpuSums()
        for _, state in self._samples:
            gpu.add(state)
        total = {name: sum(getattr(times, name) for times in steps) for name in _TIMES}
        n, tokens = len(steps), self.tokens_per_step * len(steps)
        return {
            "avg_effective_tokens_per_s": tokens / total["step_time_s"],
            "avg_core_tokens_per_s": tokens / total["core_step_time_s"],
            **{f"avg_{name}": total[name] / n for name in _TIMES},
            **gpu.report(),
            "validations_in_window": self.validations,
            "tokens_per_step": self.tokens_per_step,
            "warmup_steps": self.warmup_steps,
            "measure_steps": n,
            "first_step": steps[0].step,
            "last_step": steps[-1].step,
            "device_time_mode": self.mode,
            "sync_boundaries": self.sync_boundaries,
            "started": _iso(steps[0].started_at),
            "ended": _iso(steps[-1].ended_at),
            "environment": environment,
            "samples": [
                {**dataclasses.asdict(times), **rates(times, self.tokens_per_step), **dataclasses.asdict(state)}
                for times, state in self._samples
            ],
        }

    def write(self, perf_dir: Path, environment: dict[str, Any]) -> Path:
        """Write `perf_dir`/baseline_throughput.json, atomically, and return its path."""
        path = perf_dir / BASELINE_FILE
        write_json(path, self.report(environment))
        return path


@dataclass(slots=True)
class _Bucket:
    """Sums over the steps that ended in one second."""

    second: int
    steps: int
    first_step: int
    last_step: int
    totals: dict[str, float]
    gpu: _GpuSums


class RollingWindow:
    """Stage shares of the steps that ended in the last `seconds`; the content of window_10m_bottlenecks.json.

    Steps are summed into buckets of one second, so memory is bounded by the window and not by the step rate;
    the window's old edge is exact to a second. The newest step is always inside, however long it was.
    """

    def __init__(self, tokens_per_step: int, *, mode: str, sync_boundaries: bool, seconds: float = 600.0) -> None:
        self.tokens_per_step = tokens_per_step
        self.mode = mode
        self.sync_boundaries = sync_boundaries
        self.seconds = seconds
        self._buckets: deque[_Bucket] = deque()

    def add(self, times: StepTimes, gpu: GpuState | None = None) -> None:
        """Feed one step, in order."""
        second = int(times.ended_at)
        if not self._buckets or self._buckets[-1].second != second:
            self._buckets.append(_Bucket(second, 0, times.step, times.step, dict.fromkeys(_TIMES, 0.0), _GpuSums()))
        bucket = self._buckets[-1]
        bucket.steps += 1
        bucket.last_step = times.step
        for name in _TIMES:
            bucket.totals[name] += getattr(times, name)
        bucket.gpu.add(gpu or GpuState())
        while self._buckets[0].second < second - self.seconds:
            self._buckets.popleft()

    def report(
        self,
        environment: dict[str, Any],
        profiler: dict[str, Any] | None = None,
        memory: dict[str, float | None] | None = None,
    ) -> dict[str, Any]:
        """The file's content (keys: docs/perf.md).

        Args:
            environment: what the numbers were measured on.
            profiler: the table of `perf.profiler`, if steps were traced.
            memory: this process's memory now, from `perf.device_counters.memory_stats`.

        Raises:
            RuntimeError: no step was fed.
        """
        if not self._buckets:
            raise RuntimeError("no step was measured")
        n = sum(bucket.steps for bucket in self._buckets)
        total = {name: sum(bucket.totals[name] for bucket in self._buckets) for name in _TIMES}
        gpu = _GpuSums()
        for bucket in self._buckets:
            gpu.add(bucket.gpu)
        core, step = total["core_step_time_s"], total["step_time_s"]
        stages = _shares(
            {
                "data": total["phase_data_s"],
                "train": total["phase_train_s"],
                # Rounding of the clock may leave -1e-9 s between phases that touch.
                "other": max(0.0, core - total["phase_data_s"] - total["phase_train_s"]),
                "loop": max(0.0, step - core),
            },
            n,
        )
        return {
            "window_seconds": self.seconds,
            "steps": n,
            "first_step": self._buckets[0].first_step,
            "last_step": self._buckets[-1].last_step,
            "measured_seconds": step,
            "avg_effective_tokens_per_s": n * self.tokens_per_step / step,
            "avg_core_tokens_per_s": n * self.tokens_per_step / core,
            "dominant_stage": stages[0]["stage"],
            "stages": stages,
            "train_phase": _shares({"forward": total["phase_forward_s"], "optim": total["phase_optim_s"]}, n),
            "optimizer_phase": _shares(
                {name: total[f"phase_{name}_s"] for name in ("backward", "opt_step", "zero_grad")}, n
            ),
            **gpu.report(),
            "memory": memory,
            "tokens_per_step": self.tokens_per_step,
            "device_time_mode": self.mode,
            "sync_boundaries": self.sync_boundaries,
            "profiler": profiler,
            "environment": environment,
        }

    def write(
        self,
        perf_dir: Path,
        environment: dict[str, Any],
        profiler: dict[str, Any] | None = None,
        memory: dict[str, float | None] | None = None,
    ) -> Path:
        """Write `report` as `perf_dir`/window_10m_bottlenecks.json, atomically, and return its path."""
        path = perf_dir / BOTTLENECKS_FILE
        write_json(path, self.report(environment, profiler, memory))
        return path


def _shares(totals: dict[str, float], steps: int) -> list[dict[str, Any]]:
    """Largest first: each part's percent of their sum, and its mean seconds a step."""
    whole = sum(totals.values())
    return [
        {
            "stage": name,
            "percent": 100.0 * seconds / whole if whole else 0.0,
            "avg_seconds": seconds / steps,
        }
        for name, seconds in sorted(totals.items(), key=lambda item: -item[1])
    ]


def _iso(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="milliseconds")
