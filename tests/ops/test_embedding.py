"""A tied matrix's one gradient against autograd's own sum of two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INTERPRETED, KERNEL_DEVICE
from torch import Tensor

from eco_llm.ops.cross_entropy import linear_cross_entropy
from eco_llm.ops.embedding import embed, tie

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 16, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    ids = torch.randint(12, (3, 9), generator=generator).to(device)  # repeated often, and most rows never read
    return weight, ids, torch.randint(40, (27,), generator=generator).to(device)


def loss_of(weight: Tensor, ids: Tensor, targets: Tensor, tied: bool, backend: str = "auto") -> Tensor:
    table, head = tie(weight) if tied else (weight, weight)
    x = embed(ids, table) if tied else F.embedding(ids, table)
    return linear_cross_entropy(torch.tanh(x).flatten(0, 1), head, targets, chunk_tokens=8, backend=backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_equals_the_sum_of_two(dtype: torch.dtype, tolerance: float, backend: str, device: str) -> None:
    inputs = make(device, dtype)
    weight = inputs[0]
    (want,) = torch.autograd.grad(loss_of(*inputs, tied=False, backend=backend), weight)
    loss = loss_of(*inputs, tied=True, backend=backend)
    walks = [torch.autograd.grad(loss, weight, retain_graph=keep)[0] for keep in (True, True, False)]
    for got in walks:
        assert got.layout == torch.strided
        assert ((got - want).abs().max() / want.abs().max()).item() <= tolerance
        assert torch.equal(got, walks[0])
    # Into .grad: micro-steps, and two losses in one graph.
    loss_of(*inputs, tied=True, backend=backend).backward()
    (loss_of(*inputs, tied=True, backend=backend) + loss_of(*inputs, tied=True, backend=backend)).backward()
    assert ((weight.grad / 3 - want).abs().max() / want.abs().max()).item() <= 2 * tolerance


def test_one_reader_alone_and_other_readers() -> None:
    weight, ids, _ = make("cpu", torch.float64)
    for use in (
        lambda a, b: embed(ids, a).square().sum(),
        lambda a, b: b.square().sum(),
        lambda a, b: F.embedding(ids, a).square().sum() + b.square().sum(),
    ):
        (want,) = torch.autograd.grad(use(*tie(weight)), weight)
        a = weight.detach().clone().requires_grad_()
        loss = use(a, a) if use(a, a).requires_grad else None
        (got,) = torch.autograd.grad(loss, a)
        torch.testing.assert_close(want, got.to_dense())


def test_a_dense_reader_of_the_table_alone_gives_its_gradient() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    table, _ = tie(weight)
    (table * 2).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((5, 3), 2.0))


@pytest.mark.gpu
def test_no_sync_and_the_same_bits_in_a_cuda_graph() -> None:
    inputs = make("cuda", torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(loss_of(*inputs, tied=True), inputs[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            (eager,) = torch.autograd.grad(loss_of(*inputs, tied=True), inputs[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(loss_of(*inputs, tied=True), inputs[0])
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 63, 256, 768])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 96, 97, 1000])
def test_rows_are_added_as_a_loop_adds_them(rows: int, width: int, dtype: torch.dtype) -> None:
    from eco_llm.ops.embedding.triton import add_rows

    generator = torch.Generator().manual_seed(rows + width)
    ids = torch.randint(70, (rows,), generator=generator)
    ids[::3] = 69  # the last row, in several passes of the kernel's loop
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    matrix = torch.randn(70, width, generator=generator, dtype=torch.float64).to(dtype)
    want, size = matrix.double(), matrix.double().abs()
    for m, at in enumerate(ids.tolist()):
        want[at] += values[m].double()
        size[at] += values[m].double().abs()
    matrix[5] = float("nan")  # not to be read for any other row
    got = matrix.to(KERNEL_DEVICE, copy=True)
    add_rows(got, ids.to(KERNEL_DEVICE), values.to(KERNEL_DEVICE))
    assert got[5].isnan().all()
    last_place = {torch.float32: 2**-23, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}[dtype]
    wrong = (got.cpu().double() - want).abs() > 2**-21 * size + last_place * want.abs()  # of the sums, of the result
    wrong[5] = False
    assert not wrong.any()
    untouched = sorted(set(range(70)) - set(ids.tolist()) - {5})
    assert torch.equal(got.cpu()[untouched], matrix[untouched])
    again = matrix.to(KERNEL_DEVICE, copy=True)
    add_rows(again, ids.to(KERNEL_DEVICE), values.to(KERNEL_DEVICE))
    assert torch.equal(again.nan_to_num(), got.nan_to_num())
