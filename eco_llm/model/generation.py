"""Sampling text: prefill the prompt through the chunked path, then one-token steps with caches."""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.model.sigma_llm import SigmaLLM


def sample_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token [B] from each row of logits [B, V].

    Temperature 0 takes the likeliest. Otherwise logits are divided by it, then cut to the `top_k` likeliest (0: off)
    and to the smallest set of likeliest tokens whose probabilities reach `top_p` (1: off; arXiv 1904.09751).
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    ranked, order = logits.float().sort(dim=-1, descending=True)
    ranked = (ranked - ranked[:, :1]) / temperature  # the largest is 0: no temperature makes it infinite
    if top_k > 0:
        ranked[:, top_k:] = -torch.inf
    probabilities = ranked.softmax(dim=-1)
    # A token stays if those before it have not reached top_p yet; so the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0) if top_p < 1.0 else probabilities
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, choice)[:, 0]


@torch.no_grad()
def generate(
    model: SigmaLLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Continue prompts of equal length.

    Args:
        input_ids: [B, T] int64, T ≥ 1.
        max_new_tokens: most tokens to add.
        temperature: ≥ 0; 0 is greedy.
        top_k: ≥ 0; 0 is off.
        top_p: in (0, 1]; 1 is off.
        generator: source of randomness, on the device of the model; None is torch's default.
        stop_token: ends a sequence; it is kept, and repeated after it to fill the row. Asking whether all
            sequences have ended waits for the device once a token.

    Returns:
        [B, T + n] int64, prompt included; n ≤ max_new_tokens, less only if every sequence stopped.

    Raises:
        ValueError: an argument outside its range.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"need input_ids [B, T ≥ 1], got {tuple(input_ids.shape)}")
    if max_new_tokens < 0 or not temperature >= 0.0 or top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ValueError(
            "need max_new_tokens ≥ 0, temperature ≥ 0, top_k ≥ 0, 0 < top_p ≤ 1; got"
            f" {max_new_tokens}, {temperature}, {top_k}, {top_p}"
        )
    if max_new_tokens == 0:
        return input_ids
    batch, prompt = input_ids.shape
    cache = model.init_cache(batch, prompt + max_new_tokens)
    stopped = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    tokens = [input_ids]
    logits = model.prefill(input_ids, cache)
    while True:
        token = sample_token(logits, temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped = stopped | (token == stop_token)
        tokens.append(token[:, None])
        if len(tokens) > max_new_tokens or (stop_token is not None and bool(stopped.all())):
            return torch.cat(tokens, dim=1)
        logits = model.step(token, cache)
