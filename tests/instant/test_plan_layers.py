"""What the plan says that operators and blocks keep and need, against the real code on tensors without storage."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eco_llm.config import SigmaConfig
from eco_llm.instant.plan import layers as plan_layers
from eco_llm.instant.plan.layers import Parts, Tape
from eco_llm.instant.plan.sizes import MAX_CHANNELS, MOST_HEADS, PROGRAMS, TILE, Job, Shapes
from eco_llm.model.block import Block
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.ops import grid, quantize
from eco_llm.ops.gated_norm import MAX_TRITON_CHANNELS
from eco_llm.ops.mamba_mixer import _mixer, _mixer_backward, unsupported
from eco_llm.ops.swiglu import _mlp

SHAPES = [
    SigmaConfig(d_model=768, n_layers=6),
    SigmaConfig(d_model=512, n_heads=8, n_layers=6, mamba_state_dim=64, mlp_hidden_dim=1280, mamba_chunk=128),
]


def parts_of(model: SigmaConfig, batch: int = 2, seq_len: int = 1024, **changes: Any) -> Parts:
    job = Job(model, batch, seq_len, ("none",) * model.n_layers, **changes)
    return Parts(job, Tape())


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def mixer_inputs(m: SigmaConfig, batch: int, time: int, weights: torch.dtype) -> list[Any]:
    """Arguments of the mixer's operator."""
    inner, state, heads = m.mamba_inner_dim, m.mamba_state_dim, m.mamba_n_heads
    channels, f32 = inner + 2 * state, torch.float32
    return [
        meta(batch, time, m.d_model), meta(inner + channels + heads, m.d_model, dtype=weights),
        meta(channels, m.mamba_conv_width, dtype=f32), meta(channels, dtype=f32),
        *(meta(heads, dtype=f32) for _ in range(3)), meta(inner, dtype=f32), meta(m.d_model, inner, dtype=weights),
        state, 1e-5, 64 if m.mamba_chunk == "auto" else m.mamba_chunk,
    ]  # fmt: skip


def sizes(tensors: Any) -> list[int]:
    """Bytes of each that has any, as the allocator rounds them."""
    return sorted(-(-t.nbytes // 512) * 512 for t in tensors if t.numel())


def rounded(buffers: Any) -> list[int]:
    return sorted(buffer.block.size for buffer in buffers)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_operators_keep_what_the_plan_says(model: SigmaConfig, weights: torch.dtype) -> None:
    parts = parts_of(model, weight_bytes=weights.itemsize)
    kept = _mixer(*mixer_inputs(model, 2, 1024, weights))[1:]
    mine = parts.mamba_forward("activations")[1]
    # Blocks may be larger than what was asked for; small models would differ by that alone.
    for theirs, ours in zip(sizes(kept), rounded(mine), strict=True):
        assert theirs <= ours <= theirs + 2 * 2**20
    x, up = meta(2, 1024, model.d_model), meta(2 * model.mlp_dim, model.d_model, dtype=weights)
    kept = _mlp(x, up, meta(model.d_model, model.mlp_dim, dtype=weights))[1:]
    for theirs, ours in zip(sizes(kept), rounded(parts.mlp_forward("activations")[1]), strict=True):
        assert theirs <= ours <= theirs + 2 * 2**20


@pytest.mark.parametrize(
    "model",
    [
        *SHAPES,
        SigmaConfig(n_layers=7, tie_embeddings=False, q_latent_dim=192),
        SigmaConfig(n_layers=3, attention_ratio=0, mamba_head_dim=128),
        SigmaConfig(n_layers=3, mamba_ratio=0),
    ],
)
def test_parameters_are_the_models(model: SigmaConfig) -> None:
    with torch.device("meta"):
        assert Shapes(model).parameters() == SigmaLLM(model).num_parameters()


def test_the_plan_knows_which_shapes_the_kernels_take() -> None:
    assert MAX_CHANNELS == MAX_TRITON_CHANNELS
    assert grid.TILE == TILE
    for head, state, width in ((64, 128, 768), (32, 128, 768), (64, 48, 768), (128, 16, 1024), (64, 128, 4160)):
        model = SigmaConfig(d_model=width, n_heads=width // 64, n_layers=6, mamba_head_dim=head, mamba_state_dim=state)
        refused = unsupported(torch.bfloat16, model.mamba_inner_dim, head, state) is not None
        job = Job(model, 1, 512, ("none",) * 6)
        if refused:
            with pytest.raises(Exception, match="kernels"):
                job.check()
        else:
            job.check()


# -- compiled blocks: what AOTAutograd's partitioner keeps --


class _Found(Exception):
    """The graph was seen; nothing needs to run."""


def kept_by_compiler(block: torch.nn.Module, x: Tensor) -> dict[int, int]:
    """{storage: bytes} of what the compiled forward keeps, but for parameters and x."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: dict[int, int] = {}

    def forward(graph: Any, _: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        kept = [node for node in output.args[0][2:] if node is not None and node.op != "placeholder"]
        found.update(
            {node.meta["val"].untyped_storage()._cdata: node.meta["val"].untyped_storage().nbytes() for node in kept}
        )
        raise _Found

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, _: graph, decompositions=select_decomp_table(),
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="_Found"):
        torch.compile(block, dynamic=False, backend=backend)(x)
    return found


class _Change(torch.nn.Module):
    """What a block adds to x, as `coupled` has it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, v = self.block.to_change(x, x.view_as(x))
        return mixed, self.block.mlp(v)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("mixer", ["mamba", "mla"])
def test_compiled_blocks_keep_what_the_plan_says(mixer: Any, coupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "eco_llm.ops.add_norm", "eco_llm.ops.mamba_mixer", "eco_llm.ops.mla_heads", "eco_llm.ops.swiglu",
    ):  # fmt: skip
        monkeypatch.setattr(f"{module}.uses_triton", lambda tensor: True)
    model = SigmaConfig(d_model=256, n_heads=4, n_layers=6, kv_latent_dim=64)
    batch, time = 2, 512
    x = torch.zeros(batch, time, model.d_model, dtype=torch.bfloat16 if coupled else torch.float32, requires_grad=True)
    block = Block(model, mixer)
    found = kept_by_compiler(_Change(block) if coupled else block, x)
    parts = parts_of(model, batch, time)
    total = [] if coupled else [parts.wide("activations")]  # of x itself, which is not counted, nothing is added up
    mixed, first = parts.part_forward(mixer, "activations")
    _, second = parts.part_forward("mlp", "activations")
    planned = sum(b.block.size for b in (*total, *first, mixed, *second))
    assert planned == pytest.approx(sum(found.values()), rel=0.02)


# -- inside operators --


class _Live(TorchDispatchMode):
    """Bytes of meta tensors that are alive, by storage, and their peak."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        self._seen = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen:
                    self._seen.add(key)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._died, key, size)
        return out

    def _died(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' launchers allocate as ever and launch nothing; products of bf16 factors leave float32 directly."""
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.KernelInterface, "__getitem__", lambda self, grid: lambda *a, **k: None)

    def direct(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    monkeypatch.setattr("eco_llm.ops.products.product", direct)


def peak_of(work: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that `work` has allocated at its worst, its result included."""
    with _Live(inputs) as live:
        result = work(*inputs)
        del result
    return live.peak


def planned_peak(parts: Parts, work: Callable[[], Any]) -> int:
    before = parts.tape.allocator.allocated
    parts.tape.peak = before
    work()
    return parts.tape.peak - before


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(("batch", "time"), [(4, 512), (16, 1024), (1, 8192)])
def test_temporaries_inside_operators(model: SigmaConfig, batch: int, time: int, no_launches: None) -> None:
    from eco_llm.ops.mamba_mixer.coded import STREAMS
    from eco_llm.ops.mamba_mixer.triton import Kept, mixer_backward, mixer_forward, mixer_forward_to_codes
    from eco_llm.ops.ssd.triton import MOST_HEADS_GRADIENT, OF_AN_H200, PROGRAMS_GRADIENT
    from eco_llm.ops.swiglu.triton import mlp_backward, mlp_forward

    assert (MOST_HEADS, PROGRAMS) == (MOST_HEADS_GRADIENT, PROGRAMS_GRADIENT * OF_AN_H200)
    assert plan_layers.GROUP == quantize.GROUP
    inputs = mixer_inputs(model, batch, time, torch.float32)
    parts = parts_of(model, batch, time)
    assert planned_peak(parts, lambda: parts.mamba_forward("activations")) == pytest.approx(
        peak_of(mixer_forward, *inputs), rel=0.05
    )
    parts = parts_of(model, batch, time)
    assert planned_peak(parts, lambda: parts.mamba_forward("activations", codes=True)) == pytest.approx(
        peak_of(mixer_forward_to_codes, *inputs, parts.job.bits, meta(1, dtype=torch.int64)[0], STREAMS), rel=0.05
    )
    kept = Kept(*_mixer(*inputs))
    d_out = meta(batch, time, model.d_model)
    parts = parts_of(model, batch, time)
    assert planned_peak(parts, parts.mamba_backward) == pytest.approx(
        peak_of(mixer_backward, d_out, kept, *inputs), rel=0.05
    )

    x, f32 = meta(batch, time, model.d_model), torch.float32
    up, down = meta(2 * model.mlp_dim, model.d_model, dtype=f32), meta(model.d_model, model.mlp_dim, dtype=f32)
    parts = parts_of(model, batch, time)
    assert planned_peak(parts, lambda: parts.mlp_forward("activations")) == pytest.approx(
        peak_of(mlp_forward, x, up, down), rel=0.05
    )
    _, a, narrow_up, narrow_down = _mlp(x, up, down)
    parts = parts_of(model, batch, time)
    assert planned_peak(parts, parts.mlp_backward) == pytest.approx(
        peak_of(mlp_backward, x, x, a, narrow_up, narrow_down, f32, f32), rel=0.05
    )


@pytest.mark.parametrize("model", SHAPES)
def test_temporaries_of_mlas_heads(model: SigmaConfig, no_launches: None) -> None:
    """The operator's share of the mixer's forward, and of its backward with attention's gradients given."""
    from eco_llm.ops.mla_heads.triton import heads_backward, heads_forward

    batch, time, heads, f32 = 16, 1024, model.n_heads, torch.float32
    half = model.rope_head_dim // 2
    q, latent = meta(batch, time, model.d_model), meta(batch, time, model.kv_latent_dim + 2 * half)
    up = meta(heads * (2 * model.head_dim - 2 * half), model.kv_latent_dim)
    norm, cos = meta(model.kv_latent_dim, dtype=f32), meta(time, half, dtype=f32)
    forward = peak_of(heads_forward, q, latent, norm, up, cos, cos, heads, 1e-5)
    tokens = 2 * batch * time
    assert forward == tokens * (3 * model.d_model + up.shape[0])
    parts = parts_of(model, batch, time, weight_bytes=2)
    beside = tokens * (model.d_model + latent.shape[2])  # q and the latent, the projections'
    assert planned_peak(parts, lambda: parts.mla_unread("activations")) == pytest.approx(forward + beside, rel=0.05)
    d = meta(batch, time, heads, model.head_dim)
    backward = peak_of(heads_backward, d, d, d, latent, norm, up, cos, cos, 1e-5, torch.bfloat16)
    parts = parts_of(model, batch, time, weight_bytes=2)
    grown = parts.tape.take(2 * model.d_model**2)  # the gradient of out_proj
    beside = 3 * tokens * model.d_model + grown.block.size
    parts.tape.give(grown)
    assert planned_peak(parts, parts.mla_backward) == pytest.approx(backward + beside, rel=0.05)


def test_backward_operators_return_what_the_plan_says() -> None:
    model = SHAPES[0]
    inputs = mixer_inputs(model, 2, 1024, torch.float32)
    kept = _mixer(*inputs)
    gradients = _mixer_backward(kept[0], *kept[1:], *inputs)
    parts = parts_of(model)
    d_u = parts.mamba_backward()
    matrices = [g for g in gradients if g.numel() > 2**20]
    for theirs, ours in zip(sizes(matrices), rounded([d_u, *parts.gradients]), strict=True):
        assert theirs <= ours <= theirs + 2 * 2**20
