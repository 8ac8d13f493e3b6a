"""Operators: functions that torch.compile sees as one node of known shapes, and that need no compiler to be called.

What `torch.library.custom_op` makes imports torch._dynamo at its first call, 2 to 5 seconds of a start, be anything
compiled or not; and it compares, at every call, what an operator was given with what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = "eco_llm"
_library = torch.library.Library(_NAMESPACE, "DEF")


class Operator:
    """A function of tensors, numbers, types and devices, registered with PyTorch's dispatcher under its name.

    It must be pure, and return nothing that it was given, nor a view of it: nothing looks at that in a run, and
    `torch.library.opcheck` in the tests (tests/ops/test_operators.py).
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = f"{_NAMESPACE}::{name}"
        self._derivative: Callable[..., Any] | None = None
        self._setup: Callable[..., Any] | None = None
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_autograd(self._name, self._backward, setup_context=self._keep, lib=_library)
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, _NAMESPACE), name).default
        """What the dispatcher calls."""

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """`fake` makes results of the right shapes and types, for tensors without storage."""
        torch.library.register_fake(self._name, fake, lib=_library)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """`backward(ctx, *gradients)` and `setup_context(ctx, inputs, output)`, as of a `torch.autograd.Function`."""
        self._derivative, self._setup = backward, setup_context

    def _backward(self, ctx: Any, *gradients: Any) -> Any:
        if self._derivative is None:
            raise RuntimeError(f"{self._name} has no derivative: first derivatives only")
        return self._derivative(ctx, *gradients)

    def _keep(self, ctx: Any, inputs: Any, output: Any) -> None:
        if self._setup is not None:
            self._setup(ctx, inputs, output)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function as an operator `eco_llm::name`."""
    return lambda function: Operator(name, function)
