"""The seam between the loop and the model: one optimizer step, accumulation and phases included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eco_llm.data.loader import TokenLoader
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.update import Update
from eco_llm.perf.phases import PhaseTimer
from eco_llm.runtime import Runtime


@dataclass(frozen=True)
class StepOutput:
    """Device values of one step; reading them is the caller's affair, later."""

    loss: Tensor
    """Mean loss over the step's micro-batches, nats per token, 0-dim fp32."""
    grad_norm: Tensor
    """Global gradient norm before clipping, 0-dim fp32."""
    applied: Tensor
    """0-dim bool: False when loss or gradient was not finite, and nothing was changed."""


class TrainStep:
    """Runs optimizer steps on one device. No host synchronisation happens here."""

    def __init__(
        self,
        model: SigmaLLM,
        update: Update,
        loader: TokenLoader,
        runtime: Runtime,
        timer: PhaseTimer,
        grad_accum: int,
    ) -> None:
        self._model, self._update, self._loader = model, update, loader
        self._runtime, self._timer, self._grad_accum = runtime, timer, grad_accum

    def run(self) -> StepOutput:
        """Fetch `grad_accum` batches, accumulate their gradients, update the weights, clear the gradients."""
        timer = self._timer
        total: Tensor | None = None
        for _ in range(self._grad_accum):
            with timer.phase("data"):
                inputs, targets = next(self._loader).to(self._runtime.device)
            with timer.phase("forward"), self._runtime.autocast():
                # Micro-batches have equal token counts, so the mean of means is the mean.
                loss = self._model.loss(inputs, targets) / self._grad_accum
            with timer.phase("backward"):
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        with timer.phase("opt_step"):
            result = self._update.step(total)
        with timer.phase("zero_grad"):
            self._update.zero_grad()
        return StepOutput(total, result.grad_norm, result.applied)


def flat_scalars(output: StepOutput, extra: Tensor) -> Tensor:
    """One fp32 vector (loss, grad_norm, applied, extra…), so that a step's values leave the device in one copy."""
    values = torch.stack([output.loss.float(), output.grad_norm.float(), output.applied.float()])
    return torch.cat([values, extra.float()]) if extra.numel() else values
