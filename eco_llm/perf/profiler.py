"""torch.profiler over a few steps: a trace for Perfetto or chrome://tracing, and a table of the costliest
operations.

Profiled steps are slower than others and are no part of any measured window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eco_llm.files import replacing

TRACE_FILE = "trace.json.gz"
_RANGES = ("eco/", "Optimizer.")  # PhaseTimer's and the blocks', and the one PyTorch puts around every optimizer
_MIB = 2.0**20


class Annotated(Protocol):
    """What names its work in a trace: phases (PhaseTimer), blocks (instant.stack.Stack)."""

    annotate: bool
    """Set while steps are traced, and only then, so that names cost nothing otherwise."""


class StepProfiler:
    """Traces `steps` steps, then writes `perf_dir`/trace.json.gz and keeps `table`.

    Call `start()` between steps, `end_step()` after each, and `stop()` if training ends early.

    Args:
        steps: steps to trace, at least 1.
        device: what the steps run on.
        perf_dir: folder of the trace.
        annotated: those who name their work in the trace meanwhile.
        rows: rows of each list of the table.
    """

    def __init__(
        self,
        steps: int,
        device: torch.device | str,
        perf_dir: Path,
        annotated: Sequence[Annotated] = (),
        *,
        rows: int = 25,
    ) -> None:
        self.table: dict[str, Any] | None = None
        """The `profiler` entry of window_10m_bottlenecks.json, once tracing is over (keys: docs/perf.md)."""
        self._steps = steps
        self._rows = rows
        self._done = 0
        self._device = torch.device(device)
        self._on_cuda = self._device.type == "cuda"
        self._trace = perf_dir / TRACE_FILE
        self._annotated = annotated
        self._profile: profile | None = None

    def start(self) -> None:
        """Begin tracing (the first start in a process takes up to seconds). Waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)  # kernels still queued belong to the steps before
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_cuda else [])
        self._profile = profile(activities=activities, profile_memory=True, acc_events=True)
        self._profile.start()
        self._annotate(True)

    def end_step(self) -> bool:
        """Count a traced step; after the last one stop, write the trace and return True."""
        if self._profile is None:
            return False
        self._done += 1
        if self._done < self._steps:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """End tracing, write the trace, fill `table`. Waits for the device. No effect when not tracing."""
        if self._profile is None:
            return
        self._annotate(False)
        if self._on_cuda:
            torch.cuda.synchronize(self._device)  # and these to the traced ones
        finished, self._profile = self._profile, None
        finished.stop()
        with replacing(self._trace) as temporary:
            finished.export_chrome_trace(str(temporary))
        self.table = self._summarise(finished)

    def _annotate(self, wanted: bool) -> None:
        for one in self._annotated:
            one.annotate = wanted

    def _summarise(self, finished: profile) -> dict[str, Any]:
        """Kernels by device time on CUDA, operators by their own host time on CPU; operators by the memory they took.

        Named ranges are left out: their time is their children's.
        """
        if self._on_cuda:
            kind, clock, memory = DeviceType.CUDA, "self_device_time_total", "self_device_memory_usage"
        else:
            kind, clock, memory = DeviceType.CPU, "self_cpu_time_total", "self_cpu_memory_usage"
        events = finished.key_averages()
        rows = [
            (event.key, event.count, getattr(event, clock) / 1000.0)
            for event in events
            if event.device_type == kind and not event.key.startswith(_RANGES) and getattr(event, clock) > 0
        ]
        rows.sort(key=lambda row: -row[2])
        total = sum(milliseconds for _, _, milliseconds in rows)
        # Allocations are booked to the operator on the host that made them, also those on the device.
        takers = [
            (event.key, event.count, getattr(event, memory) / _MIB)
            for event in events
            if event.device_type == DeviceType.CPU and not event.key.startswith(_RANGES) and getattr(event, memory) > 0
        ]
        takers.sort(key=lambda row: -row[2])
        return {
            "steps": self._done,
            "clock": clock.removesuffix("_total"),
            "total_ms": total,
            "trace": TRACE_FILE,
            "rows": [
                {"name": name, "calls": calls, "self_ms": ms, "percent": 100.0 * ms / total}
                for name, calls, ms in rows[: self._rows]
            ],
            "memory_rows": [
                {"name": name, "calls": calls, "self_mib": mib} for name, calls, mib in takers[: self._rows]
            ],
        }
