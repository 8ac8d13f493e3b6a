"""TensorBoard events: the same records, as curves."""

from __future__ import annotations

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


class TensorBoard(Hook):
    """Writes scalars under `<run>/tb`, grouped as time/, speed/, validation/, optimizer/ and train/.

    A resumed run continues in a new event file whose first step hides what the crash had logged past it
    (TensorBoard's purge).
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else None)

    def on_record(self, record: dict[str, Any]) -> None:
        """Add every number of the record."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in _NO_CURVE:
                group = _GROUPS.get(name.split("_")[0], "train")
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])

    def on_checkpoint(self, step: int) -> None:
        """Flush with the checkpoint."""
        self._writer.flush()

    def on_end(self) -> None:
        """Close the event file."""
        self._writer.close()
