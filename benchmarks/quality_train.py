"""One process of the quality study: a model compiled once, trained again and again by the product's own loop.

Every run starts from `reset_parameters` in place under its seed, takes a new optimizer and a new capture of the step,
and goes through `SigmaTrainer` with the product's loader, schedule, guard and validation; only checkpoints are not
written. A model stays for the next run of its kind (`Spec.variant`), so nothing is compiled twice.

Where the optimizer cannot be captured (Muon; C3O's block credit), forward and backward are one graph and the update is
launched after it (`BackwardGraph`); the product runs such steps without any graph, by the same computation.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, cast

import torch
from quality_plan import UNSAID, Spec
from steps import clean
from torch import Tensor

from eco_llm.config import TrainConfig
from eco_llm.data.loader import Batch, TokenLoader, evaluation_batches
from eco_llm.data.shards import PreparedData
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.update import Update
from eco_llm.perf.phases import CapturedPhases, PhaseTimer
from eco_llm.runtime import Runtime, torch_dtype
from eco_llm.training.evaluation import Validation, evaluate
from eco_llm.training.graph import WARM_UPS, CudaGraph, Graph, GraphedStep
from eco_llm.training.hooks.base import Hook
from eco_llm.training.outcome import NonFiniteLoss, Outcome, headline, is_out_of_memory
from eco_llm.training.sigma_trainer import SigmaTrainer
from eco_llm.training.step import Step, StepOutput, TrainStep

CURVE_POINTS = 60
PATIENCE = 50
"""Steps over which a mean loss above that of a uniform guess, plus `SLACK` nats, ends a run as diverged."""
SLACK = 1.0


class DivergedError(Exception):
    """The run has left the range in which it could still learn."""


class StoppedError(Exception):
    """A signal asked the process to end; the run in flight is no result."""


class StudyTrainer(SigmaTrainer):
    """The product's loop without checkpoints: a run of the study is repeated, not resumed."""

    def _save(self) -> None:
        self._saved_step = self.step


class Curve(Hook):
    """Keeps what the record of a run needs.

    Raises:
        DivergedError: from `on_record`, see `PATIENCE`.
    """

    def __init__(self, steps: int, limit: float) -> None:
        self._every = -(-steps // CURVE_POINTS)
        self._limit = limit
        self._window: list[float] = []
        self.losses: list[float] = []
        self.points: list[tuple[int, float]] = []
        """(last step, mean loss) of windows of equal length."""
        self.rates: list[float] = []
        self.messages: list[str] = []
        self.last: dict[str, Any] = {}
        self.ready_at: float | None = None
        """Host clock when everything was compiled and captured."""

    def on_step(self, step: int) -> None:
        """The loop calls it after the first step's preparations."""
        if self.ready_at is None:
            self.ready_at = time.perf_counter()

    def on_record(self, record: dict[str, Any]) -> None:
        """Take in one step."""
        self.last = record
        self.losses.append(record["loss"])
        self._window.append(record["loss"])
        if record.get("core_tokens_per_s"):
            self.rates.append(record["core_tokens_per_s"])
        if len(self._window) == self._every:
            self.points.append((record["step"], statistics.fmean(self._window)))
            self._window.clear()
        recent = self.losses[-PATIENCE:]
        if len(recent) == PATIENCE and not statistics.fmean(recent) <= self._limit:  # NaN too
            raise DivergedError(f"step {record['step']}: a mean loss of {statistics.fmean(recent):.3g}")

    def on_message(self, text: str) -> None:
        """Keep what the trainer says."""
        self.messages.append(text)


class BackwardGraph:
    """A step whose forward and backward are one CUDA graph and whose update is launched after it.

    Gradients live in the graph's memory; each replay makes them anew, so nothing clears them.

    Args:
        inner: brings the model, the data, the update and the timer.
        shape: (B, T) of every batch.
        make_graph: tests give another.
    """

    def __init__(
        self,
        inner: TrainStep,
        runtime: Runtime,
        shape: tuple[int, int],
        make_graph: Callable[[torch.device], Graph] = CudaGraph,
    ) -> None:
        self._inner, self._runtime = inner, runtime
        self._graph = make_graph(runtime.device)
        both = torch.zeros((2, *shape), dtype=torch.int64, device=runtime.device)
        self._inputs = Batch(both[0], both[1])
        self._phases = CapturedPhases()
        self._loss: Tensor | None = None

    def prepare(self) -> None:
        """Compile, tune, capture."""
        if self._loss is not None:
            return
        inner, found = self._inner, []
        for _ in range(WARM_UPS):
            self._graph.warm_up(lambda: inner.forward_and_backward(self._inputs))
            for parameter in inner.parameters():
                parameter.grad = None

        def work() -> StepOutput:
            inner.model.stack.begin_step()
            with inner.timer.phase("forward"), self._runtime.autocast():
                loss = inner.model.loss(*self._inputs)
            with inner.timer.phase("backward"):
                inner.update.backward(loss)
            found.append(loss.detach())
            return StepOutput((), loss.detach())

        try:
            with inner.timer.capturing() as self._phases:
                self._graph.capture(work, self._phases)
        except Exception:
            self._graph.abandon()
            raise
        self._loss = found[0]

    def run(self) -> StepOutput:
        """One step."""
        inner, loss = self._inner, self._loss
        assert loss is not None
        with inner.timer.phase("data"):
            batch = inner.fetch()
            self._inputs.inputs.copy_(batch.inputs, non_blocking=True)
            self._inputs.targets.copy_(batch.targets, non_blocking=True)
        self._graph.replay(inner.timer, self._phases)
        with inner.timer.phase("opt_step"):
            result = inner.update.step(inner.model.stack.guard(loss))
            names, metrics = inner.update.metrics_tensor()
            values = torch.stack([loss.float(), result.grad_norm.float(), result.applied.float()])
            if names:
                values = torch.cat([values, metrics.float()])
        return StepOutput(("loss", "grad_norm", "applied", *names), values)

    def review(self, step: int) -> list[str]:
        """Nothing is decided between such steps: INSTANT is off in them."""
        return []


class Trainer:
    """Trains runs on one device.

    Args:
        config: what all runs share.
        runtime: where they run.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self._models: dict[tuple[Any, ...], tuple[SigmaLLM, dict[str, Any]]] = {}
        self._held_out: list[Batch] = []
        if runtime.compile:
            import torch._dynamo

            # Each kept model adds its own graphs of the same code; past the default limit of 8 dynamo would go on
            # without compiling, in silence.
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.accumulated_recompile_limit = 4096
            torch._dynamo.config.fail_on_recompile_limit_hit = True

    def has(self, spec: Spec) -> bool:
        """Whether the run needs no compilation."""
        return spec.variant in self._models

    def settings(self, spec: Spec) -> TrainConfig:
        """The run as eco_train would be told."""
        config, t = self.config, self.config.training
        return dataclasses.replace(
            config,
            training=dataclasses.replace(t, steps=spec.steps, seed=spec.seed, eval_interval=spec.steps),
            optimizer=dataclasses.replace(
                config.optimizer, optimizer=cast(Any, spec.optimizer), lr=spec.lr, weight_decay=spec.weight_decay
            ),
            c3o=dataclasses.replace(config.c3o, **{**UNSAID, **dict(spec.c3o)}),
            instant=dataclasses.replace(config.instant, **dict(spec.instant)),
            runtime=dataclasses.replace(config.runtime, weights_dtype=cast(Any, spec.weights)),
        )

    def model(self, spec: Spec) -> SigmaLLM:
        """The compiled model of the run's kind, its weights those of the run's seed, its stack as new."""
        config = self.settings(spec)
        if spec.variant not in self._models:
            self.runtime.setup(spec.seed)
            with torch.device(self.runtime.device):
                model = SigmaLLM(config.model, config.instant, weights_dtype=torch_dtype(config.runtime.weights_dtype))
            model.stack.prepare(self.runtime.device)
            if self.runtime.compile:
                model.compile_blocks()
            self._models[spec.variant] = (model, model.stack.state_dict())
        model, fresh = self._models[spec.variant]
        self.runtime.setup(spec.seed)
        model.train()
        model.reset_parameters()
        model.stack.load_state_dict(copy.deepcopy(fresh))
        return model

    def warm_up(self, spec: Spec) -> None:
        """Compile what the run needs, on CUDA, before there is data: forward, backward and validation of zeros."""
        if self.runtime.device.type != "cuda":
            return
        model = self.model(spec)
        zeros = torch.zeros(self._shape, dtype=torch.int64, device=self.runtime.device)

        def work() -> None:
            with model.stack.rehearsal(), self.runtime.autocast():
                model.loss(zeros, zeros).backward()

        CudaGraph(self.runtime.device).warm_up(work)  # on the stream where steps will be captured
        model.zero_grad(set_to_none=True)
        evaluate(model, [(zeros, zeros)], self.runtime, bytes_per_token=1.0)
        clean(self.runtime.device)

    def run(self, spec: Spec, data: PreparedData) -> dict[str, Any]:
        """Train to the end of the decay; the run's record, however it ended.

        Raises:
            StoppedError: a signal came; there is no result.
        """
        started = time.perf_counter()
        graphs = _compiled_graphs()
        config = self.settings(spec)
        config.validate()
        curve = Curve(spec.steps, math.log(config.model.vocab_size) + SLACK)
        record: dict[str, Any] = {"status": "done", "why": None}
        try:
            record |= self._train(spec, config, data, curve)
        except StoppedError:
            raise
        except (NonFiniteLoss, DivergedError) as error:
            record |= {"status": "diverged", "why": headline(error)}
        except Exception as error:
            status = "oom" if is_out_of_memory(error) else "crashed"
            record |= {"status": status, "why": headline(error)}
        peak = torch.cuda.max_memory_allocated(self.runtime.device) if self.runtime.device.type == "cuda" else None
        self._forget(spec)
        uniform = math.log(config.model.vocab_size)
        if record["status"] == "done" and not record["final_loss"] < uniform:  # NaN too
            record |= {
                "status": "diverged",
                "why": f"held-out loss {record['final_loss']:.4g}, a guess has {uniform:.4g}",
            }
        wall = time.perf_counter() - started
        tail = curve.losses[-max(1, spec.steps // 50) :]
        per_step = config.training.tokens_per_step
        return record | {
            "steps": spec.steps,
            "tokens": spec.steps * per_step,
            "epochs": spec.steps * per_step / data.manifest.splits["train"].tokens,
            "train_loss_tail": statistics.fmean(tail) if tail else None,
            "curve": curve.points,
            "skipped_steps": curve.last.get("skipped_steps"),
            "gate_trips": curve.last.get("instant_gate_trips"),
            "messages": curve.messages[:50],
            "tokens_per_s": statistics.median(curve.rates) if curve.rates else None,
            "setup_s": None if curve.ready_at is None else curve.ready_at - started,
            "wall_s": wall,
            "peak_gib": None if peak is None else peak / 2**30,
            "graphs_compiled": _compiled_graphs() - graphs,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    # -- parts ---------------------------------------------------------------------------------------------

    @property
    def _shape(self) -> tuple[int, int]:
        return self.config.training.batch_size, self.config.training.seq_len

    def _train(self, spec: Spec, config: TrainConfig, data: PreparedData, curve: Curve) -> dict[str, Any]:
        """The numbers that only a run to the end has."""
        runtime, on_cuda = self.runtime, self.runtime.device.type == "cuda"
        model = self.model(spec)
        groups = model.parameter_groups(config.optimizer.weight_decay)
        update = Update(build_optimizer(groups, config.optimizer, config.c3o, runtime.device), config.optimizer)
        loader = TokenLoader(
            data, "train", batch_size=self._shape[0], seq_len=self._shape[1], seed=spec.seed, pin_memory=on_cuda
        )
        timer = PhaseTimer(runtime.device)
        plain = TrainStep(model, update, loader, runtime, timer, 1)
        step: Step = plain
        how = ["compiled" if runtime.compile else "eager"]
        if on_cuda and config.runtime.cuda_graph != "off" and update.capturable:
            step = GraphedStep(plain, self._shape, fall_back=lambda why: how.append(f"no graph: {headline(why)}"))
            how.append("one CUDA graph a step")
        elif on_cuda and config.runtime.cuda_graph != "off" and not spec.instant:
            step = BackwardGraph(plain, runtime, self._shape)
            how.append("a CUDA graph of forward and backward")
        found: list[Validation] = []

        def validate() -> Validation:
            per_token = data.manifest.splits["val"].bytes_per_token
            found.append(evaluate(model, self._batches(data), runtime, bytes_per_token=per_token))
            return found[-1]

        trainer = StudyTrainer(
            training=config.training, optimizer=config.optimizer, runtime=runtime, model=model, update=update,
            loader=loader, timer=timer, step=step, validate=validate, checkpoints=cast(Any, None), hooks=[curve],
        )  # fmt: skip
        with loader:
            outcome = trainer.fit()
        if outcome is not Outcome.DONE:
            raise StoppedError
        return {
            "final_loss": found[-1].loss,
            "bits_per_byte": found[-1].bits_per_byte,
            "held_out_tokens": found[-1].tokens,
            "how": ", ".join(how),
        }

    def _batches(self, data: PreparedData) -> Iterator[Batch]:
        """The held-out batches, on the device from the first use on."""
        if not self._held_out:
            t = self.config.training
            host = evaluation_batches(
                data.tokens("val"), batch_size=t.batch_size, seq_len=t.seq_len, max_batches=t.eval_batches
            )
            self._held_out = [batch.to(self.runtime.device) for batch in host]
        return iter(self._held_out)

    def _forget(self, spec: Spec) -> None:
        """Give back everything of the run but its model."""
        if spec.variant in self._models:
            self._models[spec.variant][0].zero_grad(set_to_none=True)
        clean(self.runtime.device)


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
