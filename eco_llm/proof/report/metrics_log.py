"""metrics.jsonl as columns of numbers that know their lines; read again only from where it grew."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eco_llm.proof.report.document import Fact, Source, as_number

_DAMAGE_SHOWN = 5
_WARM_UP_ROWS = 5  # the first steps compile and allocate
_TAIL_SHARE = 5  # the tail is the last fifth of the rows …
_TAIL_AT_LEAST, _TAIL_AT_MOST = 5, 1000


class Column(NamedTuple):
    """One key's numbers. lines, steps: [n], where they stand; values: [n], finite or not."""

    lines: NDArray[np.int64]
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass
class _Growing:
    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))


class MetricsLog:
    """The log of one run.

    Lines that are no record of a step are counted and skipped: a killed run may have cut off its last line.
    `problem` is None, `missing`, or why the file cannot be read.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self._reset()

    def _reset(self) -> None:
        self.problem: str | None = "missing"
        self.size = 0
        self.damaged: list[tuple[int, str]] = []
        self.damaged_count = 0
        self.stepped_back: list[int] = []
        """Lines whose step is not past the one before: a log that was put together by hand, or by two writers."""
        self.cut_off: int | None = None
        """Line number of a last line without its end that is no whole record."""
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._edge = b""
        self._line = 0
        self._digest = hashlib.sha256()
        self._lines: array[int] = array("q")
        self._steps: array[float] = array("d")
        self._columns: dict[str, _Growing] = {}
        self._open_tail = b""

    def refresh(self) -> None:
        """Read what was appended; everything, where the file is another one now (a resume rewrites it)."""
        try:
            with self.path.open("rb") as f:
                if not self._continues(f):
                    self._reset()
                self._identity = _identity(self.path)
                f.seek(self._offset)
                new = f.read()
        except FileNotFoundError:
            self._reset()
            return
        except OSError as error:
            self._reset()
            self.problem = f"unreadable: {error.strerror}"
            return
        self.problem = None
        self._take(new)

    def _continues(self, f: BinaryIO) -> bool:
        """Whether the file still begins with what was read."""
        if self._identity is None or self._identity != _identity(self.path):
            return False
        f.seek(self._offset - len(self._edge))
        return f.read(len(self._edge)) == self._edge

    def _take(self, new: bytes) -> None:
        end = new.rfind(b"\n") + 1
        whole, self._open_tail = new[:end], new[end:]
        self._digest.update(whole)
        self._offset += end
        self._edge = (self._edge + whole[-256:])[-256:]
        self.size = self._offset + len(self._open_tail)
        for raw in whole.split(b"\n")[:-1]:  # only what editors and links count as a line
            self._line += 1
            self._add(self._line, raw)
        # A last line without its end: counted as a row only once it is whole, since it may still be growing.
        self.cut_off = self._line + 1 if self._open_tail.strip() else None

    def _add(self, line: int, raw: bytes) -> None:
        try:
            record = json.loads(raw.decode("utf-8"))
            step = float(record["step"])
            if not math.isfinite(step):
                raise ValueError("no step")
        except UnicodeDecodeError:
            return self._damage(line, "not UTF-8")
        except json.JSONDecodeError:
            return self._damage(line, "not JSON")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return self._damage(line, "no record of a step")
        row = len(self._lines)
        if row and step <= self._steps[-1]:
            self.stepped_back.append(line)
        self._lines.append(line)
        self._steps.append(step)
        columns = self._columns
        for key, value in record.items():
            if type(value) is not float:
                value = as_number(value)
                if value is None:
                    continue
            column = columns.get(key)
            if column is None:
                column = columns[key] = _Growing()
            column.rows.append(row)
            column.values.append(value)

    def _damage(self, line: int, why: str) -> None:
        self.damaged_count += 1
        if len(self.damaged) < _DAMAGE_SHOWN:
            self.damaged.append((line, why))

    # -- reading -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows: lines that are records of a step."""
        return len(self._lines)

    @property
    def sha256(self) -> str:
        """Of the bytes read."""
        digest = self._digest.copy()
        digest.update(self._open_tail)
        return digest.hexdigest()

    @property
    def keys(self) -> list[str]:
        """Every key that ever had a number, sorted."""
        return sorted(self._columns)

    @property
    def lines(self) -> NDArray[np.int64]:
        """Line number of each row."""
        return np.array(self._lines, dtype=np.int64)

    def column(self, key: str) -> Column:
        """A key's numbers in the log's order; empty where it never had one."""
        growing = self._columns.get(key, _Growing())
        rows = np.array(growing.rows, dtype=np.int64)
        steps = np.array(self._steps, dtype=np.float64)
        return Column(self.lines[rows], steps[rows], np.array(growing.values, dtype=np.float64))

    def tail(self) -> tuple[int, int] | None:
        """First and last line of the rows that stand for the run's steady state; None where there are none.

        The last fifth of the rows (at least 5, at most 1000), and never the first 5 where there are others; of steps
        that no profiler traced, where there are such.
        """
        lines = self._not_traced(self.lines)
        n = len(lines)
        if n == 0:
            return None
        take = min(_TAIL_AT_MOST, max(_TAIL_AT_LEAST, n // _TAIL_SHARE))
        first = max(n - take, min(_WARM_UP_ROWS, n - 1), 0)
        return int(lines[first]), int(lines[n - 1])

    def _not_traced(self, lines: NDArray[np.int64]) -> NDArray[np.int64]:
        """These lines but for traced steps; all of them if every one was traced."""
        kept = lines[~np.isin(lines, self.column("traced").lines)]
        return kept if kept.size else lines

    def over(self, key: str, how: str, lines: tuple[int, int] | None) -> Fact | None:
        """`how` (median, mean, min, max) of a key's finite numbers on these lines, both included; of times and rates
        (`…_s`) not those of traced steps, where there are others.
        """
        if lines is None:
            return None
        column = self.column(key)
        inside = (column.lines >= lines[0]) & (column.lines <= lines[1]) & np.isfinite(column.values)
        if key.endswith("_s"):
            inside &= np.isin(column.lines, self._not_traced(column.lines[inside]))
        if not inside.any():
            return None
        with np.errstate(over="ignore"):
            value = float(getattr(np, how)(column.values[inside]))
        where = f"L{lines[0]}-L{lines[1]}" if lines[0] < lines[1] else f"L{lines[0]}"
        source = Source(self.path, self.label, where, f"{how} of {key}, {int(inside.sum()):,} rows", value)
        return Fact(value, source)

    def one(self, key: str, which: str) -> Fact | None:
        """A key's `first`, `last`, `min` or `max` number, with its line; the extremes among the finite ones."""
        column = self.column(key)
        if which in ("min", "max"):
            finite = np.flatnonzero(np.isfinite(column.values))
            if not finite.size:
                return None
            at = int(finite[getattr(np, f"arg{which}")(column.values[finite])])
        elif column.values.size:
            at = 0 if which == "first" else column.values.size - 1
        else:
            return None
        return self.at(column, at, key)

    def step_of(self, fact: Fact) -> Fact:
        """The step on the line of one of this log's single numbers."""
        steps = self.column("step")
        return self.at(steps, int(np.searchsorted(steps.lines, int(fact.source.where[1:]))), "step")

    def at(self, column: Column, index: int, key: str) -> Fact:
        """One number of a column as a fact."""
        value = float(column.values[index])
        return Fact(value, Source(self.path, self.label, f"L{int(column.lines[index])}", key, value))


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
