"""The fused Mamba mixer against its plain composition in float64; outputs and the gradient of every input.

The kernels need a GPU (`-m gpu`), or Triton's interpreter (float32, small shapes): TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED, assert_close
from kernel_cases import KERNEL_DEVICE as DEVICE
from torch import Tensor

from eco_llm.ops import mamba_mixer as op
from eco_llm.ops.mamba_mixer import mamba_mixer, unsupported, writes_codes
from eco_llm.ops.quantize import Keep, dequantize, quantize
from eco_llm.ops.residual_norm.reference import residual_norm_backward_reference, residual_norm_reference

only_gpu = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter, or about the GPU itself")
NAMES = ("u", "in_weight", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight", "out_weight")
# As a share of a tensor's norm. bf16: every op on the way rounds to 8 bits. float32: dA_log is a sum of differences.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.5e-2}


def make_inputs(
    time: int, *, heads: int = 2, width: int = 64, groups: int = 1, state: int = 16, taps: int = 4, model: int = 24,
    dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype = torch.float32, device: str = DEVICE,
) -> dict[str, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(time + heads)
    inner = heads * width
    conv = inner + 2 * groups * state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    values = {
        "u": normal(2, time, model).to(dtype),
        "in_weight": (normal(inner + conv + heads, model) / model**0.5).to(weight_dtype),
        "conv_weight": (0.4 * normal(conv, taps)).float(),
        "conv_bias": (0.1 * normal(conv)).float(),
        "dt_bias": (normal(heads) - 2).float(),
        "A_log": torch.linspace(0.5, 12, heads).log(),
        "D": normal(heads).float(),
        "norm_weight": (1 + 0.3 * normal(inner)).float(),
        "out_weight": (normal(model, inner) / inner**0.5).to(weight_dtype),
    }
    return {name: value.to(device).requires_grad_() for name, value in values.items()}


def run(inputs: dict[str, Tensor], state: int, chunk: int = 64, **options: object) -> dict[str, Tensor]:
    out = mamba_mixer(**inputs, state_dim=state, eps=1e-5, chunk_size=chunk, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent)
    return {"out": out.detach()} | dict(zip(inputs, grads, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        got, want = actual[name].double(), want.double()
        assert got.isfinite().all(), name
        error = (got - want).norm() / want.norm().clamp(min=0.1)  # T = 1 leaves A_log without a gradient
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.1e}"


def as_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("time", [1, 63, 100])
def test_kernels_equal_the_composition(time: int, taps: int, groups: int) -> None:
    inputs = make_inputs(time, groups=groups, taps=taps)
    expected = run(as_float64(inputs), 16, backend="reference")
    assert_same(run(inputs, 16, backend="triton"), expected, TOLERANCE[torch.float32])


@pytest.mark.gpu
@only_gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [64, 128, 256])
@pytest.mark.parametrize(("time", "heads"), [(1, 24), (63, 24), (512, 24), (1000, 6)])
def test_default_widths_in_bf16(time: int, heads: int, chunk: int, weight_dtype: torch.dtype) -> None:
    shape = {"heads": heads, "width": 64, "state": 128, "model": 256}
    inputs = make_inputs(time, **shape, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    expected = run(as_float64(inputs), 128, backend="reference")
    actual = run(inputs, 128, chunk, backend="triton")
    assert actual["out"].dtype == torch.bfloat16
    assert all(actual[name].dtype == inputs[name].dtype for name in NAMES)
    assert_same(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@only_gpu
def test_compiled_captured_and_eager_are_the_same_bits() -> None:
    inputs = make_inputs(130, heads=8, width=64, state=64, model=128, dtype=torch.bfloat16)
    cotangent = torch.ones(2, 130, 128, device=DEVICE, dtype=torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        out = mamba_mixer(**inputs, state_dim=64, eps=1e-5, chunk_size=64)
        return (out.detach(), *torch.autograd.grad(out, list(inputs.values()), cotangent))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd remembers the stream on which it first met a leaf
        plain = step()
        expected = run(inputs, 64)
        compiled = torch.compile(run, dynamic=False)(inputs, 64)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for name, want in expected.items():
        assert torch.equal(compiled[name], want), name
    assert all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))


@pytest.mark.gpu
@only_gpu
def test_keeps_little_for_backward() -> None:
    """Input, in-projection's output, y and the decays; the bound of issue 5 is 18 bytes a token and channel of D."""
    batch, time, model = 4, 1024, 768
    inputs = make_inputs(time, heads=24, width=64, state=128, model=model, dtype=torch.bfloat16)
    inputs["u"] = torch.randn(batch, time, model, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weights = {
        n: v.detach().to(torch.bfloat16).requires_grad_() for n, v in inputs.items() if n in ("in_weight", "out_weight")
    }
    inputs |= weights  # so that no cast of a weight is counted as an activation
    mamba_mixer(**inputs, state_dim=128, eps=1e-5, chunk_size=64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = mamba_mixer(**inputs, state_dim=128, eps=1e-5, chunk_size=64)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    assert out.requires_grad
    a_token_and_channel = (kept + inputs["u"].numel() * 2) / (batch * time * model)  # the input is kept too
    assert a_token_and_channel <= 15.5


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    for change, message in (({"state": 24}, "state size of 24"), ({"width": 32}, "head width of 32")):
        inputs = make_inputs(8, **change, device="cpu")
        with pytest.raises(ValueError, match=message):
            run(inputs, change.get("state", 16), backend="triton")
        run(inputs, change.get("state", 16))


def test_an_inner_width_that_the_norm_does_not_take_is_refused_by_name() -> None:
    assert unsupported(torch.bfloat16, 8192, 64, 128) is None
    assert unsupported(torch.bfloat16, 10_240, 64, 128) == "an inner width of 10240 is over 8192"


def test_reference_gradients_reach_every_input() -> None:
    inputs = {
        n: v.detach().double().requires_grad_() for n, v in make_inputs(5, width=4, state=3, device="cpu").items()
    }

    def function(*values: Tensor) -> Tensor:
        return mamba_mixer(*values, state_dim=3, eps=1e-5, chunk_size=4, backend="reference")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


# ---- with the addition and the norm before it, and codes kept: what quantizing and dequantizing does ---------------


def keep_of(bits: int, step: int = (5 << 32) + 7) -> Keep:
    return Keep(bits, torch.tensor(step, device=DEVICE))


def coded_inputs(time: int, dtype: torch.dtype = torch.float32, **shape: object) -> dict[str, Tensor]:
    """Those of `make_inputs` behind a stream, what is added to it, and the norm's weight, in the place of u."""
    inputs = make_inputs(time, **{"model": 64, **shape})
    u = inputs.pop("u").detach()
    first = {"x": 3 * u, "added": u.flip(1).to(dtype), "pre_weight": 1 + 0.1 * u[0, 0]}
    return {name: value.requires_grad_() for name, value in first.items()} | inputs


def cotangents(inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the stream and of the result."""
    g = torch.Generator().manual_seed(3)
    total, out = (torch.randn(inputs["x"].shape, generator=g, dtype=torch.float64) for _ in range(2))
    return total.to(inputs["x"]), out.to(inputs["x"].device, dtype)


def run_coded(
    inputs: dict[str, Tensor], state: int, keep: Keep, chunk: int = 64, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    from eco_llm.ops.mamba_mixer.coded import coded_mixer

    x, added, pre_weight, *weights = inputs.values()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        results = coded_mixer(
            x, added, pre_weight, 1e-5, *weights, state_dim=state, eps=1e-5, chunk_size=chunk, keep=keep
        )
    grads = torch.autograd.grad(results, list(inputs.values()), cotangents(inputs, dtype))
    return {"total": results[0].detach(), "out": results[1].detach()} | dict(zip(inputs, grads, strict=True))


def slow_twin(
    inputs: dict[str, Tensor], state: int, keep: Keep, chunk: int = 64, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The unfused operators, between which u, y, z and xBC go through `quantize` and `dequantize`."""
    from eco_llm.ops.mamba_mixer.coded import STREAMS, U_STREAM
    from eco_llm.ops.mamba_mixer.triton import mixer_backward, mixer_forward
    from eco_llm.ops.residual_norm.triton import residual_norm_to_codes

    def through_codes(t: Tensor, stream: int) -> Tensor:
        q = quantize(t, keep.bits, step=keep.step, stream=stream, backend="reference")
        return dequantize(q, backend="reference")

    x, added, pre_weight, *values = (value.detach() for value in inputs.values())
    pre = residual_norm_to_codes(x, added, pre_weight, 1e-5, dtype, keep.bits, keep.step, 0)  # for u's bits alone
    kept = mixer_forward(pre.u, *values, state, 1e-5, chunk)
    inner, heads = inputs["norm_weight"].numel(), inputs["A_log"].numel()
    *parts, dt = kept.zxbcdt.split((inner, kept.zxbcdt.shape[-1] - inner - heads, heads), dim=-1)
    y, z, xbc = (through_codes(t, stream) for t, stream in zip((kept.y, *parts), STREAMS, strict=True))
    u = through_codes(pre.u, U_STREAM)
    d_total, d_out = cotangents(inputs, dtype)
    again = kept._replace(zxbcdt=torch.cat((z, xbc, dt), dim=-1), y=y)
    g = mixer_backward(d_out, again, u, *values, state, 1e-5, chunk)
    total, _, inverse = residual_norm_reference(x, added, pre_weight, 1e-5, dtype)
    d_x, d_pre = residual_norm_backward_reference(g.u, u, inverse, pre_weight, d_total)
    dA, d_bias, dD = g.small.unbind()
    gradients = (
        d_x, d_x.to(dtype), d_pre, g.in_weight, g.conv_weight, g.conv_bias, d_bias, dA, dD, g.norm_weight, g.out_weight
    )  # fmt: skip
    return {"total": total, "out": kept.out} | dict(zip(inputs, gradients, strict=True))


def assert_is_the_slow_twin(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The bits, but for what goes through sums of the norm's gradient, which the reference adds up otherwise."""
    near = ("x", "added", "pre_weight")
    different = [name for name, want in expected.items() if name not in near and not torch.equal(got[name], want)]
    assert different == []
    for name in near:
        assert got[name].dtype == expected[name].dtype
        assert_close(got[name], expected[name], 1e-5 if got[name].dtype == torch.float32 else 8e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("time", "state"), [(1, 32), (19, 16), (63, 32)])  # 160 channels of xBC, or 192: whole groups
def test_codes_are_their_slow_twin(time: int, state: int, bits: int) -> None:
    inputs, keep = coded_inputs(time, state=state), keep_of(bits)
    assert_is_the_slow_twin(run_coded(inputs, state, keep), slow_twin(inputs, state, keep))


@pytest.mark.gpu
def test_without_codes_errors_it_is_the_composition() -> None:
    """Numbers that 8 bits hold to a hundredth: the whole gradient, by autograd, is near; nothing to add gives none."""
    inputs = coded_inputs(63, state=32)
    exact = as_float64(inputs)
    x, added, pre_weight, *weights = exact.values()
    total = x + added
    u = torch.nn.functional.rms_norm(total, pre_weight.shape, pre_weight, 1e-5)
    out = mamba_mixer(u, *weights, state_dim=32, eps=1e-5, chunk_size=64, backend="reference")
    cotangent = [c.double() for c in cotangents(inputs, torch.float32)]
    expected = torch.autograd.grad((total, out), list(exact.values()), cotangent)
    got = run_coded(inputs, 32, keep_of(8))
    for name, want in zip(inputs, expected, strict=True):
        error = (got[name].double() - want).norm() / want.norm()
        assert 0 < error < (0.04 if want.ndim > 1 else 0.1), name
    from eco_llm.ops.mamba_mixer.coded import coded_mixer

    alone, _ = coded_mixer(
        inputs["x"], None, *[inputs["pre_weight"], 1e-5, *list(inputs.values())[3:]],
        state_dim=32, eps=1e-5, chunk_size=64, keep=keep_of(8),
    )  # fmt: skip
    assert torch.equal(alone, inputs["x"])
    (d_x,) = torch.autograd.grad(alone.sum(), inputs["x"])
    assert torch.equal(d_x, torch.ones_like(d_x))


@pytest.mark.gpu
@only_gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("time", "heads"), [(63, 24), (1000, 6)])
def test_codes_at_default_widths_in_bf16(time: int, heads: int, weight_dtype: torch.dtype, bits: int) -> None:
    shape = {"heads": heads, "width": 64, "state": 128, "model": 256}
    inputs = coded_inputs(time, torch.bfloat16, **shape, weight_dtype=weight_dtype)
    keep = keep_of(bits)
    got = run_coded(inputs, 128, keep, 128, torch.bfloat16)
    assert_is_the_slow_twin(got, slow_twin(inputs, 128, keep, 128, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_all_that_is_kept(bits: int) -> None:
    from eco_llm.ops.mamba_mixer.coded import coded_mixer

    inputs = coded_inputs(63, state=32)
    x, added, pre_weight, *weights = inputs.values()
    _, out = coded_mixer(
        x, added, pre_weight, 1e-5, *weights, state_dim=32, eps=1e-5, chunk_size=64, keep=keep_of(bits)
    )
    kept = [t for t in out.grad_fn.saved_tensors if t.data_ptr() not in {x.data_ptr() for x in inputs.values()}]
    codes, rows = torch.int8 if bits == 8 else torch.uint8, 2 * 63

    def coded(width: int) -> list[tuple[torch.dtype, int]]:
        return [(codes, rows * width * bits // 8), (torch.bfloat16, rows * width // 64)]

    assert [(t.dtype, t.numel()) for t in kept if t.numel()] == [
        *coded(64), (torch.float32, rows), *coded(128), *coded(128), *coded(192), (torch.float32, rows * 2),
        (torch.float32, 2 * 2 * 2 * 64),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("state", "passes"), [(32, 0), (16, 1)])  # 192 channels of xBC are whole groups, 160 are not
def test_only_a_convolution_without_whole_groups_needs_a_pass_for_codes(
    state: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eco_llm.ops.mamba_mixer import triton as launchers
    from eco_llm.ops.mamba_mixer.coded import coded_mixer

    quantized: list[torch.Size] = []

    def counted(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        quantized.append(x.shape)
        return quantize_triton(x, *arguments)

    quantize_triton = launchers.quantize_triton
    monkeypatch.setattr(launchers, "quantize_triton", counted)
    x, added, pre_weight, *weights = coded_inputs(5, state=state).values()
    coded_mixer(x, added, pre_weight, 1e-5, *weights, state_dim=state, eps=1e-5, chunk_size=64, keep=keep_of(8))
    assert quantized == [(2, 5, 160)] * passes


def test_what_cannot_be_coded_is_said() -> None:
    x, conv = torch.empty(2, 5, 64), torch.empty(192, 4)
    assert not writes_codes(x, conv, 128, 64, 32, Keep(8, torch.tensor(0)))  # no kernels on a CPU


@pytest.mark.gpu
def test_which_shapes_are_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "uses_triton", lambda x: True)
    x, conv = torch.empty(2, 5, 64, device=DEVICE), torch.empty(192, 4, device=DEVICE)
    assert writes_codes(x, conv, 128, 64, 32, keep_of(8))
    for other in (x[..., :40], x.double(), torch.empty(1, 1, 8256, device=DEVICE)):
        assert not writes_codes(other, conv, 128, 64, 32, keep_of(8))
    assert not writes_codes(x, conv, 128, 64, 24, keep_of(8))
    with torch.autocast(DEVICE, torch.float16):
        assert not writes_codes(x, conv, 128, 64, 32, keep_of(8))
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        writes_codes(x, conv, 128, 64, 32, keep_of(5))
