"""metrics.jsonl: every step's numbers, one JSON object a line, appended and flushed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eco_llm.files import strict
from eco_llm.training.hooks.base import Hook


class MetricsFile(Hook):
    """Appends records; a crash can cut at most the last line, which resuming repairs."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def on_record(self, record: dict[str, Any]) -> None:
        """Write one line; NaN, which is not JSON and which other readers reject, becomes the string "nan"."""
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps(strict(record), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def on_checkpoint(self, step: int) -> None:
        """Make the log as durable as the checkpoint it belongs to."""
        os.fsync(self._file.fileno())

    def on_end(self) -> None:
        """Close the file."""
        self._file.close()
