"""Where a training step's time goes, phase by phase, without making the host wait for the device.

The timer puts marks on a timeline and subtracts them later. In `events` mode a mark is a CUDA event: it gets
its time when the stream reaches it, so phase times are device times and an idle gap (the device waiting for
the host to launch) belongs to the phase in which it arises. In `host` mode a mark is a reading of
`time.perf_counter`. All the rest is the same code.

    begin_step          mark_core_begin   phase       phase      mark_core_end      end_step
        |- logging, checkpoint -|--------[data]------[forward]- ... ---|- evaluation -|
        |                       |<---------- core_step_time_s -------->|              |
        |<------------------------------ step_time_s -------------------------------->|

A step captured in a CUDA graph passes its phases once, at capture (`capturing`), which leaves an event-record node
where two phases meet. Each `replay` hands these nodes fresh events from the pool (perf/event_nodes.py), so that steps
under way keep marks of their own and are read late, like any others. The two rival designs are worse: events fixed in
the graph are overwritten by the next replay, so the host would have to wait for every step; and PTX documents the
`%globaltimer` that a kernel could store as target-specific, of no promised resolution.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from eco_llm.errors import UserError

if TYPE_CHECKING:
    import torch

Phase = Literal["data", "forward", "backward", "opt_step", "zero_grad"]
PHASES: tuple[Phase, ...] = get_args(Phase)
TimeMode = Literal["auto", "events", "host"]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One optimizer step's times in seconds, on the timer's clock. A phase that repeats is summed."""

    step: int
    phase_data_s: float
    """Events mode: time the device's stream spent in the data phase, copies and waiting included. A fetch
    that hides behind earlier device work costs nothing here; `data_host_s` has the host's side of it."""
    phase_forward_s: float
    phase_backward_s: float
    phase_opt_step_s: float
    phase_zero_grad_s: float
    phase_optim_s: float
    """backward + opt_step + zero_grad."""
    phase_train_s: float
    """forward + optim."""
    core_step_time_s: float
    """`mark_core_begin` (or `begin_step`, where there was none) to `mark_core_end`."""
    step_time_s: float
    """`begin_step` to `end_step`."""
    data_host_s: float
    """Host time spent inside the data phase, in both modes."""
    started_at: float
    """Host clock at `begin_step`, seconds since the epoch."""
    ended_at: float
    """Host clock at `end_step`, seconds since the epoch."""

    def as_dict(self) -> dict[str, float]:
        """{field: value}. `dataclasses.asdict` takes 60 µs for this, which is copying what needs no copy."""
        return {name: getattr(self, name) for name in STEP_TIMES}


STEP_TIMES = tuple(f.name for f in fields(StepTimes))


class Mark(Protocol):
    """A reusable point on a timeline."""

    def record(self) -> None:
        """Place the mark here and now; a second call moves it."""

    def reached(self) -> bool:
        """Whether the mark has its time yet. Never waits."""

    def wait(self) -> None:
        """Wait until the mark has its time."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds from `earlier` (a reached mark of the same kind) to this one."""


class HostMark:
    """A reading of the host's clock."""

    __slots__ = ("_clock", "_time")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._time = 0.0

    def record(self) -> None:
        self._time = self._clock()

    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: HostMark) -> float:
        return self._time - earlier._time


class CudaMark:
    """A CUDA event on the device's current stream (resolution about half a microsecond).

    Args:
        device: where the stream is.
        in_graph: recorded under capture, the mark becomes a node of the graph, and no edge to another stream.
    """

    __slots__ = ("_current_stream", "_device", "_event")

    def __init__(self, device: torch.device, *, in_graph: bool = False) -> None:
        import torch

        self._device = device
        self._current_stream = torch.cuda.current_stream
        self._event = torch.cuda.Event(enable_timing=True, external=in_graph)

    @property
    def handle(self) -> int:
        """The event's CUevent, for the driver. An event exists from its first record on, so that is done here."""
        if not self._event.cuda_event:
            self.record()
        return int(self._event.cuda_event)

    def record(self) -> None:
        self._event.record(self._current_stream(self._device))

    def reached(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: CudaMark) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1000.0


@dataclass(slots=True)
class CapturedPhases:
    """The phases that a captured step passes, in order. They touch: what lies between two belongs to the earlier."""

    names: list[Phase] = field(default_factory=list)
    boundaries: list[Mark] = field(default_factory=list)
    """The marks that capture left where one phase ends and the next begins: one fewer than names."""


@dataclass(slots=True)
class _Step:
    """The marks of one step, between `begin_step` and the harvest."""

    number: int
    started_at: float
    begin: Mark
    marks: list[Mark]
    """All of them, each once: neighbouring intervals may share one."""
    intervals: list[tuple[Phase, Mark, Mark]] = field(default_factory=list)
    core_begin: Mark | None = None
    core_end: Mark | None = None
    end: Mark | None = None
    ended_at: float = 0.0
    data_host_s: float = 0.0


class _PhaseContext:
    """`with timer.phase(name)`: one instance per name, reused, since phases never nest."""

    __slots__ = ("_host_start", "_name", "_range", "_start", "_timer")

    def __init__(self, timer: PhaseTimer, name: Phase) -> None:
        self._timer = timer
        self._name = name
        self._start: Mark | None = None
        self._range: AbstractContextManager[Any] | None = None
        self._host_start = 0.0

    def __enter__(self) -> None:
        timer = self._timer
        timer._check_can_open(self._name)
        timer._active = self._name
        if timer._captured is not None:
            timer._note(self._name)
            return
        if timer.annotate:
            import torch

            self._range = torch.profiler.record_function(f"eco/{self._name}")
            self._range.__enter__()
        self._host_start = timer._host_clock()
        self._start = timer._mark() if timer._open is not None else None

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        timer = self._timer
        timer._active = None
        if timer._captured is not None:
            return
        try:
            if exc_type is not None:  # after a device error no further call is safe: give the step up
                timer.discard_step()
            elif timer._open is not None and self._start is not None:
                timer._open.intervals.append((self._name, self._start, timer._mark()))
                if self._name == "data":
                    timer._open.data_host_s += timer._host_clock() - self._host_start
        finally:
            if self._range is not None:
                self._range.__exit__(None, None, None)
                self._range = None


class PhaseTimer:
    """Times the phases of optimizer steps; results come later, when the device has reached them.

    Per step: `begin_step()`, `with phase(name)` any number of times (no nesting), `mark_core_end()`,
    `end_step()`; then `collect()` returns the steps that have completed since. None of these waits for the
    device unless `sync_boundaries` is set. All phases must run on the stream that is current at `begin_step`.

    Args:
        device: what the step runs on.
        mode: `events` (CUDA events), `host` (`time.perf_counter`; on CUDA without `sync_boundaries` this
            times the launching, not the work), or `auto`: events on CUDA, else host. `timer.mode` is the
            resolved one.
        sync_boundaries: synchronise the device before every mark. Phases cannot overlap then, and host times
            are exact; the step is slower for it. No effect on CPU.
        max_in_flight: steps the device may be behind the host before steps go untimed (`dropped_steps` counts
            them): the pool of events is bounded and the timer never waits.
        make_mark, synchronize, host_clock, wall_clock: the sources of time, for tests.

    Raises:
        UserError: `events` without a CUDA device.
    """

    def __init__(
        self,
        device: torch.device | str,
        mode: TimeMode = "auto",
        sync_boundaries: bool = False,
        *,
        max_in_flight: int = 256,
        make_mark: Callable[[], Mark] | None = None,
        synchronize: Callable[[], None] | None = None,
        host_clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        on_cuda = str(device).startswith("cuda")
        if mode == "events" and not on_cuda:
            raise UserError(f"--perf-device-time-mode events needs a CUDA device, not {device}; use auto or host")
        self.mode: Literal["events", "host"] = "events" if on_cuda and mode != "host" else "host"
        self.sync_boundaries = sync_boundaries
        self.annotate = False
        """While true, phases are named ranges (`eco/forward`) in a torch.profiler trace."""
        self.dropped_steps = 0
        """Steps that went untimed because the device was `max_in_flight` steps behind."""
        self._make_mark = make_mark or _mark_source(self.mode, device, host_clock)
        self._make_boundary = make_mark or _mark_source(self.mode, device, host_clock, in_graph=True)
        self._synchronize = (synchronize or _synchronizer(device)) if sync_boundaries and on_cuda else None
        self._host_clock = host_clock
        self._wall_clock = wall_clock
        self._max_in_flight = max_in_flight
        self._pool: list[Mark] = []
        self._in_flight: deque[_Step] = deque()
        self._done: list[StepTimes] = []
        self._contexts = {name: _PhaseContext(self, name) for name in PHASES}
        self._number = 0
        self._open: _Step | None = None
        self._stage: Literal["outside", "core", "after core"] = "outside"
        self._active: Phase | None = None
        self._captured: CapturedPhases | None = None

    def begin_step(self, step: int | None = None) -> None:
        """Open a step, numbered `step` or one more than the last (the first is 1)."""
        if self._stage != "outside":
            raise RuntimeError("begin_step: the step before is still open")
        self._number = self._number + 1 if step is None else step
        self._stage = "core"
        self._harvest()
        if len(self._in_flight) >= self._max_in_flight:
            self.dropped_steps += 1
            return
        started_at = self._wall_clock()
        begin = self._mark()
        self._open = _Step(self._number, started_at, begin, [begin])

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Time the block as part of phase `name`. An exception in the block discards the step."""
        return self._contexts[name]

    @contextmanager
    def capturing(self) -> Iterator[CapturedPhases]:
        """While a CUDA graph is captured inside a step: phases are noted for `replay`, and nothing is timed.

        Raises:
            RuntimeError: the clock is the host's or synchronises the device; neither sees into a graph.
        """
        if self.mode != "events" or self._synchronize is not None:
            raise RuntimeError("only CUDA events without synchronised boundaries can time phases inside a graph")
        if self._captured is not None or self._active is not None:
            raise RuntimeError("capturing: a capture or a phase is open")
        captured = self._captured = CapturedPhases()
        try:
            yield captured
        finally:
            self._captured = self._active = None

    def replay(
        self, captured: CapturedPhases, bind: Callable[[Sequence[Mark]], None], launch: Callable[[], None]
    ) -> None:
        """Time a replay of captured phases, from the end of the phase before to the end of what `launch` launches.

        Args:
            captured: what `capturing` noted.
            bind: makes the next launch record the given marks at the boundaries.
            launch: launches the graph on the current stream.
        """
        self._check_can_open(captured.names[0])
        if self._open is None:  # an untimed step must not move marks that an earlier one is still to be read from
            bind(captured.boundaries)
            launch()
            return
        boundaries = [self._take() for _ in captured.boundaries]
        # Launching a graph is the first phase's cost, and on a waiting device shows in its time.
        start = self._open.intervals[-1][2] if self._open.intervals else self._mark()
        try:
            bind(boundaries)
            launch()
        except BaseException:
            self.discard_step()
            raise
        edges = [start, *boundaries, self._mark()]
        self._open.intervals += zip(captured.names, edges[:-1], edges[1:], strict=True)

    def mark_core_begin(self) -> None:
        """What happened since `begin_step` was loop overhead, such as a checkpoint; the core step begins here."""
        if self._stage != "core" or self._active is not None:
            raise RuntimeError("mark_core_begin: no step is open, its core has ended, or a phase is open")
        if self._open is not None:
            if self._open.intervals or self._open.core_begin is not None:
                raise RuntimeError("mark_core_begin: it was called before, or after a phase")
            self._open.core_begin = self._mark()

    def mark_core_end(self) -> None:
        """End of data, forward, backward, optimizer step and zero_grad; what follows is loop overhead."""
        if self._stage != "core" or self._active is not None:
            raise RuntimeError("mark_core_end: no step is open, it was called before, or a phase is open")
        self._stage = "after core"
        if self._open is not None:
            self._open.core_end = self._mark()

    def end_step(self) -> None:
        """Close the step; its times will be returned by a later `collect` or `flush`."""
        if self._stage != "after core":
            raise RuntimeError("end_step: call begin_step and mark_core_end first")
        self._stage = "outside"
        if self._open is not None:
            self._open.end = self._mark()
            self._open.ended_at = self._wall_clock()
            self._in_flight.append(self._open)
            self._open = None

    def discard_step(self) -> None:
        """Forget the open step, if any: a step that failed has no times."""
        if self._open is not None:
            self._release(self._open)
            self._open = None
        self._stage = "outside"
        self._active = None

    def collect(self) -> list[StepTimes]:
        """Times of the steps completed since the last call, oldest first. Never waits."""
        self._harvest()
        done, self._done = self._done, []
        return done

    def flush(self) -> list[StepTimes]:
        """Like `collect`, but wait for every closed step: for checkpoints and the end only."""
        if self._in_flight:
            assert self._in_flight[-1].end is not None
            self._in_flight[-1].end.wait()
        return self.collect()

    def _check_can_open(self, name: Phase) -> None:
        if self._stage != "core":
            raise RuntimeError(f"phase {name!r} is outside begin_step … mark_core_end")
        if self._active is not None:
            raise RuntimeError(f"phase {name!r} inside phase {self._active!r}: phases do not nest")

    def _note(self, name: Phase) -> None:
        """A phase begins under capture."""
        assert self._captured is not None
        if self._captured.names:
            boundary = self._make_boundary()
            boundary.record()
            self._captured.boundaries.append(boundary)
        self._captured.names.append(name)

    def _take(self) -> Mark:
        """A mark that is nobody's, or the open step's from now on."""
        mark = self._pool.pop() if self._pool else self._make_mark()
        if self._open is not None:
            self._open.marks.append(mark)
        return mark

    def _mark(self) -> Mark:
        if self._synchronize is not None:
            self._synchronize()
        mark = self._take()
        mark.record()
        return mark

    def _release(self, step: _Step) -> None:
        self._pool += step.marks

    def _harvest(self) -> None:
        """Turn completed steps into times. One query a call in the usual case: the stream is in order, so a
        reached end means that every mark of the step is reached."""
        while self._in_flight:
            step = self._in_flight[0]
            assert step.core_end is not None
            assert step.end is not None
            if not step.end.reached():
                return
            self._in_flight.popleft()
            phases = dict.fromkeys(PHASES, 0.0)
            for name, start, end in step.intervals:
                phases[name] += end.seconds_since(start)
            optim = phases["backward"] + phases["opt_step"] + phases["zero_grad"]
            self._done.append(
                StepTimes(
                    step=step.number,
                    phase_data_s=phases["data"],
                    phase_forward_s=phases["forward"],
                    phase_backward_s=phases["backward"],
                    phase_opt_step_s=phases["opt_step"],
                    phase_zero_grad_s=phases["zero_grad"],
                    phase_optim_s=optim,
                    phase_train_s=phases["forward"] + optim,
                    core_step_time_s=step.core_end.seconds_since(step.core_begin or step.begin),
                    step_time_s=step.end.seconds_since(step.begin),
                    data_host_s=step.data_host_s,
                    started_at=step.started_at,
                    ended_at=step.ended_at,
                )
            )
            self._release(step)


def _mark_source(
    mode: str, device: torch.device | str, clock: Callable[[], float], in_graph: bool = False
) -> Callable[[], Mark]:
    if mode == "host":
        return lambda: HostMark(clock)
    import torch

    cuda = torch.device(device)
    return lambda: CudaMark(cuda, in_graph=in_graph)


def _synchronizer(device: torch.device | str) -> Callable[[], None]:
    import torch

    return lambda: torch.cuda.synchronize(device)
