"""Sums on a grid: undone to the last bit, whatever the numbers; kernels have the reference's bits."""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from kernel_cases import INTERPRETED, KERNEL_DEVICE, compile_instead_of_running, normal
from torch import Tensor

from eco_llm.ops.grid import RANGE, STEP, TILE, advance, checksums, retreat, snap, values
from eco_llm.ops.grid.reference import MOST, checksums_reference, move_reference, values_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEAST, LARGEST = -(2**31), 2**31 - 1
STATES = [0, 1, -1, 2**24 + 1, -(2**24) - 3, 2**30, -(2**30), LARGEST - 1, LARGEST, LEAST + 1, LEAST]
CHANGES = [
    0.0, -0.0, STEP, -STEP, 0.5 * STEP, 1.5 * STEP, 2.5 * STEP, -0.5 * STEP, -1.5 * STEP, 0.49999997 * STEP,
    2.0**-149, -(2.0**-140), 1e-38, 511.5 * STEP, (2**22 + 0.5) * STEP, (2**22 + 1.5) * STEP, (2**23 - 0.5) * STEP,
    (2**23 + 1) * STEP, 1.0, -3.14159, 65504.0, RANGE - 2**-7, RANGE, -RANGE, 1.5 * RANGE, -4e9, 1e38, -1e38, 3.4e38,
    math.inf, -math.inf, math.nan,
]  # fmt: skip


def pairs(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Every state with every change, one dimension."""
    a, y = torch.tensor(STATES, dtype=torch.int32), torch.tensor(CHANGES, dtype=torch.float64).to(dtype)
    return a.repeat_interleave(len(y)).to(device), y.repeat(len(a)).to(device)


def in_whole_numbers(a: int, y: float, sign: int) -> tuple[int, bool]:
    """(a ± y in steps modulo 2^32, whether that is the sum), by Python's unbounded integers."""
    steps = round(Fraction(y) / Fraction(STEP)) if math.isfinite(y) else None  # ties to even
    fits = steps is not None and abs(steps) <= MOST
    exact = a + sign * (steps if steps is not None and fits else 0)
    wrapped = (exact - LEAST) % 2**32 + LEAST
    return wrapped, fits and wrapped == exact


@pytest.mark.parametrize("shapes", [((2, 8), (1, 8)), ((1, 8), (2, 8)), ((2, 8), (2, 8), (8,)), ((2, 8), (16,))])
def test_nothing_is_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    a, *ys = (torch.ones(shape) for shape in shapes)
    for move in (advance, retreat):
        with pytest.raises(ValueError, match="one shape"):
            move(a.int(), *ys)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_sum_is_that_of_whole_numbers(dtype: torch.dtype, wide: torch.dtype, device: str) -> None:
    a, y = pairs(dtype, device)
    cases = list(zip(a.tolist(), y.double().tolist(), strict=True))
    for move, sign in ((advance, 1), (retreat, -1)):
        q, x, sums = move(a, y, dtype=wide)
        assert (q.dtype, x.dtype, sums.dtype) == (torch.int32, wide, torch.int64)
        want = [in_whole_numbers(*case, sign) for case in cases]
        assert q.tolist() == [number for number, _ in want]
        value = torch.tensor([n * STEP if good or sign < 0 else math.nan for n, good in want], dtype=torch.float64)
        value = value.to(wide) if wide == torch.float64 else value.float().to(wide)
        torch.testing.assert_close(x.cpu(), value, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(sums, checksums(q))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4097,)])
def test_retreat_undoes_advance(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    near = snap(normal(*size, seed=3, device=device) * 30)[0]
    anywhere = torch.randint(LEAST, LARGEST, size, generator=generator, dtype=torch.int32).to(device)
    for a in (near, anywhere):
        for scale in (5.0, 60_000.0):
            y = (normal(*size, seed=4, device=device) * scale).to(dtype)
            c, _, _ = advance(a, y)
            back, value, sums = retreat(c, y)
            assert torch.equal(back, a)
            assert torch.equal(value, values(a, torch.float32))
            assert torch.equal(sums, checksums(a))
    a, y = pairs(dtype, device)
    assert torch.equal(retreat(advance(a, y)[0], y)[0], a)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_several_changes_are_their_sum(dtype: torch.dtype, device: str) -> None:
    """Added up in at least float32, with one rounding to the grid."""
    a, y = pairs(dtype, device)
    for other in (y.roll(1), y.roll(1).float(), -y):
        wide = torch.promote_types(torch.promote_types(dtype, other.dtype), torch.float32)
        for move in (advance, retreat):
            for got, want in zip(move(a, y, other), move(a, y.to(wide) + other.to(wide)), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(retreat(advance(a, y, other)[0], y, other)[0], a)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_snap_is_the_nearest_step_and_hides_nothing(dtype: torch.dtype, device: str) -> None:
    x = pairs(dtype, device)[1]
    q, value, sums = snap(x)
    zero, moved, seen = advance(torch.zeros_like(q), x, dtype=value.dtype)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(q, zero)
    assert torch.equal(sums, seen)
    torch.testing.assert_close(value, moved, rtol=0, atol=0, equal_nan=True)
    inside = x.double().abs() < RANGE - 1
    assert torch.equal(value.isfinite(), x.double().abs() * (1 / STEP) <= MOST)
    assert ((value - x).abs()[inside] <= STEP / 2).all()
    several = normal(3, 5, 7, seed=1, device=device).to(dtype).transpose(0, 2)
    q, value, _ = snap(several)
    assert q.is_contiguous()
    assert value.is_contiguous()
    assert torch.equal(value, snap(several.contiguous())[1])


@pytest.mark.parametrize("device", DEVICES)
def test_large_values_are_rounded_in_float32_alone(device: str) -> None:
    q = torch.tensor([2**24 - 1, 2**24 + 1, 2**24 + 3, LARGEST], dtype=torch.int32, device=device)
    assert values(q, torch.float64).tolist() == [n * STEP for n in q.tolist()]
    assert values(q, torch.float32).tolist() == [n * STEP for n in (2**24 - 1, 2**24, 2**24 + 4, 2**31)]


@pytest.mark.parametrize("device", DEVICES)
def test_checksums_see_every_single_bit(device: str) -> None:
    q = snap(normal(5, 1000, seed=3, device=device))[0]
    seen = checksums(q)
    assert seen.dtype == torch.int64
    assert seen.shape == (2,)
    assert torch.equal(checksums(q.clone()), seen)
    for at in (0, 1234, TILE - 1, TILE, 4999):
        for bit in (0, 13, 31):
            changed = q.clone()
            changed.view(-1)[at] ^= -(2**31) if bit == 31 else 1 << bit
            assert (checksums(changed) != seen).tolist() == [at < TILE, at >= TILE], (at, bit)
    for a, b in ((0, 1), (0, TILE)):
        swapped = q.clone()
        swapped.view(-1)[[a, b]] = q.view(-1)[[b, a]]
        assert not torch.equal(checksums(swapped), seen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4097,)])
def test_a_state_beside_adds_its_value(size: tuple[int, ...], device: str) -> None:
    a, b = (snap(normal(*size, seed=seed, device=device) * 3000)[0] for seed in (1, 2))
    y = normal(*size, seed=3, device=device)
    y.view(-1)[0] = math.nan
    for wide in (torch.float32, torch.float64):
        c, x, sums = advance(a, y, dtype=wide, beside=b)
        want, value, seen = advance(a, y, dtype=wide)
        assert torch.equal(c, want)
        assert torch.equal(sums, seen)
        torch.testing.assert_close(x, value + values(b, wide), rtol=0, atol=0, equal_nan=True)
        assert x.isnan().sum() == 1
    with pytest.raises(ValueError, match="at least float32"):
        advance(a, y, dtype=torch.bfloat16, beside=b)
    with pytest.raises(ValueError, match="one shape"):
        advance(a, y, beside=b[:0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flags_tell_of_one_wrong_bit_and_of_nothing_else(dtype: torch.dtype, device: str) -> None:
    a = snap(normal(5, 1000, seed=3, device=device))[0]
    y = normal(5, 1000, seed=4, device=device).to(dtype)
    c, seen = advance(a, y)[0], checksums(a)
    for at in (0, TILE - 1, TILE, 4999):
        flags = torch.zeros(3, device=device)
        back = retreat(c, y, seen=seen, flags=(flags[0], flags[2]))
        assert all(torch.equal(got, want) for got, want in zip(back, retreat(c, y), strict=True))
        assert flags.tolist() == [0, 0, 0]
        c.view(-1)[at] ^= 1
        retreat(c, y, seen=seen, flags=(flags[0], flags[2]))
        assert flags.tolist() == [1, 0, 1]
        c.view(-1)[at] ^= 1
        retreat(c, y, seen=seen, flags=(flags[0], flags[2]))
        assert flags.tolist() == [1, 0, 1]  # stays


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_seen_has_to_be_of_the_states_size(device: str) -> None:
    c, y = torch.zeros(5000, dtype=torch.int32, device=device), normal(5000, seed=1, device=device)
    seen, flag = checksums(c), torch.zeros((), device=device)
    for wrong in (seen[:1], seen[:0], seen.repeat(2), seen[:, None], seen[0], seen.int(), seen.repeat(2)[::2]):
        with pytest.raises(ValueError, match="need checksums"):
            retreat(c, y, seen=wrong, flags=(flag,))
    for flags in ((), (flag,) * 3, (flag[None],), (flag, flag.double()), (flag.expand(2), flag)):
        with pytest.raises(ValueError, match="0-dim flags"):
            retreat(c, y, seen=seen, flags=flags)
    assert flag == 0


Move = Callable[..., tuple[Tensor, Tensor, Tensor]]


def assert_the_references_bits(a: Tensor | None, ys: list[Tensor], back: bool, dtype: torch.dtype, move: Move) -> None:
    q, x, sums = move(a, ys, STEP, TILE, dtype, back=back)
    want, value = move_reference(a, ys, STEP, dtype, back=back)
    assert torch.equal(q, want)
    torch.testing.assert_close(x, value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(sums, checksums_reference(want, TILE))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4096,), (3, 10_001)])
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16])
def test_kernels_have_the_references_bits(
    size: tuple[int, ...], dtype: torch.dtype, read: torch.dtype, nan_filled_buffers: None
) -> None:
    if read == torch.bfloat16 and INTERPRETED:
        pytest.skip("the interpreter cuts numbers off to bf16")
    from eco_llm.ops.grid.triton import move

    y = (normal(*size, seed=4) * 50).to(dtype)
    y.view(-1)[0] = 1e7  # steps beyond 2^23, and out of range
    other = normal(*size, seed=6) * 50
    near = snap(normal(*size, seed=3) * 300)[0]
    anywhere = torch.randint(LEAST, LARGEST, size, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    edges, changes = pairs(dtype, KERNEL_DEVICE)
    for back in (False, True):
        for a in (near, anywhere.to(KERNEL_DEVICE)):
            for ys in ([y], [y * 1000], [y, other], [other, y * 1000]):
                assert_the_references_bits(a, ys, back, read, move)
        for ys in ([changes], [changes, changes.roll(1)], [changes, -changes]):
            assert_the_references_bits(edges, ys, back, read, move)
    assert_the_references_bits(None, [y], False, read, move)
    assert_the_references_bits(None, [changes], False, read, move)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_undo_every_sum(dtype: torch.dtype, nan_filled_buffers: None) -> None:
    from eco_llm.ops.grid.triton import move

    a, y = pairs(dtype, KERNEL_DEVICE)
    for ys in ([y], [y, y.roll(1)]):
        c, _, _ = move(a, ys, STEP, TILE, torch.float32, back=False)
        back, value, sums = move(c, ys, STEP, TILE, torch.float32, back=True)
        assert torch.equal(back, a)
        assert torch.equal(value, values(a, torch.float32))
        assert torch.equal(sums, checksums_reference(a, TILE))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4096,), (3, 10_001), (0, 3)])
def test_the_rest_of_the_kernels(size: tuple[int, ...], nan_filled_buffers: None) -> None:
    """The value of a state beside, flags, values alone."""
    from eco_llm.ops.grid.triton import move, move_values

    a, b = (snap(normal(*size, seed=seed) * 3000)[0] for seed in (1, 2))
    y = normal(*size, seed=3)
    y.view(-1)[:1] = math.nan
    c, x, sums = move(a, [y], STEP, TILE, torch.float32, back=False, beside=b)
    want, value = move_reference(a, [y], STEP, torch.float32, back=False, beside=b)
    assert torch.equal(c, want)
    torch.testing.assert_close(x, value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(sums, checksums_reference(c, TILE))
    seen = checksums_reference(a, TILE)
    for wrong in range(len(seen) + 1):
        one = seen.clone()
        one[:wrong][-1:] ^= 1 << 40
        flags = torch.zeros(3, device=KERNEL_DEVICE)
        move(c, [y], STEP, TILE, torch.float32, back=True, seen=one, flags=(flags[0], flags[2]))
        assert flags.tolist() == ([1, 0, 1] if wrong else [0, 0, 0])
    assert torch.equal(move_values(b, STEP, torch.float32), values_reference(b, STEP, torch.float32))
    if not INTERPRETED:  # it cuts numbers off to bf16
        assert torch.equal(move_values(b, STEP, torch.bfloat16), values_reference(b, STEP, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_no_number_changes_threads(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled for each card, not run: every access is of a thread's own four numbers, and nothing is spilled."""
    from triton import knobs

    from eco_llm.ops.grid import triton as launchers

    compiled = compile_instead_of_running(monkeypatch, launchers, "_move_kernel", capability=capability)
    monkeypatch.setattr("torch.cuda.device_of", contextlib.nullcontext)
    cubin = tmp_path / "cubin"
    q, y, flag = torch.zeros(2, 4096, dtype=torch.int32), torch.zeros(2, 4096).bfloat16(), torch.zeros(())
    sums = torch.zeros(2, dtype=torch.int64)
    for back, seen in ((False, None), (True, sums)):
        launchers.move(q, [y, y], STEP, TILE, torch.bfloat16, back=back, seen=seen, flags=(flag, flag))
    launchers.move(q, [y, y], STEP, TILE, torch.float32, back=False, beside=q)
    assert len(compiled) == 3
    for (_, one), flags in zip(compiled, (0, 2, 0), strict=True):
        ptx = one.asm["ptx"]
        wide = [access for access in re.findall(r"(?:ld|st)\.global\S*", ptx) if "b64" not in access]
        assert sum(".v2.b32" in access or ".v4.b32" in access for access in wide) == len(wide) - flags
        cubin.write_bytes(one.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        assert " STACK:0 " in subprocess.run(command, capture_output=True, text=True, check=True).stdout
