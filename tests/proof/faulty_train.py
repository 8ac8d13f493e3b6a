"""`eco_train` whose side B skips its third optimizer step: what a comparison must notice."""

from __future__ import annotations

import sys
from typing import Any

import torch

from eco_llm.cli.main import main
from eco_llm.optim.c3o import C3O

honest, taken = C3O.step, 0


def step(self: C3O, *args: Any, **options: Any) -> Any:
    """C3O's, undone the third time."""
    global taken
    taken += 1
    parameters = [p for group in self.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    result = honest(self, *args, **options)
    if taken == 3:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
    return result


if sys.argv[1:3] == ["_turns", "b"]:
    C3O.step = step  # type: ignore[method-assign]
sys.exit(main(sys.argv[1:]))
