"""torch.profiler over a few steps: a trace for Perfetto or chrome://tracing, and a table of the costliest
operations.

Profiled steps are slower than others and are no part of any measured window.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eco_llm.files import replacing

if TYPE_CHECKING:
    from eco_llm.perf.phases import PhaseTimer

TRACE_FILE = "trace.json.gz"
_RANGES = ("eco/", "Optimizer.")  # PhaseTimer's, and the one PyTorch puts around every optimizer


class StepProfiler:
    """Traces `steps` steps, then writes `perf_dir`/trace.json.gz and keeps `table`.

    Call `start()` between steps, `end_step()` after each, and `stop()` if training ends early. `timer` names
    its phases in the trace meanwhile.

    Args:
        steps: steps to trace, at least 1.
        device: what the steps run on.
        perf_dir: folder of the trace.
        timer: the PhaseTimer in use, if any.
        rows: rows of the table.
    """

    def __init__(
        self,
        steps: int,
        device: torch.device | str,
        perf_dir: Path,
        timer: PhaseTimer | None = None,
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
        self._timer = timer
        self._profile: profile | None = None

    def start(self) -> None:
        """Begin tracing (the first start in a process takes up to seconds)."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_cuda else [])
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()
        if self._timer is not None:
            self._timer.annotate = True

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
        if self._timer is not None:
            self._timer.annotate = False
        if self._on_cuda:
            torch.cuda.synchronize(self._device)  # kernels still queued belong to the traced steps
        finished, self._profile = self._profile, None
        finished.stop()
        with replacing(self._trace) as temporary:
            finished.export_chrome_trace(str(temporary))
        self.table = self._summarise(finished)

    def _summarise(self, finished: profile) -> dict[str, Any]:
        """Kernels by device time on CUDA, operators by their own host time on CPU.

        Named ranges are left out: their time is their children's.
        """
        if self._on_cuda:
            kind, clock = DeviceType.CUDA, "self_device_time_total"
        else:
            kind, clock = DeviceType.CPU, "self_cpu_time_total"
        rows = [
            (event.key, event.count, getattr(event, clock) / 1000.0)
            for event in finished.key_averages()
            if event.device_type == kind and not event.key.startswith(_RANGES) and getattr(event, clock) > 0
        ]
        rows.sort(key=lambda row: -row[2])
        total = sum(milliseconds for _, _, milliseconds in rows)
        return {
            "steps": self._done,
            "clock": clock.removesuffix("_total"),
            "total_ms": total,
            "trace": TRACE_FILE,
            "rows": [
                {"name": name, "calls": calls, "self_ms": ms, "percent": 100.0 * ms / total}
                for name, calls, ms in rows[: self._rows]
            ],
        }
