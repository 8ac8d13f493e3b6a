"""The study's results file and the claims on its runs, shared by processes that know nothing of each other. Torch-free.

`runs.jsonl` takes a line when a run has ended, forced to the disk at once: whatever is killed later, it stays. A run is
claimed by a lock that the system drops when its holder dies, so a killed process leaves nothing to clean up.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from quality_plan import ENDED

from eco_llm.files import strict


class Queue:
    """Results in a folder, and claims in one below it or in `locks`; both are made."""

    def __init__(self, folder: Path, locks: Path | None = None) -> None:
        self.file = folder / "runs.jsonl"
        self._claims = locks or folder / "claims"
        for made in (folder, self._claims):
            made.mkdir(parents=True, exist_ok=True)
        self._append = FileLock(self._claims / "append.lock")

    def lines(self) -> list[dict[str, Any]]:
        """All records, oldest first; a line that a killed process left unfinished is passed over."""
        return read_lines(self.file)

    def results(self) -> dict[str, dict[str, Any]]:
        """Runs that have ended, by key."""
        return results_of(self.lines())

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, on the disk when this returns."""
        line = json.dumps(strict(record), ensure_ascii=False).encode() + b"\n"
        with self._append, self.file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    line = b"\n" + line
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def claim(self, key: str) -> FileLock | None:
        """The lock on a run, to be released after its record was appended; None if others have it or it has ended."""
        lock = FileLock(self._claims / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        if key in self.results():
            lock.release()
            return None
        return lock


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; none if there is no such file."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}: line {number} is not whole and is passed over", file=sys.stderr)
    return found


def results_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs that have ended, by key; of several the last. `commit` is that of the launch that ran it."""
    found: dict[str, dict[str, Any]] = {}
    commits: dict[int, str | None] = {}  # by worker, whose lines follow its start
    for line in lines:
        if line.get("kind") == "start":
            commits[line["worker"]] = line["environment"]["commit"]
        elif line.get("kind") == "run" and line["status"] in ENDED:
            found[line["key"]] = {**line, "commit": commits.get(line.get("worker", -1))}
    return found
