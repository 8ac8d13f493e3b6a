"""What MLA's attention reads, against its definition in float64; values and the gradient of every input.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED, KERNEL_DEVICE, assert_close, normal
from torch import Tensor

from eco_llm.ops.mla_heads import mla_heads

EPS = 1e-5
NAMES = ("q", "latent", "norm_weight", "up")
# Largest error of a result as a share of its largest element. bfloat16: products round, and the interpreter cuts off.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2 if INTERPRETED else 1.5e-2}
# (B, T, heads, plain channels, rotary ones, channels of a value, latent): widths that are no powers of two, one head,
# more heads than a program takes at a time, one token.
SHAPES = [(2, 7, 3, 5, 6, 9, 12), (1, 1, 1, 1, 2, 1, 1), (1, 33, 12, 32, 32, 64, 40), (2, 5, 40, 64, 32, 96, 17)]


def cases(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, up_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], list[Tensor]]:
    """(inputs, table, gradients of queries, keys and values)."""
    batch, time, heads, nope, rope, value, rank = shape
    wide = torch.promote_types(dtype, torch.float32)
    angles = normal(time, rope // 2, seed=1, dtype=torch.float64, device=device)
    table = angles.cos().to(wide), angles.sin().to(wide)
    inputs = {
        "q": normal(batch, time, heads * (nope + rope), seed=2, dtype=dtype, device=device),
        "latent": normal(batch, time, rank + rope, seed=3, dtype=dtype, device=device),
        "norm_weight": 1 + 0.3 * normal(rank, seed=4, dtype=wide, device=device),
        "up": normal(heads * (nope + value), rank, seed=5, dtype=up_dtype or dtype, device=device) / rank**0.5,
    }
    widths = (nope + rope, nope + rope, value)
    gradients = [normal(batch, time, heads, w, seed=6 + i, dtype=dtype, device=device) for i, w in enumerate(widths)]
    # As attention returns them: [B, h, T, …] in memory of its own order.
    return inputs, table, [g.transpose(1, 2) for g in gradients]


def exact(inputs: dict[str, Tensor], table: tuple[Tensor, Tensor], heads: int, gradients: list[Tensor]) -> list[Tensor]:
    """Queries, keys, values and the gradient of every input, in float64, token by token and head by head."""
    q, latent, weight, up = leaves = [inputs[name].detach().double().requires_grad_() for name in NAMES]
    cos, sin = (t.double() for t in table)
    rank, half = weight.shape[0], cos.shape[1]
    head, nope = q.shape[-1] // heads, q.shape[-1] // heads - 2 * half

    def turned(x: Tensor) -> Tensor:  # [B, T, R]
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
        return torch.cat((pairs.real, pairs.imag), -1)

    c = latent[..., :rank]
    normed = weight * c / (c.square().mean(-1, keepdim=True) + EPS).sqrt()
    key_rope = turned(latent[..., rank:])
    queries, keys, values = [], [], []
    rows = up.shape[0] // heads
    for i in range(heads):
        mine = q[..., i * head : (i + 1) * head]
        queries.append(torch.cat((mine[..., :nope], turned(mine[..., nope:])), -1))
        kv = normed @ up[i * rows : (i + 1) * rows].t()
        keys.append(torch.cat((kv[..., :nope], key_rope), -1))
        values.append(kv[..., nope:])
    results = [torch.stack(parts, 1) for parts in (queries, keys, values)]
    return [*results, *torch.autograd.grad(results, leaves, [g.double() for g in gradients])]


def compare(got: list[Tensor], wanted: list[Tensor], inputs: dict[str, Tensor], tolerance: float) -> None:
    kinds = [inputs["q"].dtype] * 3 + [inputs[name].dtype for name in NAMES]
    assert [t.dtype for t in got] == kinds
    for actual, expected in zip(got, wanted, strict=True):
        assert actual.shape == expected.shape
        assert_close(actual, expected, tolerance)


def run(
    inputs: dict[str, Tensor], table: tuple[Tensor, Tensor], heads: int, gradients: list[Tensor], backend: str
) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    results = mla_heads(**leaves, table=table, heads=heads, eps=EPS, backend=backend)  # type: ignore[arg-type]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, list(leaves.values()), gradients)]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs, table, gradients = cases(shape, dtype, "cpu")
    wanted = exact(inputs, table, shape[2], gradients)
    compare(run(inputs, table, shape[2], gradients, "reference"), wanted, inputs, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "up_dtype"),
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_kernels_are_the_definition(dtype: torch.dtype, up_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs, table, gradients = cases(shape, dtype, KERNEL_DEVICE, up_dtype)
    wanted = exact(inputs, table, shape[2], gradients)
    first = run(inputs, table, shape[2], gradients, "triton")
    compare(first, wanted, inputs, max(TOLERANCE[dtype], TOLERANCE[up_dtype]))
    again = run(inputs, table, shape[2], [g.contiguous() for g in gradients], "triton")  # in another order of memory
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_and_the_compiler(compiled: bool) -> None:
    """float32 weights, bf16 products; gradients of keys alone."""
    inputs, table, gradients = cases(SHAPES[2], torch.bfloat16, KERNEL_DEVICE, torch.float32)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}

    def keys(**tensors: Tensor) -> Tensor:
        q = tensors.pop("q") * 1
        return mla_heads(q, **tensors, table=table, heads=12, eps=EPS, backend="triton")[1]

    work = torch.compile(keys, backend="aot_eager", fullgraph=True) if compiled else keys
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        result = work(**leaves)
    got = torch.autograd.grad(result, list(leaves.values()), gradients[1])
    zero = [torch.zeros_like(g) for g in gradients]
    wanted = exact(inputs, table, 12, [zero[0], gradients[1], zero[2]])
    assert_close(result, wanted[1], TOLERANCE[torch.bfloat16])
    assert not got[0].any()
    for actual, expected in zip(got[1:], wanted[4:], strict=True):
        assert_close(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_no_tokens() -> None:
    inputs, table, gradients = cases((0, 3, 2, 4, 2, 4, 8), torch.float32, KERNEL_DEVICE)
    got = run(inputs, table, 2, gradients, "triton")
    assert [t.shape for t in got[3:]] == [t.shape for t in inputs.values()]
    assert not got[5].any()
    assert not got[6].any()


def test_mistakes_are_refused() -> None:
    inputs, table, _ = cases(SHAPES[0], torch.float32, "cpu")

    def call(**changes: object) -> None:
        arguments = {**inputs, "table": table, "heads": 3, "eps": EPS, **changes}
        mla_heads(**arguments)  # type: ignore[arg-type]

    call()
    for wrong in ({"heads": 4}, {"q": inputs["q"][..., :18]}, {"latent": inputs["latent"][..., 1:]}):
        with pytest.raises(ValueError, match="need q"):
            call(**wrong)
    for wrong in ({"up": inputs["up"][:, 1:]}, {"up": inputs["up"][:15]}):
        with pytest.raises(ValueError, match="need up"):
            call(**wrong)
    with pytest.raises(ValueError, match="need cos and sin"):
        call(table=(table[0][1:], table[1][1:]))
    with pytest.raises(ValueError, match="unknown backend"):
        call(backend="flash")
    with pytest.raises(ValueError, match="take float32 or bfloat16"):
        call(**{name: value.half() for name, value in inputs.items()}, backend="triton")
