"""From configuration to optimizer: the one place that knows which rules exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from eco_llm.config import C3OConfig, OptimizerConfig
from eco_llm.errors import UserError
from eco_llm.optim.c3o import C3O
from eco_llm.optim.muon import MuonWithAdamW

_C3O_STATE = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}


def build_optimizer(
    groups: Sequence[dict[str, Any]], config: OptimizerConfig, c3o: C3OConfig, device: torch.device | str
) -> Optimizer:
    """The optimizer that `--optimizer` names, over the model's parameter groups.

    Args:
        groups: dictionaries with "params", "weight_decay" and "name": "matrix" (hidden 2-D weights), "embedding"
            (embedding and head) or "vector" (norms, biases, convolutions, SSM scalars). Not modified.
        config: rule and its settings; `lr` is the peak, schedules set it before every step.
        c3o: settings of C3O, unused by the others.
        device: where the parameters live.

    Raises:
        UserError: a setting that the chosen rule cannot use.
        ValueError: a group of another name; it would silently get the wrong rule.
    """
    groups = [dict(g) for g in groups]
    if unknown := {g.get("name") for g in groups} - {"matrix", "embedding", "vector"}:
        raise ValueError(f"parameter groups are named matrix, embedding or vector, not {unknown}")
    betas = (config.beta1, config.beta2)
    if config.optimizer == "c3o":
        if config.eps == 0:
            raise UserError("--eps 0 makes C3O divide 0 by 0 where a gradient is always zero; use e.g. 1e-8")
        if c3o.c3o_error_bits and not any(p.dtype == torch.bfloat16 for g in groups for p in g["params"]):
            raise UserError("--c3o-error-bits 8 extends bf16 weights, and these weights are fp32; use 0")
        for group in groups:
            group["sphere"] = c3o.c3o_sphere if group["name"] == "matrix" else 0.0
        return C3O(
            groups,
            lr=config.lr,
            betas=betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            trust_radius=c3o.c3o_trust_radius,
            trust_norm_refresh_drift=c3o.c3o_trust_norm_refresh_drift,
            trust_norm_refresh_steps=c3o.c3o_trust_norm_refresh_steps,
            credit_gain=c3o.c3o_credit_gain,
            nesterov=c3o.c3o_nesterov,
            grad_clip=config.grad_clip,
            grad_clip_mode=config.grad_clip_mode,
            state_dtype=_C3O_STATE[c3o.c3o_state_dtype],
            error_bits=c3o.c3o_error_bits,
        )
    if config.optimizer == "adamw":
        fused = torch.device(device).type in ("cpu", "cuda")
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused or None,
        )
    return MuonWithAdamW(groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
