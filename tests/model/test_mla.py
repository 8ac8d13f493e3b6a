"""MLA: expanded, absorbed, and transformers' DeepseekV2Attention with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eco_llm.config import SigmaConfig
from eco_llm.model.mla import MLA
from eco_llm.model.rotary import rotary_table
from eco_llm.ops.mla_heads.reference import rotate

HEADS, HEAD_DIM, ROPE, LATENT = 3, 16, 6, 20
WIDTH = HEADS * HEAD_DIM


def make_mla(q_latent_dim: int, dtype: torch.dtype = torch.float64) -> MLA:
    torch.manual_seed(0)
    mla = MLA(
        SigmaConfig(
            d_model=WIDTH, n_heads=HEADS, rope_head_dim=ROPE, kv_latent_dim=LATENT, q_latent_dim=q_latent_dim,
            norm_eps=1e-6,
        )
    )  # fmt: skip
    with torch.no_grad():  # away from the symmetric start: attention far from uniform, norms not 1
        for parameter in mla.parameters():
            parameter.mul_(3.0).add_(0.1 * torch.randn_like(parameter))
    return mla.to(dtype)


def transformers_twin(mla: MLA, q_latent_dim: int) -> tuple[torch.nn.Module, dict[str, tuple[str, Tensor]], Tensor]:
    """DeepseekV2Attention with the weights of `mla`; {its name: (our name, our row for each of its rows)}; RoPE table.

    It turns channel pairs (2i, 2i + 1), ours (i, i + R/2): rows that feed rotary channels are permuted.
    """
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

    config = DeepseekV2Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=LATENT,
        q_lora_rank=q_latent_dim or None, qk_nope_head_dim=HEAD_DIM - ROPE, qk_rope_head_dim=ROPE, head_dim=ROPE,
        v_head_dim=HEAD_DIM, attention_bias=False, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV2Attention(config, layer_idx=0).to(torch.float64)
    rope_rows = torch.arange(ROPE).view(2, ROPE // 2).t().flatten()  # their (2i, 2i+1) is our (i, i + R/2)
    head = torch.cat((torch.arange(HEAD_DIM - ROPE), HEAD_DIM - ROPE + rope_rows))
    q_rows = (torch.arange(HEADS)[:, None] * HEAD_DIM + head).flatten()
    kv_rows = torch.cat((torch.arange(LATENT), LATENT + rope_rows))
    plain = slice(None)
    rows = {
        "kv_a_proj_with_mqa.weight": ("kv_down.weight", kv_rows),
        "kv_a_layernorm.weight": ("kv_norm.weight", plain),
        "kv_b_proj.weight": ("kv_up.weight", plain),
        "o_proj.weight": ("out_proj.weight", plain),
    }
    if q_latent_dim:
        rows["q_a_proj.weight"] = ("q_proj.0.weight", plain)
        rows["q_a_layernorm.weight"] = ("q_proj.1.weight", plain)
        rows["q_b_proj.weight"] = ("q_proj.2.weight", q_rows)
    else:
        rows["q_proj.weight"] = ("q_proj.weight", q_rows)
    ours = mla.state_dict()
    assert {name for name, _ in rows.values()} == ours.keys()
    theirs.load_state_dict({name: ours[mine][index] for name, (mine, index) in rows.items()})
    rotary = DeepseekV2RotaryEmbedding(config)
    return theirs, rows, rotary(torch.zeros(1), torch.arange(200)[None])


@pytest.mark.parametrize("q_latent_dim", [0, 10])
@pytest.mark.parametrize("time", [1, 2, 63, 64])
def test_equals_transformers_deepseek_v2(time: int, q_latent_dim: int) -> None:
    mla = make_mla(q_latent_dim)
    theirs, rows, table = transformers_twin(mla, q_latent_dim)
    x = torch.randn(2, time, WIDTH, dtype=torch.float64)
    mask = torch.full((time, time), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    cotangent = torch.randn(2, time, WIDTH, dtype=torch.float64)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_y = mla(ours_x)
    theirs_y = theirs(theirs_x, attention_mask=mask, position_embeddings=table[:, :time])[0]
    (ours_y * cotangent).sum().backward()
    (theirs_y * cotangent).sum().backward()
    # transformers rotates and takes the softmax in float32, and the weights here make attention sharp.
    torch.testing.assert_close(ours_y, theirs_y, rtol=0.0, atol=2e-5 * theirs_y.abs().max().item())
    assert theirs_x.grad is not None
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=0.0, atol=2e-5 * theirs_x.grad.abs().max().item())
    ours_grads = {name: p.grad for name, p in mla.named_parameters()}
    for name, parameter in theirs.named_parameters():
        mine, index = rows[name]
        assert parameter.grad is not None
        scale = max(parameter.grad.abs().max().item(), 1.0)  # over one token, queries have no gradient at all
        torch.testing.assert_close(ours_grads[mine][index], parameter.grad, rtol=0.0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("q_latent_dim", [0, 10])
@pytest.mark.parametrize("pieces", [[1] * 12, [1, 11], [5, 1, 6], [12]], ids=str)
def test_cache_equals_whole_sequence(pieces: list[int], q_latent_dim: int) -> None:
    """Pieces after the first take the absorbed path. The cache starts as NaN: nothing unwritten may be read."""
    mla = make_mla(q_latent_dim)
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    cache = mla.init_cache(2, 15, x.device, x.dtype)
    cache.c_kv.fill_(torch.nan)
    cache.k_rope.fill_(torch.nan)
    with torch.no_grad():
        got = torch.cat([mla.extend(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, mla(x), rtol=1e-9, atol=1e-9)
    assert cache.length == 12
    assert cache.c_kv.shape == (2, 15, LATENT)
    assert cache.k_rope.shape == (2, 15, ROPE)


def test_absorbed_equals_expanded_gradients_included() -> None:
    mla = make_mla(10)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    leaves = [x, *mla.parameters()]
    results = []
    for attend in (mla._expanded, mla._absorbed):
        y = mla.out_proj(attend(*mla._project(x, start=0)))
        results.append([y, *torch.autograd.grad((y * cotangent).sum(), leaves)])
    for expanded, absorbed in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=1e-9, atol=1e-9)


def test_full_cache_is_refused() -> None:
    mla = make_mla(0)
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    cache = mla.init_cache(1, 5, x.device, x.dtype)
    mla.extend(x, cache)
    with pytest.raises(ValueError, match="cache holds 5 tokens, 8 are needed"):
        mla.extend(x, cache)


def test_rotation_depends_on_distance_only_and_keeps_length() -> None:
    q, k = torch.randn(2, 1, ROPE, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        turned = (rotate(t, rotary_table(p, 1, ROPE, 100.0, t.device)) for t, p in ((q, i), (k, j)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-5, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
    long = rotate(q, rotary_table(1234, 1, ROPE, 100.0, q.device))
    torch.testing.assert_close(long.norm(), q.norm(), rtol=1e-6, atol=0.0)
    # First channel pair turns by one radian a position.
    unit = torch.tensor([[1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    turned = rotate(unit, rotary_table(1, 1, ROPE, 100.0, q.device))[0]
    cos_sin = torch.tensor([math.cos(1.0), math.sin(1.0)], dtype=torch.float64)
    torch.testing.assert_close(turned[[0, ROPE // 2]], cos_sin, rtol=1e-6, atol=1e-7)


def test_kept_tables_are_what_they_were_and_nobodys() -> None:
    cpu = torch.device("cpu")
    with torch.inference_mode():  # validation may come first
        first = rotary_table(0, 63, ROPE, 77.0, cpu)[0]
    wanted = torch.arange(63.0)[:, None] * 77.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
    torch.testing.assert_close(first, wanted.cos(), rtol=1e-5, atol=1e-6)
    rotary_table(0, 63, ROPE, 77.0, cpu)[0].zero_()
    cos, sin = rotary_table(0, 63, ROPE, 77.0, cpu)
    assert not cos.is_inference()
    assert torch.equal(cos[7:9], rotary_table(7, 2, ROPE, 77.0, cpu)[0])
    assert torch.equal(sin[7:9], rotary_table(7, 2, ROPE, 77.0, cpu)[1])
    q = torch.ones(63, ROPE, requires_grad=True)
    rotate(q, (cos, sin)).sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_a_graph_reads_a_table_that_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As capture sees it: a kept table is held for good, one that is made meanwhile is nobody else's."""
    from eco_llm.model import rotary

    cpu = torch.device("cpu")
    monkeypatch.setattr(rotary, "_kept", {})
    monkeypatch.setattr(rotary, "_read_by_graphs", {})
    wanted = rotary_table(0, 31, ROPE, 5.0, cpu)
    monkeypatch.setattr(rotary, "_capturing", lambda device: True)
    key = (31, ROPE, 5.0, cpu)
    for got, want in zip(rotary_table(0, 31, ROPE, 5.0, cpu), wanted, strict=True):
        assert torch.equal(got, want)
    assert rotary._read_by_graphs[key] is rotary._kept[key]
    rotary_table(0, 32, ROPE, 5.0, cpu)
    assert list(rotary._read_by_graphs) == list(rotary._kept) == [key]
    monkeypatch.setattr(rotary, "_capturing", lambda device: False)
    for length in range(40, 46):
        rotary_table(0, length, ROPE, 5.0, cpu)
    assert len(rotary._kept) == 4
    assert key not in rotary._kept
    assert torch.equal(rotary._read_by_graphs[key][0], wanted[0])


def test_traced_tables_have_the_shape_and_type_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    cpu = torch.device("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        real = rotary_table(0, 7, ROPE, 9.0, cpu)
        with FakeTensorMode():
            traced = rotary_table(0, 7, ROPE, 9.0, cpu)
    finally:
        torch.set_default_dtype(before)
    assert [(t.shape, t.dtype) for t in traced] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("q_latent_dim", [0, 3])
def test_gradients_by_finite_differences(q_latent_dim: int) -> None:
    torch.manual_seed(0)
    config = SigmaConfig(d_model=8, n_heads=2, rope_head_dim=2, kv_latent_dim=3, q_latent_dim=q_latent_dim)
    mla = MLA(config).to(torch.float64)
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*mla.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mla, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-5),
        pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_equals_flex_attention(
    device: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same layer with FlexAttention and a causal mask in place of SDPA; gradients too where it has any."""
    import torch.nn.functional as F
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mla = make_mla(0, dtype).to(device).requires_grad_(device == "cuda")
    x = torch.randn(2, 63, WIDTH, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    x.requires_grad_(device == "cuda")  # on a CPU FlexAttention has no backward

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def flex(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        assert is_causal
        assert q.shape == k.shape == v.shape  # equal head widths: every SDPA backend applies
        mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=device)
        return flex_attention(q, k, v, block_mask=mask)

    results = []
    for attention in (F.scaled_dot_product_attention, flex):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        y = mla(x)
        grads = torch.autograd.grad(y.sum(), (x, *mla.parameters())) if device == "cuda" else ()
        results.append((y, *grads))
    for actual, want in zip(*results, strict=True):
        assert (actual - want).abs().max() <= tolerance * want.abs().max()
