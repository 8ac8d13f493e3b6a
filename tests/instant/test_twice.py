"""What backward runs again: the gradients of the value, without the products that only the value needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from stack_cases import SHAPE, Build, loss_and_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eco_llm.instant.replay import Setting, Twice, back_propagate
from eco_llm.model.block import Block

Part = Literal["whole", "mixing"]
CASES = [("whole", "mamba"), ("whole", "mla"), ("mixing", "mla")]


def block_of(mixer: Literal["mamba", "mla"], device: torch.device) -> Block:
    torch.manual_seed(0)
    return Block(SHAPE, mixer).to(device)


def numbers(device: torch.device, seed: int) -> Tensor:
    return torch.randn(2, 63, SHAPE.d_model, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(block: Block, f: Twice, x: Tensor, dy: Tensor, *, bf16: bool, short: bool) -> dict[str, Tensor]:
    """Of x and of every weight that f has, by the short way or from the value."""
    block.zero_grad()
    way = f.gradients if short else Twice.alike(f.value).gradients
    leaf, ys = Setting(x.device.type, bf16, torch.bfloat16).record(way, x)
    assert ys[-1].isnan().all() == short
    found = {"x": back_propagate(leaf, dy, *ys)}
    return found | {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("part", "mixer"), CASES)
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_short_way_has_the_bits_of_the_values_gradients(
    part: Part, mixer: Literal["mamba", "mla"], compiled: bool, bf16: bool, device: torch.device
) -> None:
    block = block_of(mixer, device)
    if compiled:
        block.compile_parts(backend="inductor" if device.type == "cuda" else "aot_eager")
    f: Twice = getattr(block, part)
    x, dy = numbers(device, 1), numbers(device, 2)
    expected, ours = (gradients(block, f, x, dy, bf16=bf16, short=short) for short in (False, True))
    weights = {n for n, _ in block.named_parameters() if part == "whole" or n.startswith("mixer")}
    assert expected.keys() == {"x"} | weights
    for name, want in expected.items():
        assert ours[name].dtype == want.dtype
        assert torch.equal(ours[name], want), name


@pytest.mark.parametrize(("part", "mixer"), CASES)
def test_the_value_is_that_of_the_block(part: Part, mixer: Literal["mamba", "mla"], device: torch.device) -> None:
    block, x = block_of(mixer, device), numbers(device, 1)
    expected = torch.add(*block(x)) if part == "whole" else block.mix(x)
    assert torch.equal(getattr(block, part).value(x), expected)


@pytest.mark.parametrize(("part", "mixer"), CASES)
def test_the_last_product_is_left_out(part: Part, mixer: Literal["mamba", "mla"]) -> None:
    """Counted, on the CPU: kernels' products are inside operators."""
    block, x = block_of(mixer, torch.device("cpu")), numbers(torch.device("cpu"), 1)
    f: Twice = getattr(block, part)
    counts = []
    for run in f:
        with FlopCounterMode(display=False) as counter:
            run(x.requires_grad_())
        counts.append(counter.get_total_flops())
    width = SHAPE.mlp_dim if part == "whole" else SHAPE.n_heads * SHAPE.head_dim
    assert counts[0] - counts[1] == 2 * 2 * 63 * width * SHAPE.d_model


@pytest.mark.parametrize("bits", ["8", "4"])
def test_compress_has_the_bits_of_the_long_way(
    bits: str, build: Build, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loss_and_gradients(build("compress", instant_bits=bits), batch, bf16=True)
    monkeypatch.setattr(Block, "_attention", property(lambda block: Twice.alike(block.mixer)))
    expected = loss_and_gradients(build("compress", instant_bits=bits), batch, bf16=True)
    assert [name for name, want in expected.items() if not torch.equal(ours[name], want)] == []


@pytest.mark.parametrize("bf16", [False, True])
def test_recompute_has_the_bits_of_the_long_way(
    bf16: bool, build: Build, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loss_and_gradients(build("recompute"), batch, bf16=bf16)
    monkeypatch.setattr(Block, "whole", property(lambda block: Twice.alike(lambda x: torch.add(*block(x)))))
    expected = loss_and_gradients(build("recompute"), batch, bf16=bf16)
    assert [name for name, want in expected.items() if not torch.equal(ours[name], want)] == []


@pytest.mark.usefixtures("fresh_dynamo")
def test_both_runs_share_their_compiled_graphs(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = build("recompute")
    expected = loss_and_gradients(model, batch)
    model.compile_blocks(counter)
    ours = loss_and_gradients(model, batch)
    assert counter.frame_count == 2  # a Mamba and an MLA block
    for name, want in expected.items():
        torch.testing.assert_close(ours[name], want, rtol=1e-4, atol=1e-6)
