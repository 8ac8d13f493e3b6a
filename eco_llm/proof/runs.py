"""Runs as their neighbours see them: processes that are started and run directories that are read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from eco_llm.errors import UserError
from eco_llm.outcome import REFUSED, Outcome

BOTTLENECKS_FILE = Path("perf") / "window_10m_bottlenecks.json"
BASELINE_FILE = Path("perf") / "baseline_throughput.json"

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_POSIX = os.name == "posix"


@dataclass(frozen=True)
class Program:
    """How to start one `eco_train`: this one, a frozen one, or that of another checkout."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables set for it, beside those of this process."""

    @staticmethod
    def this() -> Program:
        """The program that is running; a frozen build is its own interpreter."""
        if getattr(sys, "frozen", False):
            return Program((sys.executable,))
        return Program.of(_PACKAGE_ROOT)

    @staticmethod
    def of(root: Path) -> Program:
        """The package in `root`, run by this interpreter, whatever lies in the current directory or is installed."""
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        return Program((sys.executable, "-P", "-m", "eco_llm"), {"PYTHONPATH": path})

    def start(self, arguments: Sequence[str], log: Path, *, talk: bool = False) -> Child:
        """Start it; what it prints is appended to `log`. With `talk` its standard input and output are pipes.

        It leads a group of its own: a Ctrl-C in the terminal reaches this process only, which then ends its children.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE if talk else None
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.command, *arguments],
                env={**os.environ, **self.environment},
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                encoding="utf-8" if talk else None,
                errors="backslashreplace" if talk else None,
                start_new_session=_POSIX,
                creationflags=0 if _POSIX else getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        return Child(process, log)

    def ask(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run it to its end, for what it prints."""
        return subprocess.run(
            [*self.command, *arguments], env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL,
            capture_output=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip


@dataclass
class Child:
    """A started process. Leaving its `with` block ends it, whatever it was doing."""

    process: subprocess.Popen[Any]
    log: Path

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    @property
    def stdin(self) -> IO[str]:
        """Where it listens (`talk`)."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> IO[str]:
        """Where it answers (`talk`)."""
        assert self.process.stdout is not None
        return self.process.stdout

    def wait(self) -> int:
        """Its exit code, when it has ended; negative: the signal that killed it."""
        return self.process.wait()

    def end(self) -> None:
        """Kill it, and on POSIX what it started, if it still lives; close the pipes."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                if _POSIX:
                    os.killpg(self.process.pid, signal.SIGKILL)
                else:
                    self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived: end the children, keep what was measured, leave with this exit code."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.name)
        self.outcome = outcome


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Stopped` while entered; a Ctrl-C is a KeyboardInterrupt anyway."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(Outcome.TERMINATED if number == signal.SIGTERM else Outcome.HUNG_UP)

    previous: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ending(code: int) -> str:
    """An exit code as a word: done, crashed, out_of_memory, not_finite, interrupted, refused or killed."""
    if code == REFUSED:
        return "refused"
    if code < 0:
        return "killed"
    try:
        outcome = Outcome(code)
    except ValueError:
        return "crashed"
    stopped = (Outcome.INTERRUPTED, Outcome.TERMINATED, Outcome.HUNG_UP)
    return "interrupted" if outcome in stopped else outcome.name.lower()


def why(run: Path, log: Path, code: int) -> str:
    """One line on why a process ended with `code`: its newest crash report, else the last line it printed."""
    for path in reversed(crash_reports(run)):
        report = read_json(path)
        if report is not None:
            first = next(iter(str(report.get("message", "")).splitlines()), "")
            return f"{report.get('exception', 'error')}: {first}"
    if code < 0:
        hint = "; the system does this when memory runs out" if -code == getattr(signal, "SIGKILL", 9) else ""
        return f"killed by signal {-code}{hint}"
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if line.startswith("eco_train: error: ")]
        if errors:
            return errors[-1].removeprefix("eco_train: error: ")
        if any(lines):
            return [line for line in lines if line][-1]
    return f"exit code {code}"


def crash_reports(run: Path) -> list[Path]:
    """errors/crash_*.json of a run, oldest first."""
    return sorted((run / "errors").glob("crash_*.json"))


def read_records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as far as it is whole; empty where there is none. A last line still being written is left out."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None where there is no readable one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def peak_memory_gib(records: Sequence[dict[str, Any]]) -> float | None:
    """The largest `memory_peak_gib` of some records: device memory on a GPU, resident memory on a CPU."""
    return max((r["memory_peak_gib"] for r in records if r.get("memory_peak_gib") is not None), default=None)


def check_place(path: Path) -> None:
    """Refuse an output directory that cannot be written, before anything is.

    Raises:
        UserError: it, or the nearest folder above it, is a file or not ours to write in.
    """
    place = path
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        is_folder = place.is_dir()
    except OSError as error:  # a name too long
        raise UserError(f"--output-dir {path}: {error.strerror}") from None
    if not is_folder:
        raise UserError(f"--output-dir {path}: {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {path}: no permission to write in {place}")
