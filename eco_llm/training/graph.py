"""The captured step: forward, backward and update of all micro-batches as one CUDA graph, replayed every step.

At a few thousand tokens a step, launching some thousand kernels costs more than running them; a graph launches once.

- Inputs are copied into static buffers before the replay, on its stream. The source is pinned memory that the loader
  never writes again and that PyTorch reuses only after the copy (its host allocator keeps an event for each).
- Capture executes nothing. It is preceded by forward and backward on zeros, which compile and tune every kernel and
  leave only gradients, and those are dropped. The optimizer is not stepped: `make_capturable` has made its state.
- Gradients are made anew inside the graph, in its private memory; nothing clears them and no step finds any.
- Outputs are static too; the loop queues their copy to the host before the next replay.
- Phases: perf/phases.py. Only CUDA events see into a graph.
- While torch.profiler traces, steps run eagerly, because a replay has no named phases. They add their gradients to the
  graph's own (zeroed), so that addresses which the optimizer knows stay true.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from eco_llm.config import SigmaConfig, TrainConfig
from eco_llm.data.loader import Batch
from eco_llm.errors import UserError
from eco_llm.model.serving import serving_kernels
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.update import Update
from eco_llm.perf.event_nodes import EventNodes
from eco_llm.perf.phases import CapturedPhases, CudaMark, Mark, PhaseTimer
from eco_llm.runtime import Runtime, compiling_pays
from eco_llm.training.outcome import headline, is_out_of_memory
from eco_llm.training.step import StepOutput, TrainStep

WARM_UPS = 2  # the first compiles and tunes; the second is what capture will see


class CaptureError(Exception):
    """The step's work could not be captured in a CUDA graph; `__cause__` says why. Nothing was trained."""


def wants_graph(config: TrainConfig, runtime: Runtime) -> bool:
    """Whether `--cuda-graph` asks for a graph on this device, as far as the settings tell.

    Raises:
        UserError: `on` without a CUDA device, or without the kernels of an optimizer that can be captured. (Settings
            that exclude a graph are refused by `TrainConfig.validate`.)
    """
    mode = config.runtime.cuda_graph
    if mode == "on" and runtime.device.type != "cuda":
        raise UserError(f"--cuda-graph on needs a CUDA device, not {runtime.device}; use auto")
    if mode == "on" and not _optimizer_is_capturable(config, runtime):
        raise UserError(
            f"--cuda-graph on: --optimizer {config.optimizer.optimizer} cannot be captured here (C3O needs Triton);"
            " use auto"
        )
    return mode == "on" or (mode == "auto" and runtime.device.type == "cuda" and config.excludes_cuda_graph() is None)


def compiles_blocks(config: TrainConfig, shape: SigmaConfig, runtime: Runtime) -> bool:
    """Whether a training's blocks are compiled: as `--torch-compile` says, else where it makes the step faster.

    Args:
        shape: the model's, which need not be the one that `config` names.
    """
    asked = config.runtime.torch_compile != "auto"
    kernels = serving_kernels(shape, runtime.device, runtime.compute_dtype)
    if asked or runtime.device.type != "cuda" or kernels.name != "triton":
        return runtime.compile
    modes = config.instant.block_modes(shape.mixer_pattern)
    return runtime.compile and compiling_pays(modes, captured=wants_graph(config, runtime))


def _optimizer_is_capturable(config: TrainConfig, runtime: Runtime) -> bool:
    """Asked of an optimizer over one small matrix: an answer is wanted before there is a model or a run directory."""
    weight = torch.zeros(8, 8, device=runtime.device, requires_grad=True)
    group = {"params": [weight], "weight_decay": 0.0, "name": "matrix"}
    optimizer = build_optimizer([group], config.optimizer, config.c3o, runtime.device)
    return Update(optimizer, config.optimizer).capturable


class Graph(Protocol):
    """Work recorded once and replayed."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run the work where it will be captured."""

    def capture(self, work: Callable[[], StepOutput], phases: CapturedPhases) -> StepOutput:
        """Record what the work launches, without running it; its output holds values after each replay.

        `phases` fills while the work runs.
        """

    def replay(self, timer: PhaseTimer, phases: CapturedPhases) -> None:
        """Launch the recorded work on the current stream, timed."""

    def discard(self) -> None:
        """Give back what was recorded and its memory; no replay may follow."""

    def abandon(self) -> None:
        """After a failed capture: make the device and its random numbers usable again, or raise."""


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: autograd waits for the stream on which it first met a weight, and a capture must not."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """`Graph` by PyTorch, on a stream of its own: capture is not possible on the default one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)  # kept: nodes are named through it
        self._nodes: EventNodes | None = None

    def warm_up(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], StepOutput], phases: CapturedPhases) -> StepOutput:
        # The outer context restores the current stream even where ending the capture fails. "thread_local": the
        # loader's thread may pin memory meanwhile.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = work()
        self._graph.instantiate()
        graph, executable = self._graph.raw_cuda_graph(), self._graph.raw_cuda_graph_exec()
        self._nodes = EventNodes(graph, executable, _handles(phases.boundaries))
        return output

    def replay(self, timer: PhaseTimer, phases: CapturedPhases) -> None:
        nodes = self._nodes
        assert nodes is not None
        timer.replay(phases, lambda marks: nodes.bind(_handles(marks)), self._graph.replay)

    def discard(self) -> None:
        torch.cuda.synchronize(self._device)
        self._graph.reset()
        self._nodes = None
        torch.cuda.empty_cache()

    def abandon(self) -> None:
        # The object is kept by its owner: where ending the capture failed, the allocator still asks it whether a stream
        # is under capture, until the pool is closed here.
        with contextlib.suppress(RuntimeError):  # already closed
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        # Ending a capture also takes the default generator out of its "capturing" mode, in which torch <= 2.12 refuses
        # every draw outside a graph. Nothing takes it out after a failure; a copy of its state (seed and offset are
        # those from before the capture) was never in it.
        generator = torch.cuda.default_generators[self._device.index]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def _handles(marks: Sequence[Mark]) -> list[int]:
    return [cast(CudaMark, mark).handle for mark in marks]  # in events mode there are no others


class GraphedStep:
    """Replays optimizer steps. No host synchronisation happens here after `prepare`.

    Args:
        step: does the work that is captured.
        shape: (B, T) of every micro-batch.
        fall_back: told why, when capture fails and steps will run eagerly instead; None: that is an error.
        make_graph: tests give another.
    """

    def __init__(
        self,
        step: TrainStep,
        shape: tuple[int, int],
        *,
        fall_back: Callable[[Exception], None] | None,
        make_graph: Callable[[torch.device], Graph] = CudaGraph,
    ) -> None:
        self._step, self._fall_back, self._make_graph = step, fall_back, make_graph
        self._graph = make_graph(step.device)
        tokens = torch.zeros((step.grad_accum, 2, *shape), dtype=torch.int64, device=step.device)
        self._inputs = [Batch(both[0], both[1]) for both in tokens]
        self._phases = CapturedPhases()
        self._output: StepOutput | None = None
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._prepared = False

    def prepare(self) -> None:
        """Compile, tune, capture. The weights, the optimizer's state and the data's order are as before.

        Raises:
            CaptureError: capture failed, and nothing else would be allowed.
            torch.cuda.OutOfMemoryError: there is not enough memory for warm-up or capture.
        """
        if self._prepared:
            return
        self._prepared = True
        self._step.prepare(again=True)
        for _ in range(WARM_UPS):
            self._graph.warm_up(lambda: self._step.forward_and_backward(self._inputs[0]))
            self._drop_gradients()
        try:
            self._capture()
        except Exception as error:
            self._output = None
            self._drop_gradients()
            cause = _cause(error)
            broken: Exception | None = None
            try:
                self._graph.abandon()
            except Exception as failure:
                broken = failure
            if is_out_of_memory(cause):
                raise cause from None
            if self._fall_back is None:
                raise CaptureError(f"the step cannot be captured in a CUDA graph: {headline(cause)}") from cause
            if broken is not None:
                raise CaptureError(f"a failed capture left the device unusable: {headline(broken)}") from cause
            self._fall_back(cause)

    def run(self) -> StepOutput:
        """Fetch `grad_accum` batches, accumulate their gradients, update the weights."""
        timer = self._step.timer
        if self._output is None:
            return self._step.run()
        if timer.annotate:
            return self._run_eagerly()
        with timer.phase("data"):
            for place in self._inputs:
                batch = self._step.fetch()
                place.inputs.copy_(batch.inputs, non_blocking=True)
                place.targets.copy_(batch.targets, non_blocking=True)
        self._graph.replay(timer, self._phases)  # after which there is nothing to clear
        return self._output

    def review(self, step: int) -> list[str]:
        """Between steps; after a change the next `prepare` captures anew."""
        said: list[str] = []
        self._graph.warm_up(lambda: said.extend(self._step.review(step)))  # where it will be captured
        if said and self._output is not None:
            self._output = None
            self._gradients = []
            self._graph.discard()
            self._graph = self._make_graph(self._step.device)
            self._prepared = False
        return said

    def _capture(self) -> None:
        def work() -> StepOutput:
            batches = iter(self._inputs)
            return self._step.compute(lambda: next(batches))

        with self._step.timer.capturing() as self._phases:
            self._output = self._graph.capture(work, self._phases)
        self._gradients = [(p, p.grad) for p in self._step.parameters() if p.grad is not None]
        self._drop_gradients()

    def _run_eagerly(self) -> StepOutput:
        timer = self._step.timer
        with timer.phase("zero_grad"):
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            if self._gradients:  # released ones are none
                torch._foreach_zero_([gradient for _, gradient in self._gradients])

        def fetch() -> Batch:
            with timer.phase("data"):
                return self._step.fetch().to(self._step.device)

        output = self._step.compute(fetch)
        self._drop_gradients()
        return output

    def _drop_gradients(self) -> None:
        for parameter in self._step.parameters():
            parameter.grad = None


def _cause(error: Exception) -> Exception:
    """What broke a capture: ending it fails then too ("previous error during capture"), and hides what came first."""
    chain = [error]
    while isinstance(context := chain[-1].__context__, Exception):
        chain.append(context)
    for link in chain:
        if is_out_of_memory(link):
            return link
    return next((link for link in chain if "previous error during capture" not in str(link)), error)
