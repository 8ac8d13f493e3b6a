"""Faults planted in C3O, which a gate must notice: benchmarks/gate_limits.py measures how plainly, tests ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from eco_llm.optim.c3o import C3O

FAULTS = ("zero gradients", "third step skipped", "sixth step skipped", "half of each step")


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """C3O with one of FAULTS, in this process."""
    if fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}; known: {', '.join(FAULTS)}")
    honest, taken = C3O.step, 0

    def step(self: C3O, *args: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        parameters = [p for group in self.param_groups for p in group["params"]]
        if fault == "zero gradients":
            for p in parameters:
                if p.grad is not None:
                    p.grad.zero_()
        before = [p.detach().clone() for p in parameters]
        result = honest(self, *args, **options)
        skipped = (fault, taken) in (("third step skipped", 3), ("sixth step skipped", 6))
        share = 0.0 if skipped else 0.5 if fault == "half of each step" else 1.0
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old.lerp(p, share))
        return result

    C3O.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        C3O.step = honest  # type: ignore[method-assign]
