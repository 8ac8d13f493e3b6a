"""C3O as the report had it before its first fix: one parameter after another, the host waiting at each.

A slow twin for `reproduce_report.py` alone; the product has no such path. The rule is
`c3o_reference.reference_step`, so it computes what the fused step computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eco_llm.config import C3OConfig, OptimizerConfig
from eco_llm.optim.c3o import C3O
from eco_llm.optim.c3o_reference import init_state, reference_step
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.grads import clip_factor, global_norm
from eco_llm.optim.rule import Rule


class PerParameterC3O(C3O):
    """The for-loop reference, with a host read of each parameter's trust decision.

    `reads`: whether the host reads; without, the same loop launches the same work and waits for nothing.
    """

    reads = True

    @torch.no_grad()
    def guarded_step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """As C3O's: (norm of all gradients, whether the step was taken), 0-dim on the device.

        Raises:
            ValueError: no parameter has a gradient, or a setting that this twin does not know.
        """
        norm = global_norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        applied = torch.isfinite(norm) & torch.isfinite(loss.detach())
        stats, trusted = [], 0
        self.capped = 0
        for group in self.param_groups:
            rule = Rule.from_group(group)
            if rule.clips_value:
                raise ValueError("PerParameterC3O clips by the norm or not at all")
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad * clip_factor(norm, rule.grad_clip) if rule.clips_norm else p.grad
                init_state(p, rule, self.state[p])
                stats.append(reference_step(p, grad, self.state[p], rule, ~applied))
                trusted += rule.has_trust
                if self.reads:
                    self.capped += int(stats[-1][2].item())  # the host waits until this parameter is done
        self._record(stats, trusted, ~applied)
        return norm, applied


class LoopC3O(PerParameterC3O):
    """The same loop without the reads."""

    reads = False


def built_by(kind: type[PerParameterC3O]) -> Callable[..., C3O]:
    """What `steps.Ours` calls in place of `build_optimizer`: the same groups and settings, another class."""

    def build(groups: list[dict[str, Any]], config: OptimizerConfig, c3o: C3OConfig, device: torch.device) -> C3O:
        ours = build_optimizer(groups, config, c3o, device)
        if not isinstance(ours, C3O):
            raise ValueError(f"--optimizer {config.optimizer}: this experiment is about c3o")
        shared = {name: value for name, value in ours.defaults.items() if name != "foreach"}
        return kind(groups, **shared, foreach=False)

    return build
