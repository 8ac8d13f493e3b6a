"""Training steps that comparisons share: same tokens for every side, whole-step capture, model FLOPs, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from common import seconds_of
from torch import Tensor, nn
from torch.optim import Optimizer

from eco_llm.config import C3OConfig, InstantConfig, OptimizerConfig, SigmaConfig
from eco_llm.data.loader import Batch, TokenLoader
from eco_llm.model.serving import serving_kernels
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.ops.backend import kernels_for
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.release import ReleasedUpdate
from eco_llm.optim.update import Update
from eco_llm.perf.phases import PhaseTimer, StepTimes
from eco_llm.runtime import Runtime, compiling_pays
from eco_llm.training.graph import GraphedStep
from eco_llm.training.step import TrainStep

# Dense bf16 tensor-core rates of data sheets, FLOP/s. Others are left out of the MFU and have TFLOP/s only.
DATA_SHEET = {"H200": 989.4e12, "H100": 989.4e12, "A100": 311.9e12, "RTX 4090": 165.2e12, "RTX 3090": 71.0e12}

Step = Callable[[], Tensor]


class Batches:
    """The same few batches of tokens for every side, in pinned host memory, in turn.

    Tokens follow a Zipf law over the vocabulary, so that a model can learn something in a few steps and a first loss
    is still that of an untrained one.
    """

    def __init__(self, vocab: int, batch: int, length: int, device: torch.device, count: int = 4) -> None:
        generator = torch.Generator().manual_seed(1234)
        law = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
        drawn = torch.multinomial(law, count * batch * (length + 1), replacement=True, generator=generator)
        tokens = drawn.view(count, batch, length + 1)
        pairs = [torch.stack((t[:, :-1], t[:, 1:])) for t in tokens]
        if device.type == "cuda":
            pairs = [pair.pin_memory() for pair in pairs]
        self._batches = [Batch(pair[0], pair[1]) for pair in pairs]
        self._device = device

    def __len__(self) -> int:
        """How many there are. Steps do not all take the same time, so a sample of a time takes a whole cycle: of a part
        of it there would be two groups of samples, and a median of two groups says little.
        """
        return len(self._batches)

    def cycle(self) -> Iterator[Batch]:
        """The batches for ever, on the host; every side takes an iterator of its own, from the start."""
        return itertools.cycle(self._batches)

    def to_device(self, source: Iterator[Batch]) -> Batch:
        """The next batch, copied without waiting."""
        return next(source).to(self._device)


class Text(Batches):
    """Batches of real text, one token a byte: the sources of the installed PyTorch, in a fixed order, in turn."""

    def __init__(self, batch: int, length: int, device: torch.device, count: int = 512) -> None:
        wanted, read = count * batch * (length + 1), bytearray()
        for path in sorted(Path(torch.__file__).parent.rglob("*.py")):
            if len(read) >= wanted:
                break
            read += path.read_bytes()
        count = min(count, len(read) // (batch * (length + 1)))
        if not count:
            raise ValueError(f"the installed PyTorch has too little text for one batch of {batch} × {length}")
        tokens = torch.frombuffer(read, dtype=torch.uint8)[: count * batch * (length + 1)].to(torch.int64)
        # Rows of a batch come from places far apart, as a shuffling loader's do.
        tokens = tokens.view(batch, count, length + 1).transpose(0, 1).contiguous()
        pairs = [torch.stack((t[:, :-1], t[:, 1:])) for t in tokens]
        if device.type == "cuda":
            pairs = [pair.pin_memory() for pair in pairs]
        self._batches = [Batch(pair[0], pair[1]) for pair in pairs]
        self._device = device


def captured(body: Callable[[Tensor, Tensor], Tensor], batches: Batches, prepare: Callable[[], None]) -> Step:
    """`body(inputs, targets)`, one whole training step without host reads, as one CUDA graph with static inputs.

    Args:
        body: returns the loss; gradients must be None before and after.
        prepare: called on the side stream before each warm-up call and before capture (say, to drop gradients).
    """
    source = batches.cycle()
    inputs, targets = batches.to_device(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            prepare()
            body(inputs, targets)
        prepare()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = body(inputs, targets)

    def step() -> Tensor:
        x, y = next(source)
        inputs.copy_(x, non_blocking=True)
        targets.copy_(y, non_blocking=True)
        graph.replay()
        return loss

    return step


def replayed(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph's replay, warmed up where it is captured: autograd keeps to a leaf's first stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        work()
    return graph.replay


class Ours:
    """A SigmaLLM and the step that `eco_train` runs: `TrainStep`, on CUDA as one graph (`GraphedStep`), phases timed.

    Args:
        source: endless batches on the host.
        compile_blocks: as `--torch-compile`; None: on CUDA as a run that says nothing, on a CPU compiled.
        graph: one CUDA graph a step; without CUDA it does nothing.
        seed: of the weights.
        instant: what is kept for backward; default: everything.
        bf16_weights: as `--weights-dtype bf16`.
        release: as `--gradient-release`.
        build: makes the optimizer, where it is not the product's.

    `times` has the phases of the steps so far, as far as they have arrived; `wait` makes all of them arrive.
    """

    def __init__(
        self,
        shape: SigmaConfig,
        source: Iterator[Batch],
        runtime: Runtime,
        *,
        compile_blocks: bool | None = None,
        graph: bool = True,
        settings: OptimizerConfig | None = None,
        c3o: C3OConfig | None = None,
        seed: int = 1337,
        instant: InstantConfig | None = None,
        bf16_weights: bool = False,
        release: bool = False,
        build: Callable[..., Optimizer] = build_optimizer,
    ) -> None:
        settings = settings or OptimizerConfig(lr=1e-4)
        runtime.setup(seed)
        with torch.device(runtime.device):
            weights = torch.bfloat16 if bf16_weights else torch.float32
            self.model = SigmaLLM(shape, instant, weights_dtype=weights)
        if compile_blocks is None:
            modes = (instant or InstantConfig()).block_modes(shape.mixer_pattern)
            triton = serving_kernels(shape, runtime.device, runtime.compute_dtype).name == "triton"
            compile_blocks = not triton or compiling_pays(modes, captured=graph)
        if compile_blocks:
            self.model.compile_blocks()
        groups = self.model.parameter_groups(settings.weight_decay)
        c3o = c3o or C3OConfig(
            c3o_trust_norm_refresh_drift=0.02 if runtime.device.type == "cuda" else 0.0
        )  # the profiles'
        rule = (settings, c3o, runtime.device)
        self.update: Update | ReleasedUpdate
        if release:
            self.update = ReleasedUpdate(groups, self.model.update_units(), *rule, guard=self.model.stack.guard)
        else:
            self.update = Update(build(groups, *rule), settings)
        self._timer = PhaseTimer(runtime.device)
        self.times: list[StepTimes] = []
        first = next(source)
        loader = cast(TokenLoader, itertools.chain([first], source))
        plain = TrainStep(self.model, self.update, loader, runtime, self._timer, 1)
        self._step: TrainStep | GraphedStep = plain
        self.how = "compiled blocks" if compile_blocks else "eager blocks"
        if graph and runtime.device.type == "cuda":
            shape_of_batch = (first.inputs.shape[0], first.inputs.shape[1])
            self._step = GraphedStep(plain, shape_of_batch, fall_back=None)
            self.how += ", whole-step CUDA graph"
        if instant is not None:
            self.how += f", INSTANT {instant.instant_mode}"
        self.how += f", {settings.optimizer}, {kernels_for(runtime.device).name} kernels"
        self._device = runtime.device
        self._number = 0

    def step(self) -> Tensor:
        """One optimizer step, as the trainer's loop takes it; the loss, on the device, overwritten by the next step."""
        self._number += 1
        timer = self._timer
        timer.begin_step(self._number)
        self._step.prepare()  # the first time: compiles, captures; trains nothing
        timer.mark_core_begin()
        output = self._step.run()
        timer.mark_core_end()
        timer.end_step()
        self.times += timer.collect()
        self.output = output
        return output.values[0]

    def wait(self) -> None:
        """Until the device is idle and the phases of every step are in `times`."""
        _wait(self._device)
        self.times += self._timer.flush()

    def review(self, step: int) -> list[str]:
        """What INSTANT decides between steps, as the trainer asks for it; the host waits for the device."""
        stack = self.model.stack
        stack.observe(dict(zip(self.output.names, self.output.values.tolist(), strict=True)))
        return self._step.review(step)


def gpt_flops_per_token(model: nn.Module, layers: int, width: int, length: int) -> int:
    """Training FLOPs a token of a plain decoder, by the same count as `SigmaLLM.flops_per_token`.

    6 · (weights of linear layers, the head among them) + 6 · layers · T · D: the causal half of q·k and p·v.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 6 * linear + 6 * layers * length * width


def equal_mlp_width(shape: SigmaConfig, parameters: int, multiple: int = 64) -> int:
    """The SwiGLU width, a multiple of `multiple`, at which a SigmaLLM of `shape` is nearest to `parameters`."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return SigmaLLM(dataclasses.replace(shape, mlp_hidden_dim=width)).num_parameters()

    low = count(multiple)
    slope = (count(2 * multiple) - low) / multiple  # the count is linear in the width
    return max(1, round((parameters - low) / slope / multiple) + 1) * multiple


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, what it is): the data sheet's dense bf16 rate, or a measured fp32 product on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, rate in DATA_SHEET.items():
            if known in name:
                return rate, f"data sheet, dense bf16, {known}"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured product of {size} × {size} matrices in {str(dtype).removeprefix('torch.')}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Give back what the last configuration held, and start its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measured_rates(device: torch.device) -> dict[str, float]:
    """What this card does today: matrix products in bf16 (8192³) and copies (1 GiB; read + written bytes), a second."""
    on_cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_cuda else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(2**28 if on_cuda else 2**24, device=device, dtype=torch.float32).fill_(1.0)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if on_cuda else None

    def product() -> object:
        return a @ a

    def copy() -> object:
        return target.copy_(source)

    best = {}
    for name, work in (("product", product), ("copy", copy)):
        timer = seconds_each(work, wait, 5)
        best[name] = min(timer() for _ in range(5))
    bytes_moved = 2 * source.numel() * source.element_size()
    return {"matmul_flops_per_s": 2 * size**3 / best["product"], "copy_bytes_per_s": bytes_moved / best["copy"]}


def seconds_each(
    work: Callable[[], object], synchronize: Callable[[], object] | None, count: int
) -> Callable[[], float]:
    """A measure for `common.interleave`: seconds a call of `work`, over `count` calls without a wait between."""

    def several() -> None:
        for _ in range(count):
            work()

    measure = seconds_of(several, synchronize)
    return lambda: measure() / count


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a peer prints is not ours to show."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
