"""The SSD kernels against the time-step loop in float64; outputs, state, gradients.

They need a GPU (`-m gpu`), or Triton's interpreter (slow, small shapes only): TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_cases import INTERPRETED
from kernel_cases import KERNEL_DEVICE as DEVICE
from test_ssd import as_float64, assert_same, make_inputs, run

from eco_llm.ops.ssd import ssd

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_buffers")]
only_gpu = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter, or about the GPU itself")
# The interpreter cannot multiply bf16 matrices.
# dA is a sum of differences of sums, each of products that three TF32 ones make.
TOLERANCE = {torch.float32: 5e-5, torch.float16 if INTERPRETED else torch.bfloat16: 1.5e-2}
SHARED_MEMORY_OF_CONSUMER_CARDS = 101_376  # bytes a program may have on compute capability 8.6 and 8.9


def assert_as_good_as_chunked(inputs: dict[str, torch.Tensor], chunk: int, floor: float = 1e-30) -> None:
    """Errors against float64 are within the tolerance, or twice those of the same sums in PyTorch ops: where a gradient
    nearly cancels (dA often does), rounding the inputs of every product to bf16 is felt in either.
    """
    dtype = inputs["x"].dtype
    expected = run(as_float64(inputs), chunk_size=64, backend="chunked")  # in float64 the loop's equal, and fast
    plain = run(inputs, chunk_size=64, backend="chunked")
    actual = run(inputs, chunk_size=chunk, backend="triton")
    assert actual["y"].dtype == dtype
    assert actual["state"].dtype == torch.float32
    for name, want in expected.items():
        scale = want.abs().max().clamp(min=floor)
        ours, theirs = ((result[name].double() - want).abs().max() / scale for result in (actual, plain))
        assert torch.isfinite(actual[name]).all(), name
        # dA holds ⟨H, G⟩ of two states that the kernels keep in the type of x, where `chunked` has float32 (README.md).
        allowed = max(TOLERANCE[dtype], 2 * theirs, 5e-2 if name == "dA" and dtype != torch.float32 else 0.0)
        assert ours <= allowed, f"{name}: error {ours:.2e}, chunked {theirs:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [64, 128, 256])
@pytest.mark.parametrize(
    "time",
    [
        1,
        63,
        64,
        pytest.param(200, marks=only_gpu),
        pytest.param(512, marks=only_gpu),
        pytest.param(1000, marks=only_gpu),
    ],
)
def test_equals_float64(time: int, chunk: int, groups: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(time, groups=groups, width=64, state=16, dtype=dtype, device=DEVICE)
    assert_as_good_as_chunked(inputs, chunk)


@only_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("time", [63, 512])
@pytest.mark.parametrize(
    ("heads", "width", "state"), [(24, 64, 128), (12, 128, 128), (5, 64, 64), (3, 192, 32), (2, 64, 16)]
)
def test_every_width_and_state(heads: int, width: int, state: int, time: int, chunk: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(time, heads=heads, width=width, state=state, dtype=dtype, device=DEVICE)
    assert_as_good_as_chunked(inputs, chunk)


def test_a_state_walked_in_parts() -> None:
    """N = 128 and few heads: a program has 64 rows and 16 columns of a state."""
    inputs = make_inputs(70, heads=1, width=64, state=128, dtype=torch.float32, device=DEVICE)
    assert_as_good_as_chunked(inputs, 64)


@only_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", [1e-4, 50.0])
def test_long_sequences(decay: float, dtype: torch.dtype) -> None:
    """16,384 tokens that hardly decay, and that decay at once: no NaN, no drift."""
    inputs = make_inputs(16_384, heads=2, width=64, state=64, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        inputs["A"].fill_(-decay)
    # Gradients through a decay of e⁻⁵⁰ vanish: compared with the others, which are near 1.
    assert_as_good_as_chunked(inputs, 64, floor=1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["everywhere", "then-mild"])
def test_strong_decay_stays_finite_and_right(mixed: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(150, width=64, state=16, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        inputs["A"].fill_(-50.0)
        inputs["dt"].fill_(1.0)
        if mixed:
            inputs["dt"][:, 40:] = 1e-3
    expected = run(as_float64(inputs), chunk_size=64, backend="recurrent")
    tolerance = max(TOLERANCE[dtype], 1e-3 if mixed else 0.0)
    assert_same(run(inputs, chunk_size=128, backend="triton"), expected, tolerance, floor=1.0)


def test_state_carries_over_a_cut() -> None:
    inputs = {
        n: v.detach() for n, v in make_inputs(100, width=64, state=16, dtype=torch.float32, device=DEVICE).items()
    }
    whole, final = ssd(**inputs, chunk_size=64, return_final_state=True, backend="triton")
    parts, state = [], inputs["initial_state"]
    for cut in (slice(0, 37), slice(37, 100)):
        part = inputs | {name: inputs[name][:, cut] for name in ("x", "dt", "B", "C")} | {"initial_state": state}
        y, state = ssd(**part, chunk_size=64, return_final_state=True, backend="triton")
        parts.append(y)
    assert_same({"y": torch.cat(parts, 1), "state": state}, {"y": whole, "state": final}, 1e-5)


def test_absent_skip_and_state_mean_zero() -> None:
    inputs = make_inputs(70, width=64, state=16, dtype=torch.float32, device=DEVICE)
    with torch.no_grad():
        inputs["D"].zero_()
        inputs["initial_state"].zero_()
    bare = {name: value for name, value in inputs.items() if name not in ("D", "initial_state")}
    zeroed = run(inputs, chunk_size=64, backend="triton")
    for name, value in run(bare, chunk_size=64, backend="triton").items():
        assert_same({name: value}, {name: zeroed[name]}, 1e-6)


def test_slices_of_a_wider_tensor_go_in_without_a_copy() -> None:
    heads, width, state = 2, 64, 16
    inputs = make_inputs(70, heads=heads, width=width, state=state, dtype=torch.float32, device=DEVICE)
    packed = torch.cat([inputs[name].detach().flatten(2) for name in "xBC"], -1)
    x, B, C = packed.split((heads * width, state, state), dim=-1)
    views = {"x": x.unflatten(-1, (heads, width)), "B": B.unsqueeze(2), "C": C.unsqueeze(2)}
    sliced = inputs | {name: view.requires_grad_() for name, view in views.items()}
    actual, expected = (run(i, chunk_size=64, backend="triton") for i in (sliced, inputs))
    assert all(torch.equal(actual[name], want) for name, want in expected.items())


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    for change, message in (({"state": 24}, "state size of 24"), ({"width": 32}, "head width of 32")):
        inputs = make_inputs(8, **{"width": 64, "state": 16, **change}, dtype=torch.float32, device=DEVICE)
        with pytest.raises(ValueError, match=message):
            ssd(**inputs, chunk_size=64, backend="triton")
        ssd(**inputs, chunk_size=64, backend="auto")  # which takes the reference
    with pytest.raises(ValueError, match="float64"):
        ssd(**make_inputs(8, width=64, state=16, dtype=torch.float64, device=DEVICE), chunk_size=64, backend="triton")


@only_gpu
def test_runs_repeat_bit_for_bit_without_syncs_and_in_a_graph() -> None:
    inputs = make_inputs(512, heads=24, width=64, state=128, dtype=torch.bfloat16, device=DEVICE)

    def step() -> dict[str, torch.Tensor]:
        y, state = ssd(**inputs, chunk_size=64, return_final_state=True, backend="triton")
        grads = torch.autograd.grad([y, state], list(inputs.values()), [torch.ones_like(y), torch.ones_like(state)])
        return dict(zip(["y", *inputs], [y, *grads], strict=True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd remembers the stream on which it first met a leaf
        expected = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    graph.replay()
    for name, want in expected.items():
        assert torch.equal(again[name], want), name
        assert torch.equal(captured[name], want), name


@only_gpu
def test_auto_is_triton_inside_and_outside_torch_compile() -> None:
    inputs = make_inputs(130, width=64, state=64, dtype=torch.bfloat16, device=DEVICE)
    expected = run(inputs, chunk_size=64, backend="triton")
    compiled = torch.compile(run, dynamic=False)
    for actual in (run(inputs, chunk_size=64), compiled(inputs, chunk_size=64)):
        assert all(torch.equal(actual[name], want) for name, want in expected.items())


@only_gpu
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processors", [132, 24])  # an H200; a small consumer card, whose tiles are the largest
def test_every_kernel_fits_the_shared_memory_of_a_consumer_card(
    dtype: torch.dtype, chunk: int, capability: int, processors: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled for each card, not run: what the launchers ask for at the default profile's shape. Where they limit the
    registers nothing is spilled.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from eco_llm.ops.ssd import triton as launchers
    from eco_llm.ops.ssd import triton_kernels as kernels

    sizes: dict[str, int] = {}
    limited: list[str] = []

    class Spy:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> object:
            def launch(
                *args: object, num_warps: int, num_stages: int = 3, maxnreg: int | None = None, **constants: object
            ) -> None:
                names = self.kernel.arg_names
                signature, constexprs, attributes = {}, dict(constants), {}
                for i, (name, value) in enumerate(zip(names, args, strict=False)):
                    if isinstance(value, torch.Tensor):
                        signature[name] = "*" + {torch.float32: "fp32", torch.bfloat16: "bf16"}[value.dtype]
                        attributes[(i,)] = [["tt.divisibility", 16]]
                    elif value is None:
                        signature[name], constexprs[name] = "constexpr", None
                    else:
                        signature[name] = "i32"
                        if value % 16 == 0:
                            attributes[(i,)] = [["tt.divisibility", 16]]
                signature |= dict.fromkeys(constants, "constexpr")
                source = ASTSource(self.kernel, signature, constexprs, attributes)
                options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
                compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                sizes[self.kernel.__name__] = compiled.metadata.shared
                if maxnreg is not None:
                    cubin = tmp_path / "cubin"
                    cubin.write_bytes(compiled.asm["cubin"])
                    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
                    assert " STACK:0 " in subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    limited.append(self.kernel.__name__)

            return launch

    for name in ("decay_kernel", "walk_kernel", "output_kernel", "gradient_kernel", "finish_kernel"):
        monkeypatch.setattr(kernels, name, Spy(getattr(kernels, name)))
    x, B = torch.empty(4, 512, 24, 64, dtype=dtype), torch.empty(4, 512, 1, 128, dtype=dtype)
    raw, bias, A, D = torch.empty(4, 512, 24, dtype=dtype), torch.empty(24), torch.empty(24), torch.empty(24)
    s = dataclasses.replace(launchers.shape_of(x, B, chunk), processors=processors)
    launchers.forward(x, launchers.decays(raw, bias, A, s), B, B, D, s, initial=None, final=False)
    launchers.backward(x, x, raw, bias, A, B, B, D, s, initial=None, d_final=None, d_raw=raw)
    assert len(sizes) == 5
    assert limited == (["output_kernel"] if dtype == torch.bfloat16 and chunk == 64 else [])
    assert max(sizes.values()) <= SHARED_MEMORY_OF_CONSUMER_CARDS, sizes
