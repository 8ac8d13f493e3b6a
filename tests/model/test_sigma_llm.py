"""The whole model: loss, causality, initialisation, parameters, counts, state dict, learning."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eco_llm.config import SigmaConfig
from eco_llm.errors import UserError
from eco_llm.model.mamba import Mamba
from eco_llm.model.mla import MLA
from eco_llm.model.sigma_llm import SigmaLLM

TINY = SigmaConfig(
    d_model=32, n_layers=3, n_heads=2, mamba_ratio=2, mamba_head_dim=16, mamba_state_dim=8, kv_latent_dim=12,
    rope_head_dim=4, mlp_hidden_dim=48, vocab_size=300, loss_chunk_tokens=16,
)  # fmt: skip
SMALLEST = dataclasses.replace(
    TINY, d_model=8, n_layers=2, mamba_ratio=1, mamba_head_dim=4, mamba_state_dim=3, kv_latent_dim=3, rope_head_dim=2,
    mlp_hidden_dim=6, vocab_size=257, loss_chunk_tokens=4,
)  # fmt: skip


def make_model(config: SigmaConfig = TINY, dtype: torch.dtype = torch.float32, **changes: object) -> SigmaLLM:
    torch.manual_seed(0)
    return SigmaLLM(dataclasses.replace(config, **changes)).to(dtype)


def tokens(*shape: int, vocab: int = 300) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(3))


def test_pattern_of_mixers() -> None:
    model = make_model(n_layers=7)
    kinds = [type(block.mixer) for block in model.blocks]
    assert kinds == [Mamba, Mamba, MLA, Mamba, Mamba, MLA, Mamba]
    assert {type(b.mixer) for b in make_model(attention_ratio=0).blocks} == {Mamba}
    assert {type(b.mixer) for b in make_model(mamba_ratio=0).blocks} == {MLA}


def test_a_shape_that_cannot_be_built_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="--n-heads"):
        make_model(n_heads=5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("time", [1, 7, 33])
def test_loss_is_cross_entropy_of_the_logits(time: int, tied: bool) -> None:
    """Value and every gradient; 2·33 tokens are not a multiple of the 16 of a loss chunk."""
    model = make_model(dtype=torch.float64, tie_embeddings=tied)
    ids, targets = tokens(2, time), tokens(2, time + 1)[:, 1:].clone()
    targets[0, time // 2 :] = -100
    logits = model(ids)
    assert logits.shape == (2, time, 300)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss = model.loss(ids, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    parameters = dict(model.named_parameters())
    for name, got, want in zip(
        parameters,
        torch.autograd.grad(loss, list(parameters.values())),
        torch.autograd.grad(expected, list(parameters.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)
    total, count = model.loss_sum(ids, targets)
    assert count == (targets != -100).sum()
    torch.testing.assert_close(total / count, loss, rtol=1e-12, atol=0.0)


def test_loss_gradients_by_finite_differences() -> None:
    model = make_model(SMALLEST, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that every path carries gradient
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids, targets = tokens(1, 5, vocab=257), tokens(1, 6, vocab=257)[:, 1:]
    names, values = zip(*model.named_parameters(), strict=True)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.loss(ids, targets)

    wrapper = Loss()

    def function(*values: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(wrapper, named, ())

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("changed", [1, 40, 69])
def test_a_future_token_never_changes_the_past(changed: int) -> None:
    model = make_model(mamba_chunk=64)
    ids = tokens(1, 70)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 300
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("cut", [1, 40, 69])
def test_the_past_has_no_gradient_from_the_future(cut: int) -> None:
    model = make_model(mamba_chunk=64)
    captured: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, output: captured.append(output))
    hidden = model.hidden(tokens(1, 70))
    (grad,) = torch.autograd.grad(hidden[:, :cut].pow(2).sum(), captured)
    assert torch.equal(grad[:, cut:], torch.zeros_like(grad[:, cut:]))
    assert (grad[:, :cut].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 6])
def test_initial_loss_is_that_of_a_uniform_guess(layers: int, tied: bool) -> None:
    model = make_model(d_model=128, n_layers=layers, tie_embeddings=tied, mlp_hidden_dim=0)
    with torch.no_grad():
        loss = model.loss(tokens(8, 64), tokens(8, 65)[:, 1:])
    assert abs(loss.item() - math.log(300)) < 0.2


def test_initialisation() -> None:
    model = make_model(d_model=256, n_layers=8, kv_latent_dim=128)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            into_residual = name.endswith((".out_proj.weight", ".mlp.down.weight"))
            want = 0.02 / math.sqrt(16) if into_residual else 0.02
            assert abs(parameter.std().item() / want - 1) < 0.03, name
    again, other = make_model(), SigmaLLM(TINY)
    for name, value in make_model().state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(again.embedding.weight, other.embedding.weight)


def test_reset_parameters_reaches_every_parameter() -> None:
    model = make_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(0)
    model.reset_parameters()
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert value.shape == expected[name].shape


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups_hold_every_parameter_once(tied: bool) -> None:
    model = make_model(tie_embeddings=tied, q_latent_dim=10)
    groups = model.parameter_groups(0.3)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("matrix", 0.3), ("embedding", 0.3), ("vector", 0.0)]
    rest = groups[2]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(groups[1]["params"]) == (1 if tied else 2)
    assert all(p.shape == (300, 32) for p in groups[1]["params"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters()}
    undecayed = {id(p) for p in rest["params"]}
    for name, parameter in model.named_parameters():
        exempt = any(part in name for part in ("norm", "q_proj.1", "bias", "A_log", "conv1d")) or name.endswith(".D")
        assert (id(parameter) in undecayed) == exempt, name


def test_num_parameters_by_hand() -> None:
    # D=32. Two Mamba blocks: inner 64, H=4, N=8, convolution over 64+16=80 channels.
    # One MLA block: 2 heads of 16, latent 12, rope 4.
    mamba = 32 * (64 + 80 + 4) + 80 * 4 + 80 + 3 * 4 + 64 + 64 * 32
    mla = 32 * 32 + 32 * (12 + 4) + 12 + 12 * 2 * (12 + 16) + 32 * 32
    mlp = 32 * 96 + 48 * 32
    blocks = 2 * mamba + mla + 3 * (mlp + 2 * 32) + 32
    assert make_model().num_parameters(embedding=False) == blocks
    assert make_model().num_parameters() == blocks + 300 * 32
    untied = make_model(tie_embeddings=False)
    assert untied.num_parameters() == blocks + 2 * 300 * 32
    assert untied.num_parameters(embedding=False) == blocks
    latent_q = 32 * 10 + 10 + 10 * 32 - 32 * 32
    assert make_model(q_latent_dim=10).num_parameters(embedding=False) == blocks + latent_q


@pytest.mark.parametrize(("time", "chunk"), [(128, 64), (40, 64)])
def test_flops_equal_what_a_counter_sees(time: int, chunk: int) -> None:
    """The counter sees every product, so these known differences are added to the formula, and nothing else:

    causal halves computed in full, and the pass of states between chunks. The convolution is left out on both
    sides (it is shifted sums, which the counter does not see).
    """
    batch = 2
    model = make_model(mamba_chunk=chunk)
    ids, targets = tokens(batch, time), tokens(batch, time + 1)[:, 1:]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(ids, targets).backward()
    length = min(chunk, time)
    chunks = time // length
    inner, state = 64, 8
    other_half = 2 * length * (state + inner) // 2 * 2 + 4 * time * 32 // 2  # a token, 2 Mamba blocks and 1 MLA
    passing = 2 * (chunks + 1) ** 2 * inner * state * 2  # a sequence
    seen = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert set(seen) == {"aten.mm", "aten.bmm"}
    products = seen["aten.mm"] + seen["aten.bmm"]
    assert products == batch * time * model.flops_per_token(time) + 3 * batch * (time * other_half + passing)


def test_flops_of_the_default_profile_by_hand() -> None:
    config = SigmaConfig()
    with torch.device("meta"):
        model = SigmaLLM(config)
    mamba = 2 * 768 * (1536 + 1792 + 24) + 2 * 1536 * 768 + 4 * 1536 * 128 + 64 * (128 + 1536)
    mla = 2 * 768 * 768 + 2 * 768 * 288 + 2 * 256 * 12 * (32 + 64) + 2 * 768 * 768 + 2 * 512 * 768
    mlp = 2 * 3 * 768 * 2048
    assert model.flops_per_token(512) == 3 * (15 * mamba + 3 * mla + 18 * mlp + 2 * 768 * 32_768)


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_round_trip(tied: bool) -> None:
    model = make_model(tie_embeddings=tied)
    state = model.state_dict()
    assert ("head.weight" in state) == (not tied)
    assert len({value.data_ptr() for value in state.values()}) == len(state)  # nothing stored twice
    assert set(state) == {name for name, _ in model.named_parameters()}  # no buffers
    fresh = SigmaLLM(model.config)
    fresh.load_state_dict(state)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(fresh(ids), model(ids))
    model.compile_blocks()  # lazy: compiles nothing yet
    assert list(model.state_dict()) == list(state)


def test_bf16_autocast_is_close_and_keeps_the_residual_stream_in_float32() -> None:
    model = make_model()
    ids, targets = tokens(2, 70), tokens(2, 71)[:, 1:]
    kinds: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: kinds.append(output[0].dtype))
    exact = model.loss(ids, targets)
    want = torch.autograd.grad(exact, list(model.parameters()))
    kinds.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets)
        assert model(ids).dtype == torch.bfloat16
    assert set(kinds) == {torch.float32}
    got = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - exact.item()) < 5e-3
    for (name, _), g, w in zip(model.named_parameters(), got, want, strict=True):
        assert g.dtype == torch.float32
        assert (g - w).norm() < 0.05 * w.norm(), name


def test_tiny_model_learns_a_sequence_by_heart() -> None:
    model = make_model()
    sequence = tokens(2, 25)
    ids, targets = sequence[:, :-1], sequence[:, 1:]
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    with torch.no_grad():
        assert torch.equal(model(ids).argmax(-1), targets)


def test_compiled_blocks_equal_eager_and_share_graphs() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, compiled = make_model(n_layers=6), make_model(n_layers=6)
    compiled.compile_blocks(counter)
    ids, targets = tokens(2, 20), tokens(2, 21)[:, 1:]
    results = []
    for model in (eager, compiled):
        loss = model.loss(ids, targets)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 3  # for the first block, which adds nothing, three Mamba blocks, and two MLA blocks
