"""The parent's end of training in turns: a live run that works only while it is told to.

The run is a process `eco_train _turns SIDE FLAGS` (eco_llm/cli/turns.py, where the protocol is written down). Between
turns its device is idle and its host blocks on a pipe.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from eco_llm.proof.runs import Program, ending, why

PROTOCOL = 1
"""Of the lines between parent and run; a checkout that speaks another is compared in separate processes."""

COMMAND = "_turns"


class RunFailed(Exception):
    """A run that was being measured ended by itself."""

    def __init__(self, side: str, code: int, reason: str) -> None:
        super().__init__(f"{side.upper()} {ending(code).replace('_', ' ')}: {reason}")
        self.side, self.code, self.reason = side, code, reason

    @property
    def ending(self) -> str:
        """How it ended, in one word (`runs.ending`)."""
        return ending(self.code)


class TurnRun:
    """One live run. `start`, `turn` any number of times, `leave`; leaving the `with` block kills it.

    Args:
        flags: of `eco_train train`, `--output-dir` among them.
        run: that output directory.
        log: file for what it prints.
    """

    def __init__(self, side: str, program: Program, flags: Sequence[str], run: Path, log: Path) -> None:
        self.side, self.run, self._log = side, run, log
        self._child = program.start([COMMAND, side, *flags], log, talk=True)

    def __enter__(self) -> TurnRun:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.end()

    def start(self) -> None:
        """Wait until it is ready to train its first step."""
        self._answer(0)

    def turn(self, until: int) -> None:
        """Let it train up to and with step `until`; return when it is idle again.

        Raises:
            RunFailed: it died, or said something else.
        """
        self._say({"until": until})
        self._answer(until)

    def leave(self) -> None:
        """Let it write its last records and end."""
        self._say({"leave": True})
        if code := self._child.wait():
            raise self._failure(code)

    def _say(self, what: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # a dead reader: its answer will say so
            self._child.stdin.write(json.dumps(what) + "\n")
            self._child.stdin.flush()

    def _answer(self, done: int) -> None:
        line = self._child.stdout.readline()
        if line and json.loads(line) == {"protocol": PROTOCOL, "done": done}:
            return
        if line:
            raise RuntimeError(f"{self.side} answered {line.strip()!r} when step {done} was due")
        raise self._failure(self._child.wait())

    def _failure(self, code: int) -> RunFailed:
        return RunFailed(self.side, code, why(self.run, self._log, code))
