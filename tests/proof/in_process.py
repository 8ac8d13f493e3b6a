"""A side of a comparison without a process: its steps take real time and nothing else, so that hundreds are cheap."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from eco_llm.proof.runs import Program

PHASES = ("data", "forward", "backward", "opt_step", "zero_grad")


class InProcess:
    """Stands in for TurnRun. Each step keeps the processor busy until `seconds[side]` of wall clock have passed."""

    seconds: ClassVar[dict[str, float]] = {"a": 0.0, "b": 0.0}

    def __init__(self, side: str, program: Program, flags: Sequence[str], run: Path, log: Path) -> None:
        self.side, self.run = side, run
        self._done, self._since = 0, time.perf_counter()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self) -> None:
        """Leave what a run leaves before its first step."""
        self.run.mkdir()
        (self.run / "config.json").write_text('{"resolved": {"compute_dtype": "float32", "device": "cpu"}}')

    def turn(self, until: int) -> None:
        """Train up to `until`; as in a real run a step's time begins where the last one's ended, the wait included."""
        lines = []
        while self._done < until:
            begun = time.perf_counter()
            while time.perf_counter() < begun + self.seconds[self.side]:
                pass
            now = time.perf_counter()
            self._done += 1
            lines.append(json.dumps(self._record(now - self._since)) + "\n")
            self._since = now
        with (self.run / "metrics.jsonl").open("a") as log:
            log.writelines(lines)

    def leave(self) -> None:
        """Nothing is under way."""

    def _record(self, seconds: float) -> dict[str, Any]:
        record = {"step": self._done, "loss": 5.7 - 0.05 * self._done, "grad_norm": 2.0, "memory_peak_gib": 0.1}
        times = dict.fromkeys((f"phase_{name}_s" for name in PHASES), seconds / 5)
        return record | {"step_time_s": seconds, "core_step_time_s": seconds} | times
