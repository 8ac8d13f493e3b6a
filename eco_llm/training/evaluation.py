"""Validation: mean loss in nats per token, and bits per byte of the text those tokens came from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eco_llm.config import validation_rows
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.runtime import Runtime


@dataclass(frozen=True)
class Validation:
    """Result of one pass over (part of) the validation split."""

    loss: float
    """Mean cross-entropy, nats per token."""
    bits_per_byte: float
    """loss / ln 2 / (UTF-8 bytes per token of the whole split): comparable between tokenizers."""
    tokens: int
    """Tokens predicted."""


@torch.no_grad()
def evaluate(
    model: SigmaLLM, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime, *, bytes_per_token: float
) -> Validation:
    """Score (inputs, targets) batches, int64 [B, T] each; targets of -100 are not counted.

    The model is in evaluation mode meanwhile, and afterwards in the mode it came in. Of a batch `validation_rows`
    sequences are scored at once.

    Raises:
        ValueError: there is no token to score.
    """
    was_training = model.training
    nats = torch.zeros((), dtype=torch.float64, device=runtime.device)
    tokens = torch.zeros((), dtype=torch.int64, device=runtime.device)
    model.eval()
    try:
        for inputs, targets in batches:
            inputs = inputs.to(runtime.device, non_blocking=True)
            targets = targets.to(runtime.device, non_blocking=True)
            rows = validation_rows(*inputs.shape)
            for some, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
                with runtime.autocast(keep_casts=False):  # half of float32 weights' bytes, and each is used once
                    part_nats, part_tokens = model.loss_sum(some, wanted)
                nats += part_nats
                tokens += part_tokens
    finally:
        model.train(was_training)
    count = int(tokens)
    if count == 0:
        raise ValueError("the validation batches hold no token to score")
    loss = float(nats) / count
    return Validation(loss, loss / math.log(2) / bytes_per_token, count)
