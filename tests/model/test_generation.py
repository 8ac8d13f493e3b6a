"""Generation with caches against the full forward, and the sampler against its definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from eco_llm.config import SigmaConfig
from eco_llm.model.generation import generate, sample_token
from eco_llm.model.sigma_llm import SigmaLLM

CONFIG = SigmaConfig(
    d_model=32, n_layers=4, n_heads=2, mamba_ratio=1, mamba_head_dim=16, mamba_state_dim=8, kv_latent_dim=12,
    rope_head_dim=4, mlp_hidden_dim=48, vocab_size=300, mamba_chunk=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SigmaLLM:
    """Float64, with weights large enough that the next token depends on the whole past."""
    torch.manual_seed(0)
    model = SigmaLLM(dataclasses.replace(CONFIG, q_latent_dim=10)).double()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5.0)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prompt", [1, 2, 63, 64])
def test_cached_logits_equal_full_forward_at_every_position(model: SigmaLLM, prompt: int) -> None:
    ids = tokens(2, 75)
    with torch.no_grad():
        full = model(ids)
    cache = model.init_cache(2, 75)
    logits = [model.prefill(ids[:, :prompt], cache)]
    logits += [model.step(ids[:, t], cache) for t in range(prompt, 75)]
    torch.testing.assert_close(torch.stack(logits, 1), full[:, prompt - 1 :], rtol=1e-8, atol=1e-8)


def test_prefill_in_pieces(model: SigmaLLM) -> None:
    ids = tokens(2, 75)
    cache = model.init_cache(2, 75)
    for piece in ids.split([10, 1, 40, 24], dim=1):
        logits = model.prefill(piece, cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids)[:, -1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prompt", [1, 63])
def test_greedy_generation_equals_repeated_full_forward(model: SigmaLLM, prompt: int) -> None:
    expected = ids = tokens(3, prompt)
    for _ in range(8):
        with torch.no_grad():
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(model, ids, 8, temperature=0.0), expected)
    assert expected[:, prompt:].unique().numel() > 3  # a model that always says the same would prove little


@pytest.mark.parametrize("temperature", [1e-38, 1e-4])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 5
    for top_k, top_p in ((0, 1.0), (3, 0.9)):
        assert torch.equal(sample_token(logits, temperature, top_k, top_p, None), logits.argmax(-1))


def test_autocast_generation_is_close() -> None:
    torch.manual_seed(0)
    model = SigmaLLM(CONFIG)
    ids = tokens(2, 20)
    with torch.no_grad():
        full = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.init_cache(2, 20)
        model.prefill(ids[:, :15], cache)
        for t in range(15, 20):
            logits = model.step(ids[:, t], cache)
    assert (logits.float() - full[:, -1]).norm() < 0.03 * full[:, -1].norm()


def test_generation_is_reproducible_and_random(model: SigmaLLM) -> None:
    ids = tokens(2, 5)

    def sample(seed: int) -> Tensor:
        return generate(model, ids, 10, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    assert sample(1).shape == (2, 15)
    assert torch.equal(sample(1)[:, :5], ids)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_stop_token_ends_and_fills_rows(model: SigmaLLM) -> None:
    ids = tokens(3, 4)
    free = generate(model, ids, 12, temperature=0.0)
    stop = int(free[0, 6])  # row 0 says it as its third new token
    got = generate(model, ids, 12, temperature=0.0, stop_token=stop)
    for row, want in zip(got.tolist(), free.tolist(), strict=True):
        new = want[4:]
        length = new.index(stop) + 1 if stop in new else 12
        kept = len(row) - 4
        assert row[: 4 + length] == want[: 4 + length]
        assert row[4 + length :] == [stop] * max(kept - length, 0)
    alone = generate(model, ids[:1], 12, temperature=0.0, stop_token=stop)
    assert alone.shape[1] == 4 + free[0, 4:].tolist().index(stop) + 1  # shorter once all have stopped


def test_no_new_tokens_and_bad_arguments(model: SigmaLLM) -> None:
    ids = tokens(1, 3)
    assert torch.equal(generate(model, ids, 0), ids)
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="need max_new_tokens"):
            generate(model, ids, 1, **bad)
    with pytest.raises(ValueError, match="input_ids"):
        generate(model, ids[:, :0], 1)


def frequencies(**options: float) -> Tensor:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    drawn = sample_token(
        probabilities.log().expand(20_000, 4),
        generator=torch.Generator().manual_seed(0),
        **settings,
    )
    return torch.bincount(drawn, minlength=4) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.0, 2 / 3, 0.0, 1 / 3]),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 9}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 0.6}, [0.0, 2 / 3, 0.0, 1 / 3]),  # 0.5 is not enough, 0.75 is
        ({"top_p": 0.01}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.8}, [0.0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),
        ({"top_k": 3, "top_p": 0.6}, [0.0, 2 / 3, 0.0, 1 / 3]),
    ],
    ids=str,
)
def test_sampler_follows_its_distribution(options: dict[str, float], expected: list[float]) -> None:
    got = frequencies(**options)
    assert torch.equal(got == 0, torch.tensor(expected) == 0)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0.0, atol=0.012)
