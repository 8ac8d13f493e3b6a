"""`--memory-report`: perf/memory.json and a snapshot for PyTorch's memory viewer. docs/memory.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from eco_llm.files import write_json
from eco_llm.perf.memory import REPORT_FILE, SNAPSHOT_FILE, STEPS_FILE, MemoryLedger
from eco_llm.training.hooks.base import Hook

_STEADY = 2
"""Eager steps until `once` reports: the first also makes what later ones find."""


class Recorder(Protocol):
    """`eco_llm.perf.memory.Snapshot`; tests give another."""

    def start(self) -> None:
        """Begin to record."""

    def write(self, path: Path) -> bool:
        """Write and stop; False if nothing was recorded."""


class MemoryReport(Hook):
    """Reports one step's memory, or every step's.

    Args:
        mode: `once` reports the second step, or a CUDA graph as it is captured; `step` every step, too.
        ledger: is told of the points of a step through `at`.
        snapshot: records from the start to the first report.
        folder: the run's perf/ directory.
        environment: what the numbers were measured on (eco_llm.perf.environment.collect).
        say: shows a person one line.
    """

    def __init__(
        self,
        mode: Literal["once", "step"],
        ledger: MemoryLedger,
        snapshot: Recorder,
        folder: Path,
        environment: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._mode, self._ledger, self._snapshot = mode, ledger, snapshot
        self._folder, self._environment, self._say = folder, environment, say
        self._reported = self._written = False
        self._seen = 0
        self._step = 0  # the one that is being done

    def at(self, point: str) -> None:
        """Told by the step; does nothing once there is nothing left to report."""
        if not (self._mode == "once" and self._enough):
            self._ledger.at(point)

    @property
    def _enough(self) -> bool:
        latest = self._ledger.latest
        return latest is not None and (latest.captured or self._ledger.finished >= _STEADY)

    def on_start(self, first_step: int, last_step: int) -> None:
        """Begin the snapshot."""
        self._step = first_step
        (self._folder / STEPS_FILE).unlink(missing_ok=True)
        self._snapshot.start()

    def on_step(self, step: int) -> None:
        """Write what earlier steps, or a capture, have left."""
        self._write()
        self._step = step

    def on_end(self) -> None:
        """Write what there is: also of a run of one step, and of one that broke."""
        self._write(final=True)
        if not self._written and self._snapshot.write(self._folder / SNAPSHOT_FILE):
            self._written = True

    def _write(self, *, final: bool = False) -> None:
        memory, new = self._ledger.latest, self._ledger.finished > self._seen
        self._seen = self._ledger.finished
        if memory is None:
            return
        if self._mode == "step" and new:
            self._say(memory.line())
            with (self._folder / STEPS_FILE).open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"step": self._step, **memory.as_gib()}) + "\n")
        if self._reported or not (self._enough or final):
            return
        self._reported = True
        self._written = self._snapshot.write(self._folder / SNAPSHOT_FILE)
        write_json(
            self._folder / REPORT_FILE,
            {**memory.as_gib(), "snapshot": SNAPSHOT_FILE if self._written else None, "environment": self._environment},
        )
        if self._mode == "once":
            self._say(memory.line())
        self._say(f"memory report → {REPORT_FILE}; {SNAPSHOT_FILE} opens at https://pytorch.org/memory_viz")
