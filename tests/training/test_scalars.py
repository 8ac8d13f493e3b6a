"""AsyncScalars: every value arrives, in order, and the host never waits for it."""

from __future__ import annotations

import pytest
import torch

from eco_llm.training.scalars import AsyncScalars

CPU = torch.device("cpu")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_values_come_back_in_order_under_their_names(device: str) -> None:
    scalars = AsyncScalars(torch.device(device))
    for step in range(1, 6):
        scalars.push(step, ("loss", "norm"), torch.tensor([step / 8, -step], device=device))
    assert scalars.flush() == [(s, {"loss": s / 8, "norm": float(-s)}) for s in range(1, 6)]
    assert scalars.flush() == []
    assert scalars.collect() == []


def test_on_the_cpu_they_are_there_at_once() -> None:
    scalars = AsyncScalars(CPU)
    scalars.push(3, ("a",), torch.tensor([1.0]))
    assert scalars.collect() == [(3, {"a": 1.0})]


@pytest.mark.parametrize("device", DEVICES)
def test_values_are_those_at_the_push(device: str) -> None:
    scalars = AsyncScalars(torch.device(device))
    values = torch.zeros(2, device=device)
    for step in range(1, 4):
        values += 1
        scalars.push(step, ("a", "b"), values)
    values.fill_(-1)
    assert [v["a"] for _, v in scalars.flush()] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_arrives_as_it_is(device: str) -> None:
    scalars = AsyncScalars(torch.device(device))
    scalars.push(1, ("a", "b", "c"), torch.tensor([float("nan"), float("inf"), 1.0], device=device))
    ((_, got),) = scalars.flush()
    assert (got["a"] != got["a"], got["b"], got["c"]) == (True, float("inf"), 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_wrong_number_of_values_is_refused(device: str, count: int) -> None:
    scalars = AsyncScalars(torch.device(device))
    with pytest.raises(ValueError, match="3 names"):
        scalars.push(1, ("a", "b", "c"), torch.zeros(count, device=device))
    assert scalars.flush() == []


@pytest.mark.parametrize("device", DEVICES)
def test_the_names_may_change_from_step_to_step(device: str) -> None:
    scalars = AsyncScalars(torch.device(device))
    wanted = []
    for round_trip in range(3):  # buffers of a flushed round are used again by the next
        for step, size in enumerate((1, 20, 3, 40, 16)):
            names = tuple(f"n{i}" for i in range(size))
            values = torch.arange(size, dtype=torch.float32, device=device) + 100 * step + round_trip
            scalars.push(step, names, values)
            wanted.append((step, dict(zip(names, values.tolist(), strict=True))))
        assert scalars.flush() == wanted[-5:]


@pytest.mark.parametrize("device", DEVICES)
def test_more_steps_than_may_be_in_flight(device: str) -> None:
    scalars = AsyncScalars(torch.device(device), in_flight=2)
    got = []
    for step in range(50):
        scalars.push(step, ("a",), torch.tensor([float(step)], device=device))
        if step % 7 == 0:
            got += scalars.collect()
    got += scalars.flush()
    assert got == [(step, {"a": float(step)}) for step in range(50)]


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    scalars = AsyncScalars(torch.device("cuda"), in_flight=64)
    values = torch.zeros(3, device="cuda")
    scalars.push(0, ("a", "b", "c"), values)  # allocates the first pinned buffer, which may wait
    scalars.flush()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second of device time
        for step in range(1, 5):
            values = values + 1
            scalars.push(step, ("a", "b", "c"), values)
            assert scalars.collect() == []  # the device cannot have come this far
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert [(s, v["c"]) for s, v in scalars.flush()] == [(s, float(s)) for s in range(1, 5)]


@pytest.mark.gpu
def test_a_host_that_runs_ahead_is_held_back() -> None:
    scalars = AsyncScalars(torch.device("cuda"), in_flight=3)
    values = torch.ones(1, device="cuda")
    for step in range(3):
        torch.cuda._sleep(50_000_000)
        scalars.push(step, ("a",), values)
    scalars.push(3, ("a",), values)  # waits for step 0
    assert scalars.collect()[0] == (0, {"a": 1.0})
    scalars.flush()
