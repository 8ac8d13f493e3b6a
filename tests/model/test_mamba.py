"""The Mamba mixer against transformers' Mamba2Mixer with the same weights, and against itself with a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eco_llm.config import SigmaConfig
from eco_llm.model.mamba import Mamba

CONFIG = SigmaConfig(d_model=32, n_heads=4, rope_head_dim=4, mamba_head_dim=8, mamba_state_dim=16, vocab_size=300)


def make_mixer(config: SigmaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Mamba:
    torch.manual_seed(0)
    mixer = Mamba(config)
    with torch.no_grad():  # a fresh norm and D are all ones, which would hide a missing factor
        for parameter in (mixer.norm.weight, mixer.D):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.to(dtype)


def outputs_and_gradients(module: torch.nn.Module, u: Tensor) -> dict[str, Tensor]:
    u = u.clone().requires_grad_()
    y = module(u)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weights).sum().backward()
    assert u.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "du": u.grad, **grads}


@pytest.mark.parametrize("time", [1, 5, 63, 64, 150])
def test_equals_transformers_mamba2(time: int) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    ours = make_mixer()
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32, num_heads=8, head_dim=8, expand=2, state_size=16, n_groups=1, conv_kernel=4,
            chunk_size=16, use_conv_bias=True, use_bias=False, layer_norm_epsilon=CONFIG.norm_eps, num_hidden_layers=1,
        ),
        layer_idx=0,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())  # strict: the same names, shapes and order
    u = torch.randn(3, time, 32)
    actual, expected = outputs_and_gradients(ours, u), outputs_and_gradients(theirs, u)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-4, atol=2e-5 * want.abs().max().item(), msg=name)


@pytest.mark.parametrize("pieces", [[1] * 20, [1, 19], [7, 1, 12], [20], [2, 2, 16]], ids=str)
def test_cache_equals_whole_sequence(pieces: list[int]) -> None:
    """Any cut of the sequence, pieces shorter than the convolution included."""
    mixer = make_mixer(dtype=torch.float64)
    u = torch.randn(2, 20, 32, dtype=torch.float64)
    cache = mixer.init_cache(2, 20, u.device, u.dtype)
    with torch.no_grad():
        got = torch.cat([mixer.extend(piece, cache) for piece in u.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, mixer(u), rtol=1e-11, atol=1e-13)


def test_pinned_chunk_reaches_the_scan_and_changes_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    import eco_llm.model.mamba as module

    used: list[int] = []
    real = module.mamba_mixer

    def spy(*args: object, chunk_size: int, **kwargs: object) -> object:
        used.append(chunk_size)
        return real(*args, chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(module, "mamba_mixer", spy)
    u = torch.randn(1, 300, 32, dtype=torch.float64)
    mixer = make_mixer(dtype=torch.float64)
    results = []
    for pinned in ("auto", 128, 256):
        mixer.chunk = pinned
        results.append(mixer(u))
    assert used == [64, 128, 256]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-13)


def test_gradients_by_finite_differences() -> None:
    config = SigmaConfig(d_model=8, mamba_head_dim=4, mamba_state_dim=3, mamba_conv_width=3, attention_ratio=0)
    mixer = make_mixer(config, torch.float64)
    u = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def function(u: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (u,))

    assert torch.autograd.gradcheck(function, (u, *values), fast_mode=True)


def test_initial_steps_and_rates_lie_in_the_reference_ranges() -> None:
    mixer = Mamba(SigmaConfig(d_model=1024, mamba_head_dim=1))
    dt, rate = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
    for value, low, high in ((dt, 1e-3, 1e-1), (rate, 1.0, 16.0)):
        assert low * 0.999 <= value.min() < low * 1.1
        assert high * 0.9 < value.max() <= high * 1.001
    # Log-uniform: half of the steps lie below the geometric middle, 10⁻².
    assert 0.45 < (dt < 1e-2).float().mean() < 0.55
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))


def test_autocast_keeps_steps_in_float32() -> None:
    """softplus(dt + bias) in bf16 would move a step of 10⁻³ by up to 0.4%."""
    mixer = make_mixer()
    u = torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        _, xbc, dt = mixer._project(u)
        assert mixer(u).dtype == xbc.dtype == torch.bfloat16
    assert dt.dtype == torch.float32
