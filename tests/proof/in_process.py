"""Sides of a comparison without processes, so that hundreds of comparisons are cheap.

`InProcess`: steps take real time and nothing else. `Simulated`: the real training loop, its clock, its log and the
planted delay, on a noisy machine whose clock only moves when somebody works.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from stand_in_trainer import output_of, stand_in_trainer

from eco_llm.perf.phases import PhaseTimer
from eco_llm.proof.runs import Program
from eco_llm.training.hooks.metrics_file import MetricsFile
from eco_llm.training.hooks.turns import TakeTurns
from eco_llm.training.step import StepOutput

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


class Machine:
    """A clock for both sides. It heats up by a fifth, steps scatter by 3%, and one in fifty is half as long again.

    A process is faster or slower than another for as long as it lives: two of them differ by 1.5% (standard deviation),
    as live ones did on two CPU cores (docs/LOG.md, 2026-11-28).
    """

    def __init__(self, seed: int) -> None:
        self.now, self._random, self._paces = 0.0, random.Random(seed), random.Random(-1 - seed)

    def pace(self) -> float:
        """Of a new process: its steps take so many times as long."""
        return self._paces.gauss(1.0, 0.015 / math.sqrt(2))

    def work(self, seconds: float) -> None:
        heat = 1.2 - 0.2 * math.exp(-self.now / 2.0)
        spike = 1.5 if self._random.random() < 0.02 else 1.0
        self.now += seconds * heat * spike * max(0.5, self._random.gauss(1.0, 0.03))

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


class Simulated(InProcess):
    """Stands in for TurnRun. Its `machine` must be the `time` of eco_llm.training.hooks.turns."""

    machine: ClassVar[Machine]
    delays: ClassVar[dict[str, float]] = {}

    def start(self) -> None:
        super().start()
        machine = self.machine
        self._until, pace = 0, machine.pace()
        self._log = MetricsFile(self.run / "metrics.jsonl")
        self._turns = TakeTurns(lambda done: self._until, delay=self.delays.get(self.side, 0.0))
        timer = PhaseTimer("cpu", host_clock=machine.perf_counter, wall_clock=machine.perf_counter)

        def run() -> StepOutput:
            for name, share in (("forward", 0.3), ("backward", 0.6), ("opt_step", 0.1)):
                with timer.phase(name):  # type: ignore[arg-type]
                    machine.work(share * 0.01 * pace)
            return output_of(5.7 - 0.05 * self._done, 2.0)

        self._trainer = stand_in_trainer(run, timer, [self._log, self._turns], steps=10**6)
        timer.begin_step(1)

    def turn(self, until: int) -> None:
        """Train up to `until` as the process does; what lies between two turns is in the next one's first step."""
        self._until = until
        while self._done < until:
            self._done += 1
            self._trainer._turn(self._done)

    def leave(self) -> None:
        """Deliver what is under way."""
        self._trainer._drain()
        self._log.on_end()
