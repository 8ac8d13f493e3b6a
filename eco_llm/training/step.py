"""The seam between the loop and the model: one optimizer step, accumulation and phases included.

`TrainStep` launches a step's work piece by piece; `graph.GraphedStep` replays it as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from eco_llm.data.loader import Batch, TokenLoader
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.release import ReleasedUpdate
from eco_llm.optim.update import Update
from eco_llm.perf.phases import PhaseTimer
from eco_llm.runtime import Runtime


@dataclass(frozen=True)
class StepOutput:
    """What one step computed, still on the device; reading it is the caller's affair, later."""

    names: tuple[str, ...]
    """`loss` (mean over the step's micro-batches, nats per token), `grad_norm` (global, before clipping), `applied`
    (0 when loss or gradient was not finite and nothing was changed), then the optimizer's metrics."""
    values: Tensor
    """fp32 [names], one vector, so that a step's values leave the device in one copy. Queue that copy before the next
    step: it may overwrite them."""


class Step(Protocol):
    """One optimizer step, as the loop sees it."""

    def prepare(self) -> None:
        """What must happen once before the first step, after any state was restored; later calls do nothing."""

    def run(self) -> StepOutput:
        """Fetch `grad_accum` batches, accumulate their gradients, update the weights, clear the gradients."""

    def review(self, step: int) -> list[str]:
        """Let INSTANT decide anew after this finished step, whose values it was shown; what changed, for people."""


class TrainStep:
    """Runs optimizer steps on one device. No host synchronisation happens here."""

    def __init__(
        self,
        model: SigmaLLM,
        update: Update | ReleasedUpdate,
        loader: TokenLoader,
        runtime: Runtime,
        timer: PhaseTimer,
        grad_accum: int,
        at: Callable[[str], object] = lambda point: None,
    ) -> None:
        self.model, self.update, self.timer, self.grad_accum = model, update, timer, grad_accum
        self.device = runtime.device
        self._loader, self._runtime, self._at = loader, runtime, at
        self._prepared = False
        self._last: Batch | None = None
        model.stack.prepare(runtime.device)

    def prepare(self, *, again: bool = False) -> None:
        """Bring the optimizer into the form that a graph needs, also where none is used: same kernels, same losses.

        Called again before each capture: a capture uses up memory that the optimizer then makes anew.
        """
        if (again or not self._prepared) and self.device.type == "cuda" and self.update.capturable:
            self.update.make_capturable()
        self._prepared = True

    def run(self) -> StepOutput:
        """Fetch `grad_accum` batches, accumulate their gradients, update the weights, clear the gradients."""
        output = self.compute(self._fetch_to_device)
        with self.timer.phase("zero_grad"):
            self.update.zero_grad()
        return output

    def compute(self, fetch: Callable[[], Batch]) -> StepOutput:
        """Everything between the data and the cleared gradients; `fetch` is called once for each micro-batch."""
        timer, stack = self.timer, self.model.stack
        self._at("begin")
        stack.begin_step()
        total: Tensor | None = None
        for _ in range(self.grad_accum):
            batch = self._last = fetch()
            with timer.phase("forward"):
                loss = self._loss(batch)
            self._at("forward")
            with timer.phase("backward"):
                self.update.backward(loss)
            self._at("backward")
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        with timer.phase("opt_step"):
            result = self.update.step(stack.guard(total))
            names, metrics = self.update.metrics_tensor()
            verdicts, verdict_values = stack.metrics_tensor()
            values = torch.stack([total.float(), result.grad_norm.float(), result.applied.float()])
            if names or verdicts:
                values = torch.cat([values, *(part.float() for part in (metrics, verdict_values) if part is not None)])
        self._at("opt_step")
        return StepOutput(("loss", "grad_norm", "applied", *names, *verdicts), values)

    def review(self, step: int) -> list[str]:
        """Between steps; probes with the last batch."""
        if self._last is None:
            return []
        with self._runtime.autocast():
            return self.model.review_memory(step, self._last.inputs)

    def forward_and_backward(self, batch: Batch) -> None:
        """Leave gradients (with --gradient-release none), change nothing else."""
        with self.model.stack.rehearsal():
            self.update.rehearse(self._loss(batch))

    def fetch(self) -> Batch:
        """The next micro-batch, on the host."""
        return next(self._loader)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in a fixed order."""
        return list(self.model.parameters())

    def _loss(self, batch: Batch) -> Tensor:
        with self._runtime.autocast():
            # Micro-batches have equal token counts, so the mean of means is the mean.
            return self.model.loss(batch.inputs, batch.targets) / self.grad_accum

    def _fetch_to_device(self) -> Batch:
        with self.timer.phase("data"):
            return self.fetch().to(self.device)
