"""GPU utilisation, memory and power between two reads, sampled in the background; and peak memory.

A counter that cannot be read is None, never a guess: no GPU, no NVML, a MIG slice, or no sample since the
last read.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from eco_llm.perf.nvml import GpuSample, NvmlDevice, NvmlUnavailableError

if TYPE_CHECKING:
    import torch

_GIB = 2.0**30
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """Statistics over the samples since the last read."""

    gpu_util_percent: float | None = None
    """Mean utilisation, as NVML defines it: time with any kernel running, however small."""
    gpu_memory_used_gib: float | None = None
    """Peak memory taken on the whole GPU, by every process."""
    gpu_power_watts: float | None = None
    """Mean board power."""
    samples: int = 0


class _Mean:
    """A running mean of the known values."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.total += value
            self.count += 1

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class DeviceCounters:
    """Samples one GPU `hz` times a second from a daemon thread, from `start` to `stop` (or as a `with`
    block).

    Args:
        device: the torch device; anything but CUDA has no counters, and no thread is started.
        hz: samples a second. NVML itself averages utilisation over 1/6 s or more, so faster tells nothing
        new.
        open_source: returns `(sample, close)`; for tests.

    `unavailable` says in one line why there are no counters, or is None.
    """

    def __init__(
        self,
        device: torch.device | str,
        hz: float = 5.0,
        *,
        open_source: Callable[[], tuple[Callable[[], GpuSample], Callable[[], None]]] | None = None,
    ) -> None:
        self.unavailable: str | None = None
        self._period = 1.0 / hz
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._sample: Callable[[], GpuSample] | None = None
        self._close: Callable[[], None] | None = None
        self._reset()
        if open_source is None and not str(device).startswith("cuda"):
            self.unavailable = f"{device} is not a CUDA device"
            return
        try:
            self._sample, self._close = (open_source or (lambda: _open_nvml(device)))()
        except NvmlUnavailableError as error:
            self.unavailable = str(error)

    def start(self) -> DeviceCounters:
        """Begin sampling. Does nothing where there are no counters."""
        if self._sample is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eco-device-counters", daemon=True)
            self._thread.start()
        return self

    def read(self) -> DeviceReading:
        """Statistics since the last `read` (or `start`). Takes no sample itself and never waits for one."""
        with self._lock:
            reading = DeviceReading(self._util.value(), self._memory_peak, self._power.value(), samples=self._samples)
            self._reset()
        return reading

    def sample_now(self) -> None:
        """Take one sample on the calling thread, for windows shorter than the sampling period."""
        if self._sample is not None:
            sample = self._sample()
            with self._lock:
                self._add(sample)

    def stop(self) -> None:
        """End sampling and release NVML; what was sampled can still be read. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._sample = None
        if self._close is not None:
            self._close()
            self._close = None

    def __enter__(self) -> DeviceCounters:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _reset(self) -> None:
        self._util, self._power = _Mean(), _Mean()
        self._memory_peak: float | None = None
        self._samples = 0

    def _add(self, sample: GpuSample) -> None:
        self._util.add(sample.util_percent)
        self._power.add(sample.power_watts)
        if sample.memory_used_bytes is not None:
            self._memory_peak = max(self._memory_peak or 0.0, sample.memory_used_bytes / _GIB)
        self._samples += 1

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.sample_now()
            except Exception as error:  # a lost GPU ends its counters, not the training
                self.unavailable = f"sampling stopped: {error}"
                _log.warning("GPU counters: %s", self.unavailable)
                return
            self._stop.wait(self._period)


def _open_nvml(device: torch.device | str) -> tuple[Callable[[], GpuSample], Callable[[], None]]:
    import torch

    gpu = NvmlDevice.of_torch(torch.cuda.get_device_properties(torch.device(device)))
    return gpu.sample, gpu.close


def memory_stats(device: torch.device | str) -> dict[str, float | None]:
    """Memory of this process now and at its peak, in GiB. Reads counters only; never synchronises the device.

    On CUDA `gpu_memory_allocated_gib`, `gpu_memory_peak_gib` (tensors), `gpu_memory_reserved_gib` and
    `gpu_memory_reserved_peak_gib` (what the caching allocator took from the driver); always `process_rss_gib` and
    `process_peak_rss_gib` (host memory; the peak is the operating system's, None where it keeps none).
    """
    memory = psutil.Process().memory_info()
    stats: dict[str, float | None] = {}
    if str(device).startswith("cuda"):
        import torch

        stats["gpu_memory_allocated_gib"] = torch.cuda.memory_allocated(device) / _GIB
        stats["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        stats["gpu_memory_reserved_gib"] = torch.cuda.memory_reserved(device) / _GIB
        stats["gpu_memory_reserved_peak_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
    stats["process_rss_gib"] = memory.rss / _GIB
    peak = _peak_rss_bytes(memory)
    stats["process_peak_rss_gib"] = None if peak is None else max(peak, memory.rss) / _GIB
    return stats


def _peak_rss_bytes(memory: object) -> int | None:
    if sys.platform == "win32":
        peak: int | None = getattr(memory, "peak_wset", None)
        return peak
    import resource

    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maxrss if sys.platform == "darwin" else maxrss * 1024  # Linux counts in KiB, macOS in bytes
