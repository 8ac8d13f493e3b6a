"""TensorBoard events, read back with TensorBoard's own reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from eco_llm.training.hooks.tensorboard import TensorBoard

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} as TensorBoard shows them."""
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_numbers_become_curves_in_groups(tmp_path: Path) -> None:
    hook = TensorBoard(tmp_path / "tb", first_step=1)
    for step in (1, 2, 3):
        hook.on_record({"step": step, "loss": 2.0**-step, "phase_data_s": 0.5, "gpu_util_percent": None, "note": "x"})
    hook.on_record({
        "step": 4, "val_loss": 2.0, "core_tokens_per_s": 7, "effective_tokens_per_s": 6.0, "step_time_s": 0.25,
        "c3o_foreach_groups": 3, "loss": math.nan,
    })  # fmt: skip
    hook.on_end()
    hook.on_end()
    found = curves(tmp_path / "tb")
    assert set(found) == {
        "train/loss", "time/phase_data_s", "validation/val_loss", "speed/core_tokens_per_s",
        "speed/effective_tokens_per_s", "time/step_time_s", "optimizer/c3o_foreach_groups",
    }  # fmt: skip
    assert found["train/loss"][:3] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert math.isnan(found["train/loss"][3][1])
    assert found["speed/core_tokens_per_s"] == [(4, 7.0)]


def test_a_checkpoint_puts_the_events_on_the_disk(tmp_path: Path) -> None:
    hook = TensorBoard(tmp_path, first_step=1)
    hook.on_record({"step": 1, "loss": 0.5})
    hook.on_checkpoint(1)
    assert curves(tmp_path) == {"train/loss": [(1, 0.5)]}
    hook.on_end()


def test_a_resumed_run_hides_what_the_crash_had_logged_past_it(tmp_path: Path) -> None:
    for first, last, value in ((1, 6, 1.0), (4, 7, 2.0)):  # died after 6, resumed from the checkpoint of 3
        hook = TensorBoard(tmp_path, first_step=first)
        for step in range(first, last + 1):
            hook.on_record({"step": step, "loss": value})
        hook.on_end()
    assert curves(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
