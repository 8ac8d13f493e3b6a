"""GraphedStep without a GPU: what surrounds a replay. A stand-in records the work and reruns it at each replay."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from eco_llm.config import (
    C3OConfig,
    InstantConfig,
    OptimizerConfig,
    PerfConfig,
    RuntimeConfig,
    SigmaConfig,
    TrainConfig,
)
from eco_llm.data.loader import Batch
from eco_llm.errors import UserError
from eco_llm.model.serving import Kernels
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.release import ReleasedUpdate
from eco_llm.optim.update import Update
from eco_llm.perf.phases import CapturedPhases, HostMark, Mark, PhaseTimer
from eco_llm.runtime import Runtime
from eco_llm.training.graph import CaptureError, GraphedStep, compiles_blocks, wants_graph
from eco_llm.training.step import StepOutput, TrainStep

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
SHAPE = (2, 24)
TINY = SigmaConfig(
    d_model=32, n_layers=3, mamba_ratio=2, n_heads=2, kv_latent_dim=16, rope_head_dim=8, mamba_head_dim=16,
    mamba_state_dim=8, vocab_size=300,
)  # fmt: skip


class Source(Iterator[Batch]):
    """Batches as the loader makes them: new memory every time. A batch of zeros is never among them."""

    def __init__(self) -> None:
        self.made = 0

    def __next__(self) -> Batch:
        self.made += 1
        tokens = torch.randint(1, 300, (2, *SHAPE), generator=torch.Generator().manual_seed(self.made))
        return Batch(tokens[0], tokens[1])


class StandIn:
    """A `Graph` whose replay runs the work again. Capture must not run it, so what it did is undone."""

    def __init__(
        self,
        state: list[torch.Tensor],
        optimizer: torch.optim.Optimizer | ReleasedUpdate,
        failure: Exception | None = None,
    ):
        self._state, self._optimizer, self._failure = state, optimizer, failure
        self.boundaries: list[list[Mark]] = []
        self.abandoned = False
        self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], StepOutput], phases: CapturedPhases) -> StepOutput:
        assert all(p.grad is None for p in self._state)
        before, optimizer = [p.detach().clone() for p in self._state], copy.deepcopy(self._optimizer.state_dict())
        output = work()
        if self._failure is not None:
            raise self._failure
        with torch.no_grad():
            for p, old in zip(self._state, before, strict=True):
                p.copy_(old)
        self._optimizer.load_state_dict(optimizer)
        output.values.fill_(float("nan"))
        self._work, self._output = work, output
        self.captured = len(phases.names)
        return output

    def replay(self, timer: PhaseTimer, phases: CapturedPhases) -> None:
        assert all(p.grad is None for p in self._state)
        self.replays += 1

        def launch() -> None:
            with timer.capturing():  # so that the work's own phases are not taken for this step's
                self._output.values.copy_(self._work().values)
            for p in self._state:
                p.grad = None

        def bind(marks: object) -> None:
            self.boundaries.append(list(marks))  # type: ignore[call-overload]
            for mark in self.boundaries[-1]:
                mark.record()

        timer.replay(phases, bind, launch)

    def abandon(self) -> None:
        self.abandoned = True


@dataclasses.dataclass
class Parts:
    model: SigmaLLM
    update: Update | ReleasedUpdate
    timer: PhaseTimer
    source: Source
    step: TrainStep

    def parameters(self) -> list[torch.Tensor]:
        return list(self.model.parameters())


def parts(accum: int = 1, released: bool = False) -> Parts:
    torch.manual_seed(0)
    model = SigmaLLM(TINY)
    settings = OptimizerConfig(lr=1e-2, grad_clip=0.0 if released else 1.0)
    groups = model.parameter_groups(0.1)
    update = (
        ReleasedUpdate(groups, model.update_units(), settings, C3OConfig(), "cpu")
        if released
        else Update(build_optimizer(groups, settings, C3OConfig(), "cpu"), settings)
    )
    timer = PhaseTimer("cuda:0", make_mark=HostMark)  # events mode, on the host's clock
    source = Source()
    return Parts(model, update, timer, source, TrainStep(model, update, source, CPU, timer, accum))  # type: ignore[arg-type]


def train(p: Parts, step: TrainStep | GraphedStep, n: int, *, profiled: range = range(0)) -> list[list[float]]:
    values = []
    for i in range(n):
        p.timer.begin_step()
        step.prepare()
        p.timer.mark_core_begin()
        p.timer.annotate = i in profiled
        output = step.run()
        p.timer.annotate = False
        p.timer.mark_core_end()
        p.timer.end_step()
        values.append(output.values.tolist())
        assert output.names[:3] == ("loss", "grad_norm", "applied")
        assert len(output.names) == len(values[-1])
    return values


def graphed(p: Parts, **options: object) -> tuple[GraphedStep, StandIn]:
    state = p.update if isinstance(p.update, ReleasedUpdate) else p.update.optimizer
    stand_in = StandIn(p.parameters(), state, options.pop("failure", None))  # type: ignore[arg-type]
    fall_back = options.pop("fall_back", None)
    return GraphedStep(p.step, SHAPE, fall_back=fall_back, make_graph=lambda device: stand_in), stand_in  # type: ignore[arg-type]


@pytest.mark.parametrize("accum", [1, 3])
def test_replays_train_exactly_as_steps_do(accum: int) -> None:
    eager, captured = parts(accum), parts(accum)
    step, stand_in = graphed(captured)
    expected = train(eager, eager.step, 5)
    assert train(captured, step, 5) == expected
    assert stand_in.replays == 5
    assert captured.source.made == eager.source.made == 5 * accum
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.grad is None


def test_released_steps_replay_and_are_profiled_as_they_run() -> None:
    """Nothing is left for a replay, or an eager step between two, to clear."""
    eager, captured = parts(released=True), parts(released=True)
    step, stand_in = graphed(captured)
    assert train(captured, step, 6, profiled=range(2, 4)) == train(eager, eager.step, 6)
    assert stand_in.replays == 4
    assert step._gradients == []
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.grad is None


def test_preparing_changes_nothing_and_happens_once() -> None:
    p, fresh = parts(), parts()
    step, stand_in = graphed(p)
    p.timer.begin_step()
    step.prepare()
    step.prepare()
    assert stand_in.captured == 3
    assert p.source.made == 0
    assert not p.update.state_dict()["state"] or all(
        not torch.as_tensor(v).any() for state in p.update.state_dict()["state"].values() for v in state.values()
    )
    for a, b in zip(p.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def test_profiled_steps_run_eagerly_into_the_same_gradients() -> None:
    eager, captured = parts(2), parts(2)
    step, stand_in = graphed(captured)
    assert train(captured, step, 6, profiled=range(2, 4)) == train(eager, eager.step, 6)
    assert stand_in.replays == 4
    addresses = {g.data_ptr() for _, g in step._gradients}
    seen: set[int] = set()
    update = captured.update.step

    def watched(loss: torch.Tensor) -> object:
        seen.update(p.grad.data_ptr() for p in captured.parameters() if p.grad is not None)
        return update(loss)

    captured.update.step = watched  # type: ignore[method-assign, assignment]
    train(captured, step, 1, profiled=range(1))
    assert seen == addresses


def test_a_failed_capture_falls_back_only_where_it_may() -> None:
    said: list[Exception] = []
    p, eager = parts(), parts()
    step, stand_in = graphed(p, failure=RuntimeError("not capturable"), fall_back=said.append)
    stand_in_params = [q.detach().clone() for q in p.parameters()]
    p.timer.begin_step()
    step.prepare()
    assert [str(e) for e in said] == ["not capturable"]
    assert stand_in.abandoned
    for q, old in zip(
        p.parameters(), stand_in_params, strict=True
    ):  # the stand-in ran the step; a real capture does not
        q.data.copy_(old)
        assert q.grad is None
    p.update.optimizer.state.clear()
    p.timer.discard_step()
    assert train(p, step, 2) == train(eager, eager.step, 2)

    p = parts()
    step, _ = graphed(p, failure=RuntimeError("not capturable"))
    p.timer.begin_step()
    with pytest.raises(CaptureError, match="RuntimeError: not capturable"):
        step.prepare()


def test_out_of_memory_under_capture_is_out_of_memory_whatever_hides_it() -> None:
    def hidden() -> Exception:
        try:
            try:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            return error

    said: list[Exception] = []
    p = parts()
    step, _ = graphed(p, failure=hidden(), fall_back=said.append)
    p.timer.begin_step()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step.prepare()
    assert said == []


class LateMark(HostMark):
    """A mark of a device that is behind, until someone waits for it."""

    behind = True

    def reached(self) -> bool:
        return not LateMark.behind

    def wait(self) -> None:
        LateMark.behind = False


def test_phases_of_a_replay_touch_and_take_turns_with_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateMark, "behind", True)
    p = parts(2)
    p.timer = p.step.timer = PhaseTimer("cuda:0", make_mark=LateMark)
    step, stand_in = graphed(p)
    train(p, step, 3)
    assert stand_in.captured == 5  # forward, backward, forward, backward, opt_step
    assert all(len(marks) == 4 for marks in stand_in.boundaries)
    in_flight = [mark for marks in stand_in.boundaries for mark in marks]
    assert len({id(mark) for mark in in_flight}) == len(in_flight)  # no step has been read yet
    times = p.timer.flush()
    assert len(times) == 3
    for t in times:
        assert t.phase_data_s + t.phase_train_s == pytest.approx(t.core_step_time_s, rel=0.1)
        assert t.phase_zero_grad_s < 1e-3
        assert t.phase_forward_s > 0


def test_nothing_is_read_from_a_source_that_may_have_changed() -> None:
    """The next batches may be made while a replay is under way: inputs are the graph's own memory."""
    p = parts()
    step, _ = graphed(p)
    train(p, step, 1)
    kept = [batch.inputs.clone() for batch in step._inputs]
    next(p.source)
    assert all(torch.equal(a, b.inputs) for a, b in zip(kept, step._inputs, strict=True))
    assert all(b.inputs.is_contiguous() and b.targets.is_contiguous() for b in step._inputs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"runtime": RuntimeConfig(device="cpu", cuda_graph="on")}, "--device cpu"),
        ({"optimizer": OptimizerConfig(optimizer="muon")}, "muon"),
        ({"c3o": C3OConfig(c3o_credit_gain=0.5)}, "--c3o-credit-gain"),
        ({"perf": PerfConfig(perf_sync_boundaries=True)}, "--perf-sync-boundaries"),
        ({"perf": PerfConfig(perf_device_time_mode="host")}, "--perf-device-time-mode host"),
    ],
)
def test_on_is_refused_where_it_cannot_be(change: dict, reason: str) -> None:
    config = dataclasses.replace(TrainConfig(runtime=RuntimeConfig(cuda_graph="on")), **change)
    with pytest.raises(UserError, match=f"--cuda-graph on cannot be had with .*{reason}"):
        config.validate()


def test_on_is_refused_on_a_device_that_turns_out_to_be_the_cpu() -> None:
    config = TrainConfig(runtime=RuntimeConfig(cuda_graph="on"))
    config.validate()
    with pytest.raises(UserError, match="--cuda-graph on needs a CUDA device"):
        wants_graph(config, CPU)


def test_auto_is_a_graph_on_cuda_unless_a_setting_excludes_it() -> None:
    cuda = Runtime(torch.device("cuda", 0), torch.bfloat16, compile=False)
    auto = TrainConfig()
    assert wants_graph(auto, cuda)
    assert not wants_graph(auto, CPU)
    assert not wants_graph(dataclasses.replace(auto, runtime=RuntimeConfig(cuda_graph="off")), cuda)
    assert not wants_graph(dataclasses.replace(auto, optimizer=OptimizerConfig(optimizer="muon")), cuda)
    assert not wants_graph(dataclasses.replace(auto, perf=PerfConfig(perf_sync_boundaries=True)), cuda)


def test_blocks_are_compiled_where_nothing_is_asked_and_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels("triton", "")
    monkeypatch.setattr("eco_llm.training.graph.serving_kernels", lambda *shape: kernels)
    cuda = Runtime(torch.device("cuda", 0), torch.bfloat16, compile=True)

    def compiled(**changes: Any) -> bool:
        config = dataclasses.replace(TrainConfig(), **changes)
        return compiles_blocks(config, config.model, cuda)

    assert not compiled()  # one CUDA graph of our kernels
    for mode, pays in (("recompute", False), ("compress", False), ("coupled", False), ("fixed-point", True)):
        assert compiled(instant=InstantConfig(instant_mode=mode)) is pays
    assert compiled(runtime=RuntimeConfig(cuda_graph="off"))
    assert compiled(optimizer=OptimizerConfig(optimizer="muon"))
    assert compiled(runtime=RuntimeConfig(torch_compile="on"))
    kernels = Kernels("reference", "no Triton")
    assert compiled()
    assert not compiles_blocks(TrainConfig(), TrainConfig().model, dataclasses.replace(cuda, compile=False))
    assert not compiles_blocks(TrainConfig(), TrainConfig().model, CPU)


def test_a_replay_costs_microseconds_of_bookkeeping() -> None:
    timer = PhaseTimer("cuda:0", make_mark=HostMark)
    timer.begin_step()
    with timer.capturing() as phases:
        for name in ("forward", "backward", "opt_step"):
            with timer.phase(name):  # type: ignore[arg-type]
                pass
    timer.mark_core_end()
    timer.end_step()
    best = float("inf")
    for _ in range(200):
        timer.begin_step()
        start = time.perf_counter()
        timer.replay(phases, lambda marks: None, lambda: None)
        best = min(best, time.perf_counter() - start)
        timer.mark_core_end()
        timer.end_step()
        timer.collect()
    assert best < 100e-6
