"""Every form of SSD against the time-step loop, and the loop against the closed form; outputs, state, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eco_llm.ops.ssd import choose_chunk, ssd, ssd_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Largest relative error of any output or gradient, as a share of its largest element. bf16: 8 bits,
# rounded twice on the way; dA sums such errors over all tokens.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def make_inputs(
    time: int,
    *,
    groups: int = 1,
    heads: int = 4,
    width: int = 8,
    state: int = 16,
    dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Leaves with gradients; the decay path and the state are at least float32, as the op's contract says."""
    generator = torch.Generator().manual_seed(time + groups)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(2, time, heads, width).to(dtype),
        "dt": torch.rand(2, time, heads, generator=generator, dtype=torch.float64).to(wide),
        "A": -torch.linspace(0.05, 4.0, heads, dtype=torch.float64).to(wide),
        "B": normal(2, time, groups, state).to(dtype),
        "C": normal(2, time, groups, state).to(dtype),
        "D": normal(heads).to(wide),
        "initial_state": normal(2, heads, width, state).to(wide),
    }
    return {name: value.to(device).requires_grad_() for name, value in values.items()}


def run(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input for a fixed random cotangent."""
    arguments = dict(inputs)
    y, state = ssd(**arguments, return_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in (y, state))
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y, "state": state} | {f"d{n}": g for n, g in zip(inputs, grads, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float = 1e-30) -> None:
    """Errors are relative to a tensor's largest element, or to `floor` if that is larger."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got, want = actual[name].detach().double(), want.detach().double()
        assert torch.isfinite(got).all(), name
        error = (got - want).abs().max() / want.abs().max().clamp(min=floor)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def as_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [16, 64, 128])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_chunked_equals_recurrent(time: int, chunk: int, groups: int, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(time, groups=groups, dtype=dtype, device=device)
    expected = run(as_float64(inputs), chunk_size=chunk, backend="recurrent")
    actual = run(inputs, chunk_size=chunk, backend="chunked")
    assert actual["y"].dtype == dtype
    assert actual["state"].dtype == torch.promote_types(dtype, torch.float32)
    assert_same(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_recurrent_equals_closed_form(dtype: torch.dtype, device: str) -> None:
    """y_l = Σ_{s ≤ l} exp(Σ_{s < k ≤ l} dt_k A) (C_l·B_s) dt_s x_s + decay·h_0 + D x_l, written out with no state."""
    time = 23
    inputs = make_inputs(time, groups=2, dtype=dtype, device=device)
    i = {name: value.repeat_interleave(2, 2) if name in "BC" else value for name, value in as_float64(inputs).items()}
    log_decay = i["dt"] * i["A"]
    y = torch.zeros_like(i["x"])
    for end in range(time):
        for start in range(end + 1):
            decay = log_decay[:, start + 1 : end + 1].sum(1).exp()
            score = (i["C"][:, end] * i["B"][:, start]).sum(-1) * decay * i["dt"][:, start]
            y[:, end] += score[..., None] * i["x"][:, start]
        carried = torch.einsum("bhpn,bhn->bhp", i["initial_state"], i["C"][:, end])
        y[:, end] += carried * log_decay[:, : end + 1].sum(1).exp()[..., None] + i["D"][:, None] * i["x"][:, end]
    assert_same({"y": run(inputs, chunk_size=8, backend="recurrent")["y"]}, {"y": y}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_equal_chunked(dtype: torch.dtype) -> None:
    inputs = {name: value.detach() for name, value in make_inputs(65, groups=2, dtype=dtype).items()}
    y, final = ssd(**inputs, chunk_size=16, return_final_state=True)
    state, ys = inputs["initial_state"], []
    for t in range(65):
        token = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        y_t, state = ssd_step(state, A=inputs["A"], D=inputs["D"], **token)
        ys.append(y_t)
    assert_same({"y": torch.stack(ys, 1), "state": state}, {"y": y, "state": final}, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["everywhere", "then-mild"])
def test_strong_decay_stays_finite_and_right(dtype: torch.dtype, mixed: bool, device: str) -> None:
    """dt·A = −50 a token: above the diagonal exp overflows, so a mask applied after it would give NaN gradients."""
    inputs = make_inputs(150, dtype=dtype, device=device)
    with torch.no_grad():
        inputs["A"].fill_(-50.0)
        inputs["dt"].fill_(1.0)
        if mixed:
            inputs["dt"][:, 40:] = 1e-3
    # Inside a chunk, cumulative sums near −2000 leave 2⁻¹³ in the exponent of float32 (README.md).
    tolerance = max(TOLERANCE[dtype], 1e-3 if mixed and dtype != torch.float64 else 0.0)
    for chunk in (16, 64, 128):
        expected = run(as_float64(inputs), chunk_size=chunk, backend="recurrent")
        # Gradients through a decay of e⁻⁵⁰ are themselves 10⁻²²: compared with the others, which are near 1.
        assert_same(run(inputs, chunk_size=chunk, backend="chunked"), expected, tolerance, floor=1.0)


def test_long_mild_sequence_after_strong_decay_keeps_its_precision() -> None:
    """Sums over chunk boundaries reach −10⁶ here; in float32 their differences would be off by 0.06."""
    inputs = make_inputs(640, dtype=torch.float32)
    with torch.no_grad():
        inputs["A"].fill_(-1.0)
        inputs["dt"][:, :64] = 16_384.0
        inputs["dt"][:, 64:] = 1e-3
    expected = run(as_float64(inputs), chunk_size=64, backend="recurrent")
    actual = run(inputs, chunk_size=64, backend="chunked")
    for name in ("y", "state", "dC", "dinitial_state"):
        assert_same({name: actual[name]}, {name: expected[name]}, 1e-4)


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_state_carries_over_a_cut(backend: str) -> None:
    inputs = {name: value.detach() for name, value in make_inputs(100, dtype=torch.float64).items()}
    whole, final = ssd(**inputs, chunk_size=16, return_final_state=True, backend=backend)
    parts, state = [], inputs["initial_state"]
    for cut in (slice(0, 37), slice(37, 100)):
        part = inputs | {name: inputs[name][:, cut] for name in ("x", "dt", "B", "C")} | {"initial_state": state}
        y, state = ssd(**part, chunk_size=16, return_final_state=True, backend=backend)
        parts.append(y)
    assert_same({"y": torch.cat(parts, 1), "state": state}, {"y": whole, "state": final}, 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_gradients_by_finite_differences(backend: str) -> None:
    inputs = make_inputs(7, groups=2, heads=2, width=2, state=3, dtype=torch.float64)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        arguments = dict(zip(NAMES, values, strict=True))
        return ssd(**arguments, chunk_size=3, return_final_state=True, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in NAMES))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_autocast_does_not_reach_the_inside(backend: str, device: str) -> None:
    inputs = make_inputs(50, dtype=torch.float32, device=device)
    expected = ssd(**inputs, chunk_size=16, return_final_state=True, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        actual = ssd(**inputs, chunk_size=16, return_final_state=True, backend=backend)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


def test_absent_skip_and_state_mean_zero() -> None:
    inputs = {name: value.detach() for name, value in make_inputs(40, dtype=torch.float64).items()}
    zeroed = inputs | {name: torch.zeros_like(inputs[name]) for name in ("D", "initial_state")}
    bare = {name: value for name, value in inputs.items() if name not in ("D", "initial_state")}
    for backend in ("chunked", "recurrent"):
        got = ssd(**bare, chunk_size=16, backend=backend)
        torch.testing.assert_close(got, ssd(**zeroed, chunk_size=16, backend=backend), rtol=1e-12, atol=1e-12)


def test_mistakes_are_refused() -> None:
    inputs = {name: value.detach() for name, value in make_inputs(8, dtype=torch.float32).items()}
    with pytest.raises(ValueError, match="unknown SSD backend 'triton2'"):
        ssd(**inputs, chunk_size=4, backend="triton2")
    with pytest.raises(ValueError, match="chunk_size"):
        ssd(**inputs, chunk_size=0)
    with pytest.raises(ValueError, match="dt must have shape"):  # broadcasting would accept it
        ssd(**inputs | {"dt": inputs["dt"][:, :1]}, chunk_size=4)
    with pytest.raises(ValueError, match="heads divisible by groups"):
        ssd(**inputs | {name: inputs[name].expand(-1, -1, 3, -1) for name in "BC"}, chunk_size=4)


def test_tile_policy() -> None:
    assert [choose_chunk(t) for t in (1, 512, 1023)] == [64, 64, 64]
    assert all(choose_chunk(t) in (64, 128, 256) for t in (1024, 4096, 65_536))
    assert choose_chunk(512, 128) == 128
    assert choose_chunk(4096, 256) == 256
    for bad in ((0, "auto"), (8, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            choose_chunk(*bad)
