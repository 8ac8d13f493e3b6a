"""Where a step's GPU memory goes, from the caching allocator's own counters. Definitions: docs/memory.md.

The ledger reads the counters at four points of a step (`POINTS`) and sets each beside the bytes of tensors that are
known by name. What is left over is told by the point: nothing but buffers before the step, activations after forward.
Reading is host work of a tenth of a millisecond; the device is never waited for. While a CUDA graph is captured the
allocator serves the step as it always does, from the graph's private pool, and what it hands out then is what every
replay uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eco_llm.files import replacing

REPORT_FILE = "memory.json"
STEPS_FILE = "memory_steps.jsonl"
SNAPSHOT_FILE = "memory_snapshot.pickle"
POINTS = ("begin", "forward", "backward", "opt_step")
"""Before the first forward; after the last micro-step's forward, after its backward, after the update."""
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Counters:
    """The allocator's counters, bytes."""

    allocated: int
    """In tensors now, as blocks (torch.cuda.memory_allocated)."""
    peak: int
    """The most of it since the counters were last reset."""
    reserved: int
    """Taken from the driver now (torch.cuda.memory_reserved)."""


@dataclass(frozen=True, slots=True)
class Known:
    """Bytes of tensors that are known by name."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Allocator(Protocol):
    """Where the counters come from; tests give another."""

    def read(self) -> Counters:
        """The counters now."""

    def reset_peak(self) -> None:
        """Let the peak begin anew from what is allocated now."""

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""


class CudaAllocator:
    """PyTorch's, for one device."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def read(self) -> Counters:
        import torch

        stats = torch.cuda.memory_stats(self._device)
        return Counters(
            allocated=stats.get("allocated_bytes.all.current", 0),
            peak=stats.get("allocated_bytes.all.peak", 0),
            reserved=stats.get("reserved_bytes.all.current", 0),
        )

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)

    def capturing(self) -> bool:
        import torch

        return torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True, slots=True)
class StepMemory:
    """One step's ledger, bytes."""

    weights: int
    gradients: int
    """All of them, after backward."""
    optimizer: int
    activations: int
    """What forward left for backward: allocated after forward, less what was allocated before it."""
    temporary: int
    """The peak, less the most that was allocated at any of the points: what came and went between them."""
    other: int
    """Before the step, beside weights, gradients and optimizer: static inputs, workspaces, blocks' unused ends."""
    fragmentation: int
    """Reserved after the step, less the peak: what the allocator holds and could not use."""
    peak: int
    """Allocated at the step's worst moment."""
    reserved: int
    allocated: dict[str, int]
    """At each of `POINTS`."""
    captured: bool
    """Measured while a CUDA graph was captured; the same in every replay."""

    def as_gib(self) -> dict[str, Any]:
        """For JSON."""
        names = ("weights", "gradients", "optimizer", "activations", "temporary", "other", "fragmentation", "peak")
        values: dict[str, Any] = {f"{name}_gib": getattr(self, name) / _GIB for name in (*names, "reserved")}
        values["allocated_gib"] = {point: size / _GIB for point, size in self.allocated.items()}
        values["measured"] = "while the CUDA graph was captured" if self.captured else "in an eager step"
        return values

    def line(self) -> str:
        """For people."""
        names = ("weights", "gradients", "optimizer", "activations", "temporary", "fragmentation")
        parts = ", ".join(f"{name} {getattr(self, name) / _GIB:.3f}" for name in names)
        where = " (as captured)" if self.captured else ""
        return f"memory, GiB: {parts}; peak {self.peak / _GIB:.3f}, reserved {self.reserved / _GIB:.3f}{where}"


class MemoryLedger:
    """Collects the points of a step.

    Args:
        allocator: the counters.
        known: bytes of the tensors known by name, now.
    """

    def __init__(self, allocator: Allocator, known: Callable[[], Known]) -> None:
        self._allocator, self._known = allocator, known
        self._points: dict[str, tuple[Counters, Known]] = {}
        self.highest = 0
        """The peak over everything, which resets would otherwise lose."""
        self.latest: StepMemory | None = None
        """Of the last step whose points are complete."""
        self.finished = 0
        """Steps measured."""

    def at(self, point: str) -> None:
        """The step has come to one of `POINTS`; a point that repeats (accumulation) counts where it came last."""
        if point == "begin":
            self.highest = max(self.highest, self._allocator.read().peak)
            self._allocator.reset_peak()
            self._points = {}
        self._points[point] = self._allocator.read(), self._known()
        if point == POINTS[-1]:
            self.latest = step_memory(self._points, captured=self._allocator.capturing())
            self.highest = max(self.highest, self.latest.peak)
            self.finished += 1


def step_memory(points: dict[str, tuple[Counters, Known]], *, captured: bool) -> StepMemory:
    """The ledger of a step from its readings at every one of `POINTS`.

    Raises:
        ValueError: a point is missing.
    """
    if missing := [point for point in POINTS if point not in points]:
        raise ValueError(f"no reading at {', '.join(missing)}")
    (begin, before), (forward, then), (_, after), (end, last) = (points[point] for point in POINTS)
    allocated = {point: points[point][0].allocated for point in POINTS}
    # A later micro-step's forward finds gradients that the first one's did not.
    new_gradients = then.gradients - before.gradients
    return StepMemory(
        weights=before.weights,
        gradients=after.gradients,
        optimizer=last.optimizer,
        activations=forward.allocated - begin.allocated - new_gradients,
        temporary=end.peak - max(allocated.values()),
        other=begin.allocated - before.total,
        fragmentation=end.reserved - end.peak,
        peak=end.peak,
        reserved=end.reserved,
        allocated=allocated,
        captured=captured,
    )


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of `tensors`, one that several share once."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


class Snapshot:
    """A history of allocations that PyTorch's memory viewer (https://pytorch.org/memory_viz) opens."""

    _ENTRIES = 200_000

    def __init__(self, device: Any) -> None:
        self._device = device
        self._recording = False

    def start(self) -> None:
        """Begin to record; every allocation costs some microseconds from now on."""
        import torch

        torch.cuda.memory._record_memory_history(
            max_entries=self._ENTRIES, context="alloc", stacks="python", device=self._device
        )
        self._recording = True

    def write(self, path: Path) -> bool:
        """Write what was recorded, and stop; False if nothing was."""
        if not self._recording:
            return False
        import torch

        self._recording = False
        try:
            with replacing(path) as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None, device=self._device)
        return True
