"""The activation quantizers against a loop in plain Python, and the kernels against the reference, bit for bit.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernel_cases import INTERPRETED, KERNEL_DEVICE, compile_instead_of_running, normal
from torch import Tensor

from eco_llm.ops import quantize as quantizers
from eco_llm.ops.quantize import Quantized, dequantize, quantization_error, quantize
from eco_llm.ops.quantize.reference import LARGEST, SMALLEST_SCALE, random_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES: list[tuple[int, ...]] = [(), (1,), (63,), (64,), (65,), (1000, 3), (2, 1, 5, 41), (4, 1100), (0,), (3, 0)]
SHARED_MEMORY_OF_CONSUMER_CARDS = 101_376  # bytes a program may have on compute capability 8.6 and 8.9
only_gpu = pytest.mark.skipif(INTERPRETED, reason="about the GPU itself, or too large for the interpreter")


def at(step: int, device: str = "cpu", dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(step, dtype=dtype, device=device)


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers whose size varies a thousandfold from one to another."""
    count = math.prod(shape)
    magnitudes = 10 ** normal(count, seed=seed + 1, device=device)
    return (normal(count, seed=seed, device=device) * magnitudes).to(dtype).view(shape)


# ---- the slow twin: one element at a time ---------------------------------------------------------------------------


def folded(x: int, prime: int) -> int:
    product = x * prime
    return (product >> 32) ^ (product & 0xFFFFFFFF)


def number_at(index: int, step: int, stream: int) -> int:
    """The 15-bit random number of an element, in Python's integers."""
    p0, p1, p2, p3 = 2654435761, 2246822519, 3266489917, 668265263
    keys = []
    for key in (0x243F6A88, 0x85A308D3):
        key = folded(folded(key ^ stream, p0), p1)
        key = folded(folded(key ^ (step & 0xFFFFFFFF), p2) ^ ((step >> 32) & 0xFFFFFFFF), p3)
        keys.append(key)
    mixed = folded(folded(index // 4 ^ keys[0], p0) ^ keys[1], p1)
    word = folded(mixed, p2 if index % 4 < 2 else p3)
    return word >> 1 & 0x7FFF if index % 2 == 0 else word >> 17


def slowly(x: Tensor, bits: int, step: int, stream: int) -> tuple[list[int], list[float], list[float]]:
    """Codes, scales and decoded values, group by group and element by element."""
    single = np.float32
    flat = x.double().flatten().tolist()
    codes: list[int] = []
    scales: list[float] = []
    decoded: list[float] = []
    for first in range(0, len(flat), 64):
        group = flat[first : first + 64]
        if not all(math.isfinite(v) for v in group):
            scales.append(math.nan)
            codes += [0] * len(group)
            decoded += [math.nan] * len(group)
            continue
        bound = single(max(abs(v) for v in group)) * single((1 + 2**-20) / LARGEST[bits])
        bound = max(float(bound), SMALLEST_SCALE)
        power = 2.0 ** (math.frexp(bound)[1] - 8)
        scale = math.ceil(bound / power) * power  # 8 significant bits, rounded up
        inverse = single(32768) / single(scale)
        for index, value in enumerate(group, first):
            fixed = round(float(single(value) * inverse))  # Python rounds ties to even
            code = (fixed + number_at(index, step, stream)) // 32768
            largest = torch.finfo(x.dtype).max
            codes.append(code)
            decoded.append(float(torch.tensor(min(max(code * scale, -largest), largest), dtype=x.dtype)))
        scales.append(scale)
    return codes, scales, decoded


def signed(q: Quantized) -> list[int]:
    """Codes as signed numbers, one an element."""
    if q.bits == 8:
        return q.codes.tolist()
    nibbles = [nibble - 8 for byte in q.codes.tolist() for nibble in (byte % 16, byte // 16)]
    return nibbles[: math.prod(q.shape)]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same_bits(actual: Quantized, expected: Quantized) -> None:
    """Codes, scales and the rest are equal; codes of a group that is not finite mean nothing."""
    assert actual[2:] == expected[2:]
    assert actual.codes.dtype == expected.codes.dtype
    assert same(actual.scales, expected.scales)
    means = ~expected.scales.isnan().repeat_interleave(64 * expected.bits // 8)[: expected.codes.numel()]
    assert torch.equal(actual.codes[means], expected.codes[means])


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_loop_over_groups(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    x = sample(*shape, dtype=dtype).clamp(-6e4, 6e4)
    q = quantize(x, bits, step=at(7), stream=3)
    codes, scales, decoded = slowly(x, bits, 7, 3)
    assert signed(q) == codes
    assert q.scales.tolist() == scales
    assert q.scales.dtype == torch.bfloat16
    y = dequantize(q)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, dtype, True)
    assert y.flatten().tolist() == decoded
    error, squares = quantization_error(x, bits, at(7), 3)
    assert (error.dtype, error.shape, squares.dtype, squares.shape) == (torch.float32, (), torch.float32, ())
    wide = x.double()
    assert float(error) == pytest.approx(float((y.double() - wide).square().sum()), rel=1e-5)
    assert float(squares) == pytest.approx(float(wide.square().sum()), rel=1e-5)


def test_a_step_of_newton_divides_as_the_kernel_needs() -> None:
    """By every scale, from any reciprocal within 8 units of the right one; exponents change nothing."""

    def nearest(x: Fraction) -> Fraction:
        unit = Fraction(2) ** (math.floor(math.log2(x)) - 23)
        return round(x / unit) * unit  # ties to even, of which there are none but exact ones

    for significand in range(128, 256):
        scale = Fraction(significand)
        right = nearest(1 / scale)
        unit = Fraction(2) ** (math.floor(math.log2(right)) - 23)
        for ulps in range(-8, 9):
            r = right + ulps * unit
            error = 1 - scale * r
            assert error == 0 or nearest(abs(error)) == abs(error)  # a float32: the first multiply-add is exact
            assert nearest(r + r * error) == right


def test_an_even_element_lies_in_the_lower_nibble() -> None:
    x = torch.tensor([7.0, -7.0, 0.0, 3.0, -7.0]) * 2**20 / (2**20 + 1)  # whole codes, and a scale of 1
    x[1] = -x[0]
    q = quantize(x, 4, step=at(0), stream=0)
    assert q.scales.tolist() == [1.0]
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (3,)
    low, high = q.codes % 16, q.codes // 16
    assert (int(low[1]), int(high[2])) == (8, 8)  # zero, and what fills the last byte
    assert int(low[0]) in (14, 15)
    assert int(high[0]) in (1, 2)
    assert int(high[1]) in (10, 11)
    assert int(low[2]) in (1, 2)


@pytest.mark.parametrize("step", [0, 1, -1, 2**31 - 1, 2**40 + 5])
def test_numbers_are_those_of_plain_integers(step: int) -> None:
    for stream in (0, 1, 2**31 - 1):
        drawn = random_numbers(13, at(step), stream).tolist()
        assert drawn[:13] == [number_at(i, step, stream) for i in range(13)]
    if abs(step) < 2**31:
        assert torch.equal(random_numbers(13, at(step, dtype=torch.int32), 1), random_numbers(13, at(step), 1))


def test_numbers_are_even_and_independent() -> None:
    """Of neighbours, steps and streams; sums that are normal with mean 0 and variance 1 if the numbers are."""
    n = 1 << 16
    drawn = {
        (step, stream): random_numbers(n, at(step), stream)
        for step, stream in [(s, 0) for s in range(12)] + [(5, s) for s in (1, 2, 3)] + [(2**32, 0), (2**32, 1)]
    }
    centred = torch.stack([(d.double() + 0.5) / 32768 - 0.5 for d in drawn.values()]) * math.sqrt(12)
    assert all(int(d.min()) >= 0 and int(d.max()) <= 32767 for d in drawn.values())
    scores = [centred.mean(1) * math.sqrt(n)]
    scores += [
        (centred[:, lag:] * centred[:, :-lag]).mean(1) * math.sqrt(n - lag) for lag in (1, 2, 3, 4, 5, 8, 64, 768)
    ]
    across = centred @ centred.T / math.sqrt(n)
    scores.append(across[~torch.eye(len(drawn), dtype=torch.bool)])
    for numbers in drawn.values():
        for shift in (0, 7):  # upper and lower bits
            counts = torch.bincount((numbers >> shift) & 255, minlength=256).double()
            scores.append((((counts - n / 256) ** 2 / (n / 256)).sum() - 255)[None] / math.sqrt(510))
    every = torch.cat(scores)
    assert every.abs().max() < 5
    assert 0.8 < every.square().mean() < 1.2


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mean_over_steps_is_x(bits: int) -> None:
    """Its error falls as 1 / sqrt(steps), and is as large as that of rounding by a fair chance."""
    x = sample(1024)
    sums = torch.zeros(1024, dtype=torch.float64)
    done = 0
    for steps in (16, 1024):
        for step in range(done, steps):
            sums += dequantize(quantize(x, bits, step=at(step), stream=9)).double()
        done = steps
        scale = quantize(x, bits, step=at(0), stream=9).scales.double().repeat_interleave(64)
        chance = (x.double() / scale) % 1
        deviation = scale * (chance * (1 - chance)).sqrt() / math.sqrt(steps)
        likely = deviation > scale / math.sqrt(steps) / 20  # near a whole code a few draws say little
        score = ((sums / steps - x.double()) / deviation)[likely]
        assert likely.sum() > 200
        assert score.square().mean() == pytest.approx(1.0, abs=6 * math.sqrt(2 / float(likely.sum())))
        assert score.mean().abs() < 6 / math.sqrt(float(likely.sum()))
        assert ((sums / steps - x.double()).abs() <= scale).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_stay_within_one_step_of_the_code(dtype: torch.dtype, bits: int) -> None:
    x = sample(40, 100, dtype=dtype).clamp(-6e4, 6e4)
    q = quantize(x, bits, step=at(1), stream=0)
    scale = q.scales.double().repeat_interleave(64)[: x.numel()].view(x.shape)
    y = dequantize(q).double()
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * y.abs().clamp_min(info.smallest_normal)  # of the result to its type
    assert ((y - x.double()).abs() <= scale + rounding).all()
    # The scale is a bfloat16 number above, and less than 1% above, what the largest number needs.
    largest = torch.nn.functional.pad(x.double().flatten().abs(), (0, -x.numel() % 64)).view(-1, 64).amax(1)
    assert (q.scales.double() * LARGEST[bits] >= largest).all()
    assert (q.scales.double() * LARGEST[bits] <= largest * 1.009).all()


def test_real_bytes_against_bfloat16() -> None:
    x = torch.zeros(4, 512, 3352, dtype=torch.bfloat16)
    for bits, least in ((8, 1.9), (4, 3.5)):
        q = quantize(x, bits, step=at(0), stream=0)
        held = q.codes.untyped_storage().nbytes() + q.scales.untyped_storage().nbytes()
        assert q.nbytes == held
        assert x.nbytes / held >= least
        assert held == x.numel() * bits // 8 + x.numel() // 32


def test_same_arguments_give_the_same_bits_and_others_do_not() -> None:
    x = sample(1000)
    q = quantize(x, 8, step=at(5), stream=1)
    assert_same_bits(quantize(x, 8, step=at(5), stream=1), q)
    for other in (
        quantize(x, 8, step=at(6), stream=1),
        quantize(x, 8, step=at(5), stream=2),
        quantize(x, 8, step=at(5 + 2**32), stream=1),
    ):
        assert torch.equal(other.scales, q.scales)
        assert 0.1 < (other.codes != q.codes).double().mean() < 0.5


def test_gradients_are_left_out() -> None:
    x = sample(70).requires_grad_()
    q = quantize(x, 4, step=at(0), stream=0)
    y = dequantize(q)
    error, squares = quantization_error(x, 4, at(0), 0)
    assert not any(t.requires_grad for t in (q.codes, q.scales, y, error, squares))
    assert y.grad_fn is None


def test_as_saved_tensor_hooks() -> None:
    """What they are for: the gradient of a product through x in 8 bits."""
    x, weight = sample(5, 70).requires_grad_(), sample(70, 3, seed=4).requires_grad_()
    packed: list[Quantized] = []

    def pack(t: Tensor) -> Quantized | Tensor:
        if t.shape != x.shape:
            return t
        packed.append(quantize(t, 8, step=at(0), stream=0))
        return packed[-1]

    def unpack(kept: Quantized | Tensor) -> Tensor:
        return dequantize(kept) if isinstance(kept, Quantized) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = x @ weight
    y.sum().backward()
    assert len(packed) == 1
    torch.testing.assert_close(weight.grad, dequantize(packed[0]).sum(0)[:, None].expand(70, 3))


def test_mistakes_are_refused() -> None:
    x, step = sample(10), at(0)
    for change, message in (
        ({"x": x.double()}, "float64"),
        ({"x": x.int()}, "int32"),
        ({"bits": 2}, "8 or 4 bits, not 2"),
        ({"step": step.float()}, "step must be a 0-dim"),
        ({"step": step[None]}, "step must be a 0-dim"),
        ({"step": step.to("meta")}, "step must be a 0-dim"),
        ({"stream": -1}, "stream"),
        ({"stream": 2**31}, "stream"),
        ({"x": torch.empty(2**34, device="meta", dtype=torch.bfloat16), "step": step.to("meta")}, "2\\^34"),
        ({"backend": "cuda"}, "unknown quantizer backend"),
    ):
        arguments = {"x": x, "bits": 8, "step": step, "stream": 0, "backend": "auto"} | change
        with pytest.raises(ValueError, match=message):
            quantize(**arguments)
        with pytest.raises(ValueError, match=message):
            quantization_error(**arguments)
    with pytest.raises(ValueError, match="unknown quantizer backend"):
        dequantize(quantize(x, 8, step=step, stream=0), backend="cuda")  # type: ignore[arg-type]


def test_eager_calls_on_the_cpu_do_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from eco_llm.ops.quantize import dequantize, quantization_error, quantize;"
        "x, step = torch.ones(70), torch.tensor(0); dequantize(quantize(x, 8, step=step, stream=0));"
        "quantization_error(x, 4, step, 0); assert not {'torch._dynamo', 'torch._inductor'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- either backend: the kernels' runs need a GPU or the interpreter ------------------------------------------------

BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", KERNEL_DEVICE, id="triton", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_extremes(backend: str, device: str, dtype: torch.dtype, bits: int) -> None:
    info = torch.finfo(dtype)
    x = torch.zeros(10, 64, dtype=dtype, device=device)
    x[0, 3:6] = torch.tensor([info.max, -info.max, info.max / 2])  # what rounds up would be infinite
    x[1] = info.max
    x[2, 1:] = info.smallest_normal / 3  # denormal
    x[3, :] = -info.smallest_normal
    x[5, 7] = math.nan
    x[6, 0], x[6, 1] = math.inf, 1.0
    x[7, 63] = -math.inf
    x[8, 5] = 1e-3
    x[9] = -0.0
    many = [quantize(x, bits, step=at(s, device), stream=0, backend=backend) for s in range(8)]
    for q in many:
        y = dequantize(q, backend=backend)
        broken = torch.zeros(10, dtype=torch.bool, device=device)
        broken[5:8] = True
        assert torch.equal(y.isnan().all(1), broken)
        assert torch.equal(y.isnan().any(1), broken)
        assert torch.equal(q.scales.isnan(), broken)
        good, kept = y[~broken].double(), x[~broken].double()
        assert good.isfinite().all()
        assert not good[4].any()
        assert not good[-1].any()
        scale = q.scales[~broken].double()[:, None]
        rounding = info.eps / 2 * good.abs().clamp_min(info.smallest_normal)  # of the result to its type
        assert ((good - kept).abs() <= scale + rounding).all()
        assert good[0, 3] >= info.max * 0.8
        assert not good[0, 6:].any()  # zero among others stays zero
        error, squares = quantization_error(x, bits, at(0, device), 0, backend=backend)
        assert error.isnan()
        assert not squares.isfinite()


@pytest.mark.parametrize("step", ["eager", "aot_eager"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_compiled(backend: str, device: str, bits: int, step: str) -> None:
    x = normal(3, 50, seed=0, dtype=torch.bfloat16, device=device).requires_grad_()

    def run(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = quantize(x * 1, bits, step=step, stream=2, backend=backend)
        error, _ = quantization_error(x, bits, step, 2, backend=backend)
        return q.codes, q.scales, dequantize(q, backend=backend), error

    compiled = torch.compile(run, backend=step, fullgraph=True)
    for number in (0, 1):
        for a, b in zip(compiled(x, at(number, device)), run(x, at(number, device)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_operators_keep_the_rules(backend: str, device: str, bits: int) -> None:
    x = normal(3, 50, seed=0, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    triton = backend == "triton"
    step = at(3, device)
    torch.library.opcheck(quantizers._quantize_op.overload, (x[:, :41], bits, step, 1, triton), test_utils=checks)
    torch.library.opcheck(quantizers._error_op.overload, (x, bits, step, 1, triton), test_utils=checks)
    q = quantize(x, bits, step=step, stream=1, backend=backend)
    arguments = (q.codes, q.scales, list(q.shape), q.dtype, bits, triton)
    torch.library.opcheck(quantizers._dequantize_op.overload, arguments, test_utils=checks)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def both(x: Tensor, bits: int, step: int = 11, stream: int = 5) -> tuple[Quantized, Quantized]:
    """By the kernel and by the reference, on the kernel's device."""
    kernel, reference = (
        quantize(x, bits, step=at(step, KERNEL_DEVICE), stream=stream, backend=b) for b in ("triton", "reference")
    )
    return kernel, reference


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((33, 63, 768), marks=only_gpu)], ids=str)
def test_kernels_give_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    x = sample(*shape, dtype=dtype, device=KERNEL_DEVICE)
    if x.numel() > 4000:
        x.view(-1)[3777] = math.nan
    kernel, reference = both(x, bits)
    assert_same_bits(kernel, reference)
    y = dequantize(reference, backend="triton")
    assert y.is_contiguous()
    assert same(y, dequantize(reference, backend="reference"))
    step = at(11, KERNEL_DEVICE)
    kernels = quantization_error(x, bits, step, 5, backend="triton")
    for a, b in zip(kernels, quantization_error(x, bits, step, 5, backend="reference"), strict=True):
        assert (a.dtype, a.shape) == (torch.float32, ())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True)
    again = quantization_error(x, bits, step, 5, backend="triton")
    assert all(same(a, b) for a, b in zip(kernels, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("step", [0, -1, 2**31 - 1, 2**40 + 5])
def test_kernels_take_any_step_and_stream(step: int) -> None:
    x = sample(300, device=KERNEL_DEVICE)
    for stream in (0, 2**31 - 1):
        assert_same_bits(*both(x, 8, step, stream))
    if abs(step) < 2**31:
        short = quantize(x, 8, step=at(step, KERNEL_DEVICE, torch.int32), stream=0, backend="triton")
        assert_same_bits(short, both(x, 8, step, 0)[1])


def strided(name: str, dtype: torch.dtype) -> Tensor:
    """A tensor that is not contiguous, amid NaN."""
    wide = torch.full((3, 7, 300), math.nan, dtype=dtype, device=KERNEL_DEVICE)
    values = sample(3, 7, 300, dtype=dtype, device=KERNEL_DEVICE).clamp(-6e4, 6e4)
    part = {
        "wide slice": lambda t: t[..., :256],
        "slice of whole groups": lambda t: t[..., 8:136],
        "odd slice": lambda t: t[..., 3:44],
        "narrow slice": lambda t: t[..., 299:],
        "row": lambda t: t[1, 2, 5:200],
        "two axes": lambda t: t[:, 1:5, :64],
        "two odd axes": lambda t: t[:, 1:5, :37],
        "swapped": lambda t: t.transpose(0, 1),
        "heads": lambda t: t.unflatten(-1, (5, 60)).transpose(1, 2),
        "heads of whole groups": lambda t: t[..., :256].unflatten(-1, (4, 64)).transpose(1, 2),
        "heads of a slice": lambda t: t[:2, :5, :240].unflatten(-1, (4, 60)).transpose(1, 2)[..., :50],
        "expanded": lambda t: t[:, :1, :70].expand(3, 5, 70),
        "five axes": lambda t: t.unflatten(-1, (3, 10, 10)).permute(3, 1, 0, 2, 4),
        "channels first": lambda t: t.transpose(1, 2),
        "every other": lambda t: t[..., ::2],
    }[name]
    part(wide).copy_(part(values))
    return part(wide)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["wide slice", "slice of whole groups", "odd slice", "narrow slice", "row", "two axes", "two odd axes", "swapped",
     "heads", "heads of whole groups", "heads of a slice", "expanded", "five axes", "channels first", "every other"],
)  # fmt: skip
def test_kernels_take_any_strides(name: str, dtype: torch.dtype) -> None:
    if name == "expanded":
        x = sample(3, 1, 70, dtype=dtype, device=KERNEL_DEVICE).clamp(-6e4, 6e4).expand(3, 5, 70)
    else:
        x = strided(name, dtype)
        assert not x.is_contiguous() or name == "row"
    plain = x.contiguous()
    step = at(2, KERNEL_DEVICE)
    for bits in (8, 4):
        q = quantize(x, bits, step=step, stream=1, backend="triton")
        assert_same_bits(q, quantize(plain, bits, step=step, stream=1, backend="triton"))
        assert_same_bits(q, quantize(x, bits, step=step, stream=1, backend="reference"))
        assert q.shape == x.shape
        pair = (quantization_error(t, bits, step, 1, backend="triton") for t in (x, plain))
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.gpu
@only_gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_cuda_graph_draws_anew_with_every_step(bits: int) -> None:
    x = normal(4, 512, 968, seed=0, dtype=torch.bfloat16)[..., :768]
    step = at(0, "cuda")

    def work() -> tuple[Quantized, Tensor, Tensor]:
        q = quantize(x, bits, step=step, stream=4)
        return q, dequantize(q), quantization_error(x, bits, step, 4)[0]

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, y, error = work()
    seen = []
    for number in (0, 1, 2):
        step.fill_(number)
        graph.replay()
        expected = quantize(x, bits, step=at(number, "cuda"), stream=4, backend="reference")
        assert_same_bits(q, expected)
        assert torch.equal(y, dequantize(expected, backend="reference"))
        torch.testing.assert_close(error, (y.float() - x.float()).square().sum(), rtol=1e-5, atol=0)
        seen.append(q.codes.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.gpu
@only_gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_inductor_keeps_the_bits(bits: int) -> None:
    x = normal(33, 200, seed=0, dtype=torch.bfloat16)

    def run(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = quantize(x * 2, bits, step=step, stream=2)
        return q.codes, q.scales, dequantize(q) + 1

    step = at(3, "cuda")
    for a, b in zip(torch.compile(run, fullgraph=True)(x, step), run(x, step), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@only_gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_offsets_beyond_32_bits(bits: int) -> None:
    """The last rows of 4.3 GB decode to what they were."""
    rows, width, last = 2**31 // 1024 + 1000, 1024, 200
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-last:] = normal(last, width, seed=0)
    q = quantize(x, bits, step=at(0, "cuda"), stream=0)
    y = dequantize(q)
    tail, kept = y[-last // 2 :].float(), x[-last // 2 :].float()
    scale = q.scales.float()[-tail.numel() // 64 :].repeat_interleave(64).view(tail.shape)
    assert kept.any(1).all()
    assert ((tail - kept).abs() <= scale * 1.5).all()
    assert not y[: rows - 4 * last].any()
    error, squares = quantization_error(x, bits, at(0, "cuda"), 0)
    expected = (y[-4 * last :].double() - x[-4 * last :].double()).square().sum()
    torch.testing.assert_close(error.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(squares.double(), x[-4 * last :].double().square().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_code_is_read_as_what_it_is(backend: str, device: str, dtype: torch.dtype, bits: int) -> None:
    """All bytes at once, beside scales from the smallest to what overflows: code · scale, rounded once."""
    tiny = 2.0**-112
    for scale in (tiny, 2.0**-20 * 1.5, 1.0, 129 / 128, 3.0e4, 2.0**120 * 1.9921875, math.nan):
        every = torch.arange(256, device=device).to(torch.uint8)
        codes = every.view(torch.int8) if bits == 8 else every
        signed_codes = codes.double() if bits == 8 else torch.stack((every % 16, every // 16), dim=1).flatten() - 8.0
        scales = torch.full((codes.numel() * 8 // bits // 64,), scale, dtype=torch.bfloat16, device=device)
        q = Quantized(codes, scales, (signed_codes.numel(),), dtype, bits)
        largest = torch.finfo(dtype).max
        expected = (signed_codes.double() * scales[0].double()).clamp(-largest, largest).to(dtype)
        assert same(dequantize(q, backend=backend), expected)


@pytest.mark.gpu
@only_gpu
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_fits_a_consumer_card_and_moves_16_bytes_at_a_time(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for each card, not run: shared memory, and the width of loads of x at the mixer's shape."""
    from eco_llm.ops.quantize import triton as launchers

    kernels = ("quantize_kernel", "dequantize_kernel", "error_kernel")
    built = compile_instead_of_running(monkeypatch, launchers, *kernels, capability=capability)
    x, step = torch.empty(4, 512, 3352, dtype=dtype), torch.tensor(0)
    for bits in (8, 4):
        codes, scales = launchers.quantize_triton(x, bits, step, 0)
        launchers.dequantize_triton(codes, scales, x.shape, dtype, bits)
        launchers.error_triton(x, bits, step, 0)
    assert len(built) == 6
    for name, compiled in built:
        ptx = compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_MEMORY_OF_CONSUMER_CARDS
        # What the source asks for (an exact inverse) is inline; the compiler itself may contract nothing.
        assert "fma.rn.f32" not in re.sub(r"// begin inline asm.*?// end inline asm", "", ptx, flags=re.S)
        wide = "st.global.v4.b32" if name == "dequantize_kernel" else "ld.global.v4.b32"
        assert wide in ptx, name


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("first", "channels"), [(0, 64), (8, 192), (3, 128), (64, 40)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 63), (1, 70)], ids=str)
def test_slices_along_the_last_axis_are_read_where_they_lie(
    shape: tuple[int, int], first: int, channels: int, bits: int
) -> None:
    wide = sample(*shape, 264, seed=5, device=KERNEL_DEVICE, dtype=torch.bfloat16)
    x = wide[..., first : first + channels]
    q = quantize(x, bits, step=at(9, KERNEL_DEVICE), stream=2, backend="triton")
    assert_same_bits(q, quantize(x.contiguous(), bits, step=at(9, KERNEL_DEVICE), stream=2, backend="reference"))
