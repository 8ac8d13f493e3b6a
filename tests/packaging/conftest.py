"""`make exe-test` leaves its result as evidence: benchmarks/results/<hardware>/executable_tests.json."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = os.environ.get("ECO_TRAIN_EXE")


class Results:
    """Collects what became of every test, and says whether that is the whole of `tests/packaging` and well."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, Any]] = {}
        self.partial = False

    def add(self, report: Any) -> None:
        """One phase (setup, call, teardown) of one test."""
        name = report.nodeid.removeprefix("tests/packaging/")
        sample = self.samples.setdefault(name, {"test": name, "outcome": "passed", "seconds": 0.0})
        sample["seconds"] += report.duration
        if report.outcome != "passed":
            sample["outcome"] = report.outcome
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                sample["reason"] = report.longrepr[2].removeprefix("Skipped: ")

    def count(self, outcome: str) -> int:
        """Tests that ended so."""
        return sum(sample["outcome"] == outcome for sample in self.samples.values())

    def payload(self, build: Path) -> dict[str, Any]:
        """An evidence file's own part; the digest of the built code is in its environment, as a test makes sure.

        Raises:
            ValueError: a test failed, or some were left out.
        """
        if self.partial or not self.count("passed") or self.count("failed"):
            raise ValueError("not a complete and successful run")
        files = [path for path in build.rglob("*") if path.is_file() and not path.is_symlink()]
        seconds = sum(sample["seconds"] for sample in self.samples.values())
        size = sum(path.stat().st_size for path in files) / 2**20
        counts = {outcome: self.count(outcome) for outcome in ("passed", "skipped", "failed")}
        on = f"{platform.system()} {platform.machine()}"
        row = [on, *map(str, counts.values()), f"{seconds:.0f}", f"{size:,.0f}", f"{len(files):,}"]
        return {
            "platform": on,
            "table": {"header": ["on", *counts, "seconds", "build, MiB", "files"], "rows": [row]},
            "summary": {
                "tests": len(self.samples),
                **counts,
                "seconds": seconds,
                "size_mib": size,
                "files": len(files),
            },
            "samples": list(self.samples.values()),
        }


_results = Results()


def pytest_runtest_logreport(report: Any) -> None:
    if BUILD is not None and "tests/packaging/" in report.nodeid:
        _results.add(report)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _results.partial |= any("tests/packaging/" in item.nodeid for item in items)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the evidence once, after all tests of the folder have passed."""
    if BUILD is None or exitstatus or hasattr(session.config, "workerinput"):
        return
    asked = {(session.config.invocation_params.dir / word).resolve() for word in session.config.args}
    if asked & {ROOT, ROOT / "tests", ROOT / "tests" / "packaging"} and not _results.partial:
        print(f"\n{write(_results.payload(ROOT / BUILD))}")  # noqa: T201


def write(payload: dict[str, Any]) -> Path:
    """As benchmarks do: with the machine, the versions, the commit and the digest of the code."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from common import write_evidence
    finally:
        sys.path.pop(0)
    path: Path = write_evidence("executable_tests", payload)
    return path
