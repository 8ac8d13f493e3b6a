"""TensorBoard events: the same records, as curves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from eco_llm.training.hooks.base import Hook

_GROUPS = {
    "phase": "time",
    "core": "speed",
    "effective": "speed",
    "step": "time",
    "val": "validation",
    "c3o": "optimizer",
}


_NO_CURVE = {"step", "started_at", "ended_at"}


@functools.cache
def _tag(name: str) -> str:
    return f"{_GROUPS.get(name.split('_')[0], 'train')}/{name}"


class TensorBoard(Hook):
    """Writes scalars under `<run>/tb`, grouped as time/, speed/, validation/, optimizer/ and train/.

    A resumed run continues in a new event file whose first step hides what the crash had logged past it
    (TensorBoard's purge).
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._summary = Summary
        self._writer = SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else None)

    def on_record(self, record: dict[str, Any]) -> None:
        """Add every number of the record.

        As one event: `add_scalar` makes one of each number, and its queue, thread and write were most of what measuring
        and logging a step cost.
        """
        values = [
            self._summary.Value(tag=_tag(name), simple_value=value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and name not in _NO_CURVE
        ]
        assert self._writer.file_writer is not None  # closed by on_end
        self._writer.file_writer.add_summary(self._summary(value=values), record["step"])

    def on_checkpoint(self, step: int) -> None:
        """Flush with the checkpoint."""
        self._writer.flush()

    def on_end(self) -> None:
        """Close the event file."""
        self._writer.close()
