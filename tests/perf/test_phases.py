"""PhaseTimer: sums, definitions, order, boundedness, on a fake timeline; device truth is in the gpu tests."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import ClassVar

import pytest
import torch

from eco_llm.errors import UserError
from eco_llm.perf.phases import PHASES, CapturedPhases, HostMark, PhaseTimer, StepTimes


class Stream:
    """A device that is behind its host: marks get their time, in order, when `run` lets the stream reach them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[tuple[float, StreamMark | None]] = []
        self.made = 0

    def work(self, seconds: float) -> None:
        self.queue.append((seconds, None))

    def make_mark(self) -> StreamMark:
        self.made += 1
        return StreamMark(self)

    def run(self) -> None:
        for seconds, mark in self.queue:
            self.now += seconds
            if mark is not None:
                mark.time = self.now
        self.queue.clear()


class StreamMark:
    waits: ClassVar[int] = 0

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.time: float | None = None

    def record(self) -> None:
        self.time = None
        self.stream.queue.append((0.0, self))

    def reached(self) -> bool:
        return self.time is not None

    def wait(self) -> None:
        StreamMark.waits += 1
        self.stream.run()

    def seconds_since(self, earlier: StreamMark) -> float:
        assert self.time is not None
        assert earlier.time is not None
        return self.time - earlier.time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def on_stream(stream: Stream, **options: object) -> PhaseTimer:
    return PhaseTimer("cuda:0", make_mark=stream.make_mark, **options)  # type: ignore[arg-type]


def one_step(timer: PhaseTimer, stream: Stream, scale: float = 1.0) -> None:
    timer.begin_step()
    with timer.phase("data"):
        stream.work(0.001 * scale)
    with timer.phase("forward"):
        stream.work(0.010 * scale)
    with timer.phase("backward"):
        stream.work(0.020 * scale)
    with timer.phase("opt_step"):
        stream.work(0.004 * scale)
    with timer.phase("zero_grad"):
        stream.work(0.002 * scale)
    timer.mark_core_end()
    stream.work(0.005 * scale)
    timer.end_step()


def test_every_time_has_its_definition() -> None:
    stream = Stream()
    timer = on_stream(stream)
    one_step(timer, stream)
    stream.run()
    (times,) = timer.collect()
    assert times.step == 1
    expected = {
        "phase_data_s": 0.001, "phase_forward_s": 0.010, "phase_backward_s": 0.020, "phase_opt_step_s": 0.004,
        "phase_zero_grad_s": 0.002, "phase_optim_s": 0.026, "phase_train_s": 0.036, "core_step_time_s": 0.037,
        "step_time_s": 0.042,
    }  # fmt: skip
    assert {k: getattr(times, k) for k in expected} == pytest.approx(expected)


def test_what_precedes_the_core_is_in_the_step_alone() -> None:
    stream = Stream()
    timer = on_stream(stream)
    made = []
    for _ in range(3):
        timer.begin_step()
        stream.work(1.0)  # a checkpoint
        timer.mark_core_begin()
        with timer.phase("forward"):
            stream.work(0.010)
        timer.mark_core_end()
        timer.end_step()
        stream.run()
        (times,) = timer.collect()
        assert times.core_step_time_s == pytest.approx(0.010)
        assert times.step_time_s == pytest.approx(1.010)
        made.append(stream.made)
    assert made[0] == made[2]  # its mark goes back to the pool too


def test_the_core_begins_once_and_before_its_phases() -> None:
    timer = PhaseTimer("cpu")
    with pytest.raises(RuntimeError, match="mark_core_begin: no step is open"):
        timer.mark_core_begin()
    timer.begin_step()
    timer.mark_core_begin()
    with pytest.raises(RuntimeError, match="called before, or after a phase"):
        timer.mark_core_begin()
    timer.discard_step()
    timer.begin_step()
    with timer.phase("data"):
        pass
    with pytest.raises(RuntimeError, match="called before, or after a phase"):
        timer.mark_core_begin()


def test_phases_repeated_by_accumulation_are_summed() -> None:
    clock = Clock()
    timer = PhaseTimer("cpu", host_clock=clock)
    timer.begin_step(41)
    for _ in range(3):
        for name, seconds in (("data", 0.25), ("forward", 1.0), ("backward", 2.0)):
            with timer.phase(name):  # type: ignore[arg-type]
                clock.now += seconds
    clock.now += 0.5  # between phases: part of the core step, of no phase
    timer.mark_core_end()
    clock.now += 4.0
    timer.end_step()
    (times,) = timer.collect()
    assert (times.step, times.phase_data_s, times.data_host_s) == (41, 0.75, 0.75)
    assert (times.phase_forward_s, times.phase_backward_s, times.phase_opt_step_s) == (3.0, 6.0, 0.0)
    assert (times.core_step_time_s, times.step_time_s) == (10.25, 14.25)


def test_collect_never_waits_and_flush_does() -> None:
    stream = Stream()
    timer = on_stream(stream)
    StreamMark.waits = 0
    for _ in range(3):
        one_step(timer, stream)
        assert timer.collect() == []
    assert StreamMark.waits == 0
    assert [times.step for times in timer.flush()] == [1, 2, 3]
    assert StreamMark.waits == 1
    assert timer.collect() == []
    assert timer.flush() == []


def test_results_come_in_order_while_later_steps_run() -> None:
    stream = Stream()
    timer = on_stream(stream)
    one_step(timer, stream, scale=1.0)
    stream.run()
    one_step(timer, stream, scale=2.0)
    first = timer.collect()
    assert [times.step for times in first] == [1]
    stream.run()
    second = timer.collect()
    assert [times.step for times in second] == [2]
    assert second[0].step_time_s == pytest.approx(2 * first[0].step_time_s)


def test_marks_are_reused() -> None:
    stream = Stream()
    timer = on_stream(stream)
    for _ in range(50):
        one_step(timer, stream)
        stream.run()
        timer.collect()
    assert stream.made <= 2 * (3 + 2 * len(PHASES))


def test_steps_in_flight_are_bounded_and_drops_are_counted() -> None:
    stream = Stream()
    timer = on_stream(stream, max_in_flight=4)
    StreamMark.waits = 0
    for _ in range(10):
        one_step(timer, stream)
    assert StreamMark.waits == 0
    assert timer.dropped_steps == 6
    assert stream.made == 4 * (3 + 2 * len(PHASES))
    stream.run()
    assert [times.step for times in timer.collect()] == [1, 2, 3, 4]
    one_step(timer, stream)
    stream.run()
    assert [times.step for times in timer.collect()] == [11]


def test_a_failed_phase_discards_its_step_and_the_next_is_timed() -> None:
    stream = Stream()
    timer = on_stream(stream)
    timer.begin_step()
    with pytest.raises(MemoryError), timer.phase("forward"):
        raise MemoryError
    one_step(timer, stream)
    stream.run()
    (times,) = timer.collect()
    assert times.step == 2
    assert times.phase_forward_s == pytest.approx(0.010)


# -- phases captured in a graph ----------------------------------------------------------------------------------


def capture(timer: PhaseTimer) -> CapturedPhases:
    with timer.capturing() as captured:
        for name in ("forward", "backward", "forward", "backward", "opt_step"):
            with timer.phase(name):  # type: ignore[arg-type]
                pass
    return captured


class Graph:
    """Work of known length between marks that can be exchanged, as `EventNodes` does."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.marks: list[StreamMark] = []

    def bind(self, marks: object) -> None:
        self.marks = list(marks)  # type: ignore[call-overload]

    def launch(self) -> None:
        for mark, milliseconds in zip([*self.marks, None], (10, 20, 11, 22, 4), strict=True):
            self.stream.work(milliseconds / 1000)
            if mark is not None:
                mark.record()


def replayed(timer: PhaseTimer, stream: Stream, captured: CapturedPhases, graph: Graph) -> None:
    timer.begin_step()
    with timer.phase("data"):
        stream.work(0.001)
    timer.replay(captured, graph.bind, graph.launch)
    timer.mark_core_end()
    timer.end_step()


def test_replayed_phases_are_timed_however_far_the_device_is_behind() -> None:
    stream = Stream()
    timer, graph = on_stream(stream), Graph(stream)
    timer.begin_step()
    captured = capture(timer)
    timer.discard_step()
    stream.run()
    assert captured.names == ["forward", "backward", "forward", "backward", "opt_step"]
    assert len(captured.boundaries) == 4
    for _ in range(5):
        replayed(timer, stream, captured, graph)
    assert timer.collect() == []
    stream.run()
    times = timer.collect()
    assert [t.step for t in times] == [2, 3, 4, 5, 6]
    for t in times:
        assert (t.phase_forward_s, t.phase_backward_s, t.phase_opt_step_s) == pytest.approx((0.021, 0.042, 0.004))
        assert t.phase_data_s + t.phase_train_s == pytest.approx(t.core_step_time_s)
    made = stream.made
    for _ in range(20):
        replayed(timer, stream, captured, graph)
        stream.run()
        timer.collect()
    assert stream.made == made  # shared marks go back to the pool, once
    assert len(timer._pool) == len({id(mark) for mark in timer._pool})


def test_an_untimed_replay_moves_no_mark_that_is_still_to_be_read() -> None:
    stream = Stream()
    timer, graph = on_stream(stream, max_in_flight=2), Graph(stream)
    timer.begin_step()
    captured = capture(timer)
    timer.discard_step()
    for _ in range(6):
        replayed(timer, stream, captured, graph)
    assert timer.dropped_steps == 4
    assert graph.marks == captured.boundaries
    stream.run()
    assert [t.phase_forward_s for t in timer.collect()] == pytest.approx([0.021, 0.021])


def test_a_failed_replay_discards_its_step() -> None:
    stream = Stream()
    timer, graph = on_stream(stream), Graph(stream)
    timer.begin_step()
    captured = capture(timer)

    def fail() -> None:
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        timer.replay(captured, graph.bind, fail)
    replayed(timer, stream, captured, graph)
    stream.run()
    assert len(timer.collect()) == 1


def test_only_events_see_into_a_graph() -> None:
    for timer in (PhaseTimer("cpu"), on_stream(Stream(), mode="host"), on_stream(Stream(), sync_boundaries=True)):
        with pytest.raises(RuntimeError, match="only CUDA events"), timer.capturing():
            pass
    timer = on_stream(Stream())
    timer.begin_step()
    with pytest.raises(RuntimeError, match="a capture or a phase is open"), timer.phase("forward"), timer.capturing():
        pass


def test_calls_out_of_order_are_refused() -> None:
    timer = PhaseTimer("cpu")
    with pytest.raises(RuntimeError, match="outside begin_step"), timer.phase("forward"):
        pass
    with pytest.raises(RuntimeError, match="mark_core_end"):
        timer.mark_core_end()
    timer.begin_step()
    with pytest.raises(RuntimeError, match="still open"):
        timer.begin_step()
    with pytest.raises(RuntimeError, match="end_step"):
        timer.end_step()
    with pytest.raises(KeyError):
        timer.phase("backwards")  # type: ignore[arg-type]
    timer.mark_core_end()
    with pytest.raises(RuntimeError, match="outside begin_step"), timer.phase("forward"):
        pass
    timer.end_step()
    timer.begin_step()
    with pytest.raises(RuntimeError, match="do not nest"), timer.phase("forward"), timer.phase("data"):
        pass


def test_modes_resolve_and_impossible_ones_are_refused() -> None:
    assert PhaseTimer("cpu").mode == "host"
    assert PhaseTimer(torch.device("cpu"), "auto").mode == "host"
    assert on_stream(Stream()).mode == "events"
    assert on_stream(Stream(), mode="host").mode == "host"
    with pytest.raises(UserError, match="--perf-device-time-mode events needs a CUDA device"):
        PhaseTimer("cpu", "events")


def test_sync_boundaries_synchronise_before_every_mark() -> None:
    stream = Stream()
    synced = 0

    def synchronize() -> None:
        nonlocal synced
        synced += 1

    timer = on_stream(stream, sync_boundaries=True, synchronize=synchronize)
    one_step(timer, stream)
    assert synced == 3 + 2 * len(PHASES)
    PhaseTimer("cpu", sync_boundaries=True).begin_step()  # nothing to synchronise: must not raise


def test_host_times_are_real_and_add_up() -> None:
    timer = PhaseTimer("cpu")
    timer.begin_step()
    with timer.phase("data"):
        time.sleep(0.02)
    with timer.phase("forward"):
        time.sleep(0.03)
    timer.mark_core_end()
    time.sleep(0.01)
    timer.end_step()
    (times,) = timer.flush()
    assert 0.02 <= times.phase_data_s < 0.2
    assert 0.03 <= times.phase_forward_s < 0.2
    assert times.core_step_time_s == pytest.approx(times.phase_data_s + times.phase_train_s, abs=2e-3)
    assert times.step_time_s >= times.core_step_time_s + 0.01
    assert times.ended_at > times.started_at


def test_overhead_of_a_step_is_microseconds() -> None:
    """13 marks a step. Generous bound (a shared core), yet far below 1% of any step that trains a model."""
    timer = PhaseTimer("cpu")
    stream = Stream()
    for _ in range(100):
        one_step(timer, stream)
    timer.collect()
    gc.disable()
    try:
        best = min(_seconds_of_steps(timer, stream, 200) for _ in range(5)) / 200
    finally:
        gc.enable()
    assert best < 200e-6


def _seconds_of_steps(timer: PhaseTimer, stream: Stream, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        one_step(timer, stream)
        timer.collect()
    return time.perf_counter() - start


def test_host_mark_measures_its_clock() -> None:
    clock = Clock()
    first, second = HostMark(clock), HostMark(clock)
    first.record()
    clock.now += 7.0
    second.record()
    assert second.seconds_since(first) == 7.0
    assert second.reached()


def test_step_times_are_a_flat_record_of_numbers() -> None:
    times = StepTimes(1, *[0.5] * (len(dataclasses.fields(StepTimes)) - 1))
    assert all(isinstance(value, int | float) for value in dataclasses.asdict(times).values())


def _cycles_per_second() -> float:
    """Rate of torch.cuda._sleep's clock: timed with events over a sleep long enough to dwarf its launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):  # let the clocks rise
        torch.cuda._sleep(200_000_000)
    start.record()
    torch.cuda._sleep(200_000_000)
    end.record()
    end.synchronize()
    return 200_000_000 / (start.elapsed_time(end) / 1000.0)


@pytest.mark.gpu
def test_device_phases_are_what_the_device_did_and_nothing_syncs() -> None:
    rate = _cycles_per_second()
    seconds = {"data": 0.002, "forward": 0.010, "backward": 0.020, "opt_step": 0.005, "zero_grad": 0.003}
    timer = PhaseTimer("cuda")
    assert timer.mode == "events"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    collected: list[StepTimes] = []
    try:
        start = time.perf_counter()
        for _ in range(8):
            timer.begin_step()
            for name in PHASES:
                with timer.phase(name):
                    torch.cuda._sleep(int(seconds[name] * rate))
            timer.mark_core_end()
            torch.cuda._sleep(int(0.004 * rate))
            timer.end_step()
            collected += timer.collect()
        host = time.perf_counter() - start
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert host < 0.1, "the host waited for the device"
    collected += timer.flush()
    assert [times.step for times in collected] == list(range(1, 9))
    for times in collected[1:]:
        for name in PHASES:
            assert getattr(times, f"phase_{name}_s") == pytest.approx(seconds[name], rel=0.05)
        assert times.data_host_s < 0.001
        phases = times.phase_data_s + times.phase_train_s
        assert phases == pytest.approx(times.core_step_time_s, rel=0.02)
        assert times.step_time_s == pytest.approx(times.core_step_time_s + 0.004, rel=0.05)


@pytest.mark.gpu
def test_launch_bound_gaps_belong_to_the_phase_that_made_them() -> None:
    timer = PhaseTimer("cuda")
    torch.cuda.synchronize()
    timer.begin_step()
    started = time.perf_counter()
    with timer.phase("data"):
        time.sleep(0.02)  # nothing queued: the device waits for its data
        fetched = time.perf_counter()
    with timer.phase("forward"):
        time.sleep(0.01)
        torch.cuda._sleep(1000)
        launched = time.perf_counter()
    timer.mark_core_end()
    timer.end_step()
    (times,) = timer.flush()
    # Against the host's own readings: a sleep lasts as long as the system likes.
    assert times.phase_data_s == pytest.approx(fetched - started, rel=0.1)
    assert times.phase_forward_s == pytest.approx(launched - fetched, rel=0.1)
    assert times.phase_data_s + times.phase_forward_s == pytest.approx(times.core_step_time_s, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["host", "events"])
def test_synchronised_times_agree_with_events_around_the_work(mode: str) -> None:
    cycles = int(0.02 * _cycles_per_second())
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    timer = PhaseTimer("cuda", mode, sync_boundaries=True)  # type: ignore[arg-type]
    timer.begin_step()
    with timer.phase("forward"):
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
    timer.mark_core_end()
    timer.end_step()
    (times,) = timer.flush()
    assert times.phase_forward_s == pytest.approx(before.elapsed_time(after) / 1000, rel=0.05)
