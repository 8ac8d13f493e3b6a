"""The ledger's arithmetic, with an allocator that says what the test wants."""

from __future__ import annotations

import pytest
import torch

from eco_llm.perf.memory import POINTS, Counters, Known, MemoryLedger, Snapshot, step_memory, tensor_bytes

GIB = 2**30


class Scripted:
    """Counters that the test sets; the peak is kept as the real allocator does."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = self.gradients = 0
        self.in_graph = False

    def set(self, allocated: int, *, high: int = 0, gradients: int | None = None) -> None:
        self.allocated = allocated
        self.peak = max(self.peak, high, allocated)
        self.reserved = max(self.reserved, self.peak + 7)
        self.gradients = self.gradients if gradients is None else gradients

    def read(self) -> Counters:
        return Counters(self.allocated, self.peak, self.reserved)

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def capturing(self) -> bool:
        return self.in_graph

    def known(self) -> Known:
        return Known(weights=100, gradients=self.gradients, optimizer=200)


def run_step(ledger: MemoryLedger, a: Scripted) -> None:
    """From 310: forward passes 1500 more and keeps 1000, backward passes 1700 and leaves 100 of gradients."""
    a.set(310, gradients=0)
    ledger.at("begin")
    a.set(1310, high=1810)
    ledger.at("forward")
    a.set(410, high=2010, gradients=100)
    ledger.at("backward")
    a.set(415, high=420)
    ledger.at("opt_step")


def test_where_a_step_goes() -> None:
    a = Scripted()
    ledger = MemoryLedger(a, a.known)
    run_step(ledger, a)
    found = ledger.latest
    assert found is not None
    assert (found.weights, found.gradients, found.optimizer, found.other) == (100, 100, 200, 10)
    assert found.activations == 1000
    assert found.peak == 2010
    assert found.temporary == 2010 - 1310  # above the most that any point saw
    assert found.fragmentation == 7
    assert found.allocated == {"begin": 310, "forward": 1310, "backward": 410, "opt_step": 415}
    # At the worst moment: everything that was there before, what forward left, and what came and went.
    before = found.weights + found.optimizer + found.other
    assert before + found.activations + found.temporary == found.peak


def test_a_later_steps_peak_is_its_own_and_the_runs_is_kept() -> None:
    a = Scripted()
    a.set(50, high=9999)  # before the first step
    ledger = MemoryLedger(a, a.known)
    run_step(ledger, a)
    run_step(ledger, a)
    assert ledger.latest is not None
    assert ledger.latest.peak == 2010
    assert ledger.highest == 9999
    assert ledger.finished == 2


def test_gradients_that_earlier_micro_steps_left_are_no_activations() -> None:
    a = Scripted()
    ledger = MemoryLedger(a, a.known)
    a.set(310, gradients=0)
    ledger.at("begin")
    a.set(1310)
    ledger.at("forward")
    a.set(410, gradients=100)
    ledger.at("backward")
    a.set(1410)  # the second micro-step's forward, beside the first one's gradients
    ledger.at("forward")
    a.set(410)
    ledger.at("backward")
    ledger.at("opt_step")
    assert ledger.latest is not None
    assert ledger.latest.activations == 1000
    assert ledger.latest.gradients == 100


def test_a_capture_is_said_to_be_one() -> None:
    a = Scripted()
    ledger = MemoryLedger(a, a.known)
    a.in_graph = True
    run_step(ledger, a)
    assert ledger.latest is not None
    assert ledger.latest.captured
    assert "captured" in ledger.latest.as_gib()["measured"]
    assert "(as captured)" in ledger.latest.line()


def test_units() -> None:
    points = {point: (Counters(4 * GIB, 5 * GIB, 6 * GIB), Known(GIB, 0, GIB)) for point in POINTS}
    found = step_memory(points, captured=False).as_gib()
    assert found["weights_gib"] == 1.0
    assert found["other_gib"] == 2.0
    assert found["temporary_gib"] == 1.0
    assert found["fragmentation_gib"] == 1.0
    assert found["allocated_gib"] == dict.fromkeys(POINTS, 4.0)


def test_a_missing_point_is_named() -> None:
    points = {point: (Counters(0, 0, 0), Known(0, 0, 0)) for point in POINTS[:2]}
    with pytest.raises(ValueError, match="backward, opt_step"):
        step_memory(points, captured=False)


def test_tensors_that_share_memory_count_once() -> None:
    base = torch.zeros(1000)
    assert tensor_bytes([base, base[:10], base.view(10, 100), torch.zeros(7)]) == 4028
    assert tensor_bytes([]) == 0


@pytest.mark.gpu
def test_the_real_allocator(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import pickle

    from eco_llm.perf.memory import CudaAllocator

    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.zeros(2**20, 4, device=device, requires_grad=True)
    state: list[torch.Tensor] = []

    def known() -> Known:
        grads = [] if weight.grad is None else [weight.grad]
        return Known(tensor_bytes([weight]), tensor_bytes(grads), tensor_bytes(state))

    snapshot = Snapshot(device)
    snapshot.start()
    ledger = MemoryLedger(CudaAllocator(device), known)
    before = torch.cuda.memory_allocated(device)
    ledger.at("begin")
    loss = (weight * weight).sin().sum()  # keeps the product and weight, 16 MiB of them new
    ledger.at("forward")
    loss.backward()
    ledger.at("backward")
    state.append(torch.zeros_like(weight))
    ledger.at("opt_step")
    found = ledger.latest
    assert found is not None
    assert found.weights == found.gradients == found.optimizer == 2**24
    assert found.activations == pytest.approx(2**24, rel=0.01)
    assert found.allocated["begin"] == before
    assert found.temporary >= 2**24 - 2**20
    assert found.fragmentation >= 0
    assert snapshot.write(tmp_path / "s.pickle")
    with (tmp_path / "s.pickle").open("rb") as file:
        assert {"segments", "device_traces"} <= set(pickle.load(file))  # what the viewer reads
    assert not snapshot.write(tmp_path / "t.pickle")
