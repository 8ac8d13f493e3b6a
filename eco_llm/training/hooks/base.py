"""What a hook may do. One file a hook; the loop knows none of them by name."""

from __future__ import annotations

from typing import Any


class Hook:
    """Observes a run. Every method is optional; none may change the model, the data order or the clock.

    Records arrive in step order but late: a step's record is delivered once its device values have reached the
    host, and always before `on_checkpoint` of that step and before `on_end`.
    """

    def on_start(self, first_step: int, last_step: int) -> None:
        """Training is about to do steps `first_step` to `last_step`."""

    def on_step(self, step: int) -> None:
        """Step `step` begins, and its time runs: what is done here and in `on_record` is in it, and not in its core.

        This method and the next are called in time with the device queue.
        """

    def on_step_end(self, step: int) -> None:
        """Step `step` has ended on the host: what is done here is in no step's time."""

    def on_record(self, record: dict[str, Any]) -> None:
        """One step's numbers, as they go to metrics.jsonl. Called while the device works on a later step."""

    def on_checkpoint(self, step: int) -> None:
        """The checkpoint of `step` is on the disk."""

    def on_message(self, text: str) -> None:
        """The trainer has something to say to a person."""

    def on_end(self) -> None:
        """The loop has ended, well or badly; release what is held."""
