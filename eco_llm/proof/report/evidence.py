"""The files of a run directory, read without trusting any of them.

A file may be missing (say so), cut off by a killed process or damaged (say so, and use what is whole), or come from
another version (use the keys that are there). Nothing here guesses.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eco_llm.errors import UserError
from eco_llm.proof.report.document import Fact, Source, as_number, clean
from eco_llm.proof.report.metrics_log import MetricsLog

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WINDOW = "perf/baseline_throughput.json"
BOTTLENECKS = "perf/window_10m_bottlenecks.json"
COMPARISON = "perf/latest_bottleneck_fix_report.json"
MEMORY = "perf/memory.json"
SWEEP = "perf/sweep.json"

WRITTEN_BY = {
    CONFIG: "every run",
    METRICS: "every run",
    WINDOW: "--perf-profile-enable",
    BOTTLENECKS: "every run",
    COMPARISON: "eco_train compare",
    MEMORY: "--memory-report",
    SWEEP: "eco_train sweep",
}
"""Evidence that a report reads, besides crash reports, and what writes it."""

_CRASHES = ("errors/crash_*.json", "perf/compare/*/errors/crash_*.json", "perf/sweep/errors/crash_*.json")

OUTPUTS = ("PROOF_OF_EVOLUTION.md", "report.html")
CRASHES_SHOWN = 20
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class JsonFile:
    """One JSON file: its content, or why there is none."""

    path: Path
    label: str
    data: Any = None
    problem: str | None = None
    """None: it was read. Else `missing`, or what is wrong with it."""
    size: int = 0
    sha256: str = ""

    @property
    def missing(self) -> bool:
        """Whether there is no such file."""
        return self.problem == "missing"

    def at(self, *path: str | int) -> Fact | None:
        """The value under a path of keys and positions; None where there is none, or null."""
        here = self.data
        for part in path:
            known = isinstance(here, dict) and isinstance(part, str) and part in here
            if not known and not (isinstance(here, list) and isinstance(part, int) and part < len(here)):
                return None
            here = here[part]
        if here is None:
            return None
        what = str(path[-1]) if path and isinstance(path[-1], str) else "/".join(map(str, path))
        return Fact(here, Source(self.path, self.label, pointer(path), what, as_number(here)))

    def whole(self) -> Source:
        """The file itself as a source."""
        return Source(self.path, self.label)


def pointer(path: tuple[str | int, ...]) -> str:
    """The JSON Pointer (RFC 6901) of a path."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def read_json(path: Path, label: str) -> JsonFile:
    """Read a JSON object; every way it can fail becomes `problem`."""
    try:
        if path.stat().st_size > _LARGEST:
            return JsonFile(path, label, problem=f"{path.stat().st_size:,} bytes: too large to be one of ours")
        raw = path.read_bytes()
    except FileNotFoundError:
        return JsonFile(path, label, problem="missing")
    except OSError as error:
        return JsonFile(path, label, problem=f"unreadable: {error.strerror}")
    facts: dict[str, Any] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return JsonFile(path, label, problem="damaged: not UTF-8", **facts)
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python converts
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        return JsonFile(path, label, problem=f"damaged or cut off: not JSON{where}", **facts)
    if not isinstance(data, dict):
        return JsonFile(path, label, problem="damaged: not a JSON object", **facts)
    return JsonFile(path, label, data, **facts)


class Run:
    """One run directory's evidence. `refresh` reads what changed since; the metrics log only from where it grew.

    Attributes:
        label: the run's name in the report.
        hue: its colour in every chart.
        crashes: the newest crash reports, oldest first, then those of a comparison's sides and a sweep's points;
            `crash_count` counts all.
        died: whether one of them is this run's own.
    """

    def __init__(self, path: Path, label: str, hue: int, *, alone: bool) -> None:
        self.path, self.label, self.hue = path, label, hue
        self._prefix = "" if alone else f"{label}: "
        self.metrics = MetricsLog(path / METRICS, self._prefix + METRICS)
        self.refresh()

    def refresh(self) -> None:
        """Read the files as they are now."""
        self.metrics.refresh()
        self.files = {name: self._json(name) for name in WRITTEN_BY if name != METRICS}
        crashes = crash_reports(self.path)
        self.crash_count = len(crashes)
        self.died = any((self.path / "errors").glob("crash_*.json"))
        self.crashes = [self._json(p.relative_to(self.path).as_posix()) for p in crashes[-CRASHES_SHOWN:]]
        self.set_aside = sorted(p.name for p in (self.path / "previous").glob("[0-9]*"))

    def _json(self, name: str) -> JsonFile:
        return read_json(self.path / name, self._prefix + name)

    def __getitem__(self, name: str) -> JsonFile:
        """The JSON file of that name."""
        return self.files[name]

    @property
    def trained(self) -> bool:
        """Whether a run was made here, and not only comparisons or sweeps of others."""
        return self.metrics.problem != "missing" or any(not self[n].missing for n in (CONFIG, WINDOW, BOTTLENECKS))

    @property
    def environment(self) -> tuple[JsonFile, tuple[str, ...]] | None:
        """The file, and the path in it, that says on what the run was measured."""
        for name in (WINDOW, BOTTLENECKS, COMPARISON, SWEEP):
            if self[name].data is not None and isinstance(self[name].data.get("environment"), dict):
                return self[name], ("environment",)
        return None


def crash_reports(run: Path) -> list[Path]:
    """A run's own, oldest first, then those of its comparison's sides and its sweep's points."""
    return [p for place in _CRASHES for p in sorted(run.glob(place))]


def open_runs(paths: list[Path]) -> list[Run]:
    """The runs, named as shortly as tells them apart.

    Raises:
        UserError: a folder does not exist, holds no evidence, or is named twice.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a directory")
        if not is_run(path):
            raise UserError(f"{path} holds no run (no config.json, metrics.jsonl or perf/)")
    resolved = [p.resolve() for p in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(f"{paths[i]} is named twice")
    return [
        Run(path, label, i, alone=len(paths) == 1)
        for i, (path, label) in enumerate(zip(resolved, _labels(resolved), strict=True))
    ]


def is_run(path: Path) -> bool:
    """Whether any evidence lies there."""
    return any((path / name).is_file() for name in WRITTEN_BY) or any((path / "errors").glob("crash_*.json"))


def _labels(paths: list[Path]) -> list[str]:
    """For every path its shortest tail that no other path shares."""
    labels = []
    for path in paths:
        shortest = 3 if path.parent.name == "previous" else 1  # previous/001 says nothing without its run
        for length in range(shortest, len(path.parts) + 1):
            tail = path.parts[-length:]
            if sum(other.parts[-length:] == tail for other in paths) == 1:
                break
        labels.append(clean("/".join(part.strip("/\\") for part in tail)))
    return labels
