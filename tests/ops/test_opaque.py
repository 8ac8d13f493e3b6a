"""Operators: what autograd, tensors without storage and the compiler see of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eco_llm.ops.opaque import operator


@operator("test_scaled")
def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x.new_empty(0)


@scaled.register_fake
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.factor = inputs[1]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_y: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _scaled_backward(d_y, ctx.factor), None


@operator("test_scaled_backward")
def _scaled_backward(d_y: Tensor, factor: float) -> Tensor:
    return d_y * factor


@_scaled_backward.register_fake
def _(d_y: Tensor, factor: float) -> Tensor:
    return torch.empty_like(d_y)


scaled.register_autograd(_differentiate, setup_context=_save)


@pytest.mark.parametrize("compiled", [False, True])
def test_value_and_gradient(compiled: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return scaled(x + 1, 3.0)[0].sum()

    run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    x = torch.arange(4.0, requires_grad=True)
    y = run(x)
    assert y.item() == 30.0
    y.backward()
    assert torch.equal(x.grad, torch.full((4,), 3.0))


def test_the_compiler_sees_one_node() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(lambda x: scaled(x, 2.0)[0], backend=backend, fullgraph=True)(torch.ones(2))
    assert "eco_llm.test_scaled.default" in seen
    assert not any("mul" in name for name in seen)


def test_shapes_without_storage() -> None:
    y, nothing = scaled(torch.empty(2, 3, device="meta"), 1.0)
    assert (y.shape, nothing.shape) == ((2, 3), (0,))


def test_no_second_derivative_in_silence() -> None:
    x = torch.ones(2, requires_grad=True)
    (d_x,) = torch.autograd.grad(scaled(x, 2.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="test_scaled_backward has no derivative"):
        d_x.sum().backward()


def test_pytorchs_own_check_of_an_operator() -> None:
    torch.library.opcheck(scaled.overload, (torch.randn(3, requires_grad=True), 2.0))
