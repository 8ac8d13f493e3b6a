"""C3O for one tensor: DESIGN's rule line by line. Slow, obvious, and the judge of the foreach path.

Shapes follow the parameter's, except `credit` [blocks] and the 0-dim step, norms and age. Nothing reads a device
value on the host, so this path too can run where synchronising is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from eco_llm.optim.norm_skip import (
    NormCache,
    Slack,
    applied_norm_bound,
    may_skip,
    next_cache,
    stored_direction_bound,
    update_norm_bound,
)  # fmt: skip
from eco_llm.optim.rounding import WEIGHT, dithered_bfloat16, joined_weight, split_weight
from eco_llm.optim.rule import BLOCK, Rule, block_count, compute_dtype
from eco_llm.optim.storage import check_moments, new_moments, read_moments, storage_of, stored_moments

State = dict[str, Any]

UNKNOWN_RADIUS = -1.0
"""`sphere_radius` of a tensor that has not been stepped on its sphere yet: the next step that is applied sets it."""


def init_state(param: Tensor, rule: Rule, state: State) -> None:
    """Create what the rule needs and `state` lacks: zero moments, and caches only where their feature is on."""
    dtype = compute_dtype(param, rule.storage)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state |= new_moments(param, rule.storage)
    check_moments(state, param, rule.storage)
    if not rule.keeps_error(param.dtype):
        state.pop("error", None)
    elif "error" not in state:
        state["error"] = torch.zeros(param.shape, dtype=torch.int8, device=param.device)
    if rule.has_credit and "credit" not in state:
        state["credit"] = torch.zeros(block_count(param.numel()), dtype=dtype, device=param.device)
    if not rule.has_sphere:
        state.pop("sphere_radius", None)
    elif "sphere_radius" not in state:
        state["sphere_radius"] = torch.full((), UNKNOWN_RADIUS, dtype=dtype, device=param.device)
    if not rule.may_skip_norms:
        drop_norm_cache(state)
    elif "update_norm" not in state:
        state["update_norm"] = unknown_update_norm(state["step"].to(dtype))
        state["param_norm"] = torch.zeros((), dtype=dtype, device=param.device)
        state["norm_age"] = torch.zeros((), dtype=torch.float32, device=param.device)


def drop_norm_cache(state: State) -> None:
    """Forget the bounds of the norm skip: a step that does not carry them on makes them wrong."""
    for name in NormCache._fields:
        state.pop(name, None)


def unknown_update_norm(step: Tensor) -> Tensor:
    """The only bound on |u| for moments whose history was not watched: none, or 0 before the first step."""
    return torch.where(step > 0, float("inf"), torch.zeros_like(step))


def block_cosines(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> / (|a| |b|) of every block of two equally shaped tensors: [blocks]; 0 where either norm is 0."""
    fill = block_count(a.numel()) * BLOCK - a.numel()
    a = pad(a.reshape(-1), (0, fill)).view(-1, BLOCK)
    b = pad(b.reshape(-1), (0, fill)).view(-1, BLOCK)
    norms = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(norms > 0, (a * b).sum(1) / norms, 0.0)


def per_element(blocks: Tensor, like: Tensor) -> Tensor:
    """Spread one value a block over the elements of a tensor shaped as `like`."""
    return blocks[:, None].expand(-1, BLOCK).reshape(-1)[: like.numel()].view(like.shape)


def reference_step(param: Tensor, grad: Tensor, state: State, rule: Rule, skip_step: Tensor | None) -> Tensor:
    """One C3O step of one tensor, in place on `param` and `state`.

    Args:
        param: the tensor θ, floating point, any strides, at least one element.
        grad: its gradient, already unscaled and clipped; not modified.
        state: what `init_state` made.
        skip_step: None, or a 0-dim bool on the parameter's device; True leaves every bit of θ and the state alone,
            whatever the gradient holds.

    Returns:
        float32 [4]: norm skipped, norm exact, cap bound (each 0 or 1), |Δ| / max(|θ|, floor), or ρ on the sphere; zeros
        with neither.
    """
    dtype = compute_dtype(param, rule.storage)
    theta, g = _weight(param, state).to(dtype), grad.to(dtype)
    storage = storage_of(state, rule.storage)
    m, v = read_moments(state, param, storage, dtype)
    new: State = {}

    # Credit of the direction that the OLD moments point in. Before the first step it is 0 whatever the correction.
    s: Tensor | float = 1.0
    if rule.has_credit:
        t_old = state["step"].to(dtype).clamp(min=1)
        u_old = (m / (1 - rule.beta1**t_old)) / ((v / (1 - rule.beta2**t_old)).sqrt() + rule.eps)
        h = block_cosines(g, u_old)
        new["credit"] = rule.credit_beta * state["credit"] + (1 - rule.credit_beta) * (h - h.mean())
        factors = (rule.credit_gain * new["credit"]).exp().clamp(rule.credit_min, rule.credit_max)
        s = per_element(factors, param)

    t = state["step"] + 1
    new["step"] = t
    m = rule.beta1 * m + (1 - rule.beta1) * g
    v = rule.beta2 * v + (1 - rule.beta2) * g * g
    kept, ratio_norm = stored_moments(m, v, t, storage, BLOCK)
    new |= kept

    bias1, bias2 = 1 - rule.beta1 ** t.to(dtype), 1 - rule.beta2 ** t.to(dtype)
    root = (v / bias2).sqrt() + rule.eps
    plain = s * (m / bias1 / root)
    u = plain
    if rule.nesterov:
        ahead = rule.beta1 * m / (1 - rule.beta1 ** (t.to(dtype) + 1)) + (1 - rule.beta1) * g / bias1
        u = s * (ahead / root)
    d = u + rule.weight_decay * theta

    stats = torch.zeros(4, dtype=torch.float32, device=param.device)
    scale: Tensor | float = 1.0
    if rule.measures:
        sqrt_n = torch.full((), param.numel() ** 0.5, dtype=dtype, device=param.device)
        theta_norm, d_norm = torch.linalg.vector_norm(theta), torch.linalg.vector_norm(d)
        weight = torch.maximum(theta_norm, rule.trust_floor * sqrt_n)
        limit = rule.trust_radius * weight if rule.has_trust else torch.full_like(weight, float("inf"))
        delta_norm = rule.lr * d_norm
        scale = torch.where(delta_norm > limit, limit / delta_norm, 1.0)
        skip = torch.zeros((), dtype=torch.bool, device=param.device)
        if rule.may_skip_norms:
            slack = Slack.of(storage, param.dtype, dtype)
            cache = NormCache(state["update_norm"], state["param_norm"], state["norm_age"])
            bound = update_norm_bound(cache.update_norm, t, bias1, bias2, sqrt_n, rule, slack)
            applied = applied_norm_bound(bound, bias1, bias2, sqrt_n, rule, slack)
            skip = may_skip(applied, cache, sqrt_n, rule)
            scale = torch.where(skip, 1.0, scale)
            if ratio_norm is not None:
                ratio_norm = stored_direction_bound(ratio_norm.to(dtype), bias1, bias2, slack)
            plain_norm = torch.linalg.vector_norm(plain) if rule.nesterov else None
            new |= next_cache(
                skip, bound, applied, cache, d_norm, theta_norm, scale, rule, slack,
                plain_norm=plain_norm, stored_norm=ratio_norm,
            )._asdict()  # fmt: skip
        ratio = torch.where(weight > 0, delta_norm * scale / weight, 0.0)
        stats = torch.stack([skip, ~skip, scale < 1, ratio]).to(torch.float32)

    moved = theta - rule.lr * scale * d
    if rule.has_sphere:
        known = state["sphere_radius"]
        new["sphere_radius"] = radius = torch.where(known < 0, theta_norm, known)
        share, u_norm = rule.sphere * rule.lr, torch.linalg.vector_norm(u)
        on_sphere = (radius > 0) & (u_norm > 0) & (share > 0)
        straight = theta - share * radius / u_norm * u
        moved = torch.where(on_sphere, radius * (straight / torch.linalg.vector_norm(straight)), moved)
        # Multiplied, not assigned: to write a number into an element of a device tensor waits for the device.
        one = torch.ones_like(stats[0])
        counted = torch.stack([0 * one, one, 0 * one, (share * one).to(one.dtype)])
        stats = torch.where(on_sphere, counted, stats)
    theta = moved
    new_param, error = _stored_weight(theta, param, state, rule, t)
    if error is not None:
        new["error"] = error
    _commit(param, new_param, skip_step)
    for name, value in new.items():
        _commit(state[name], value.to(state[name].dtype), skip_step)
    return stats


def _weight(param: Tensor, state: State) -> Tensor:
    return joined_weight(param, state["error"]) if "error" in state else param


def _stored_weight(
    theta: Tensor, param: Tensor, state: State, rule: Rule, step: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The new parameter in its type, and its error bits if it has any."""
    if param.dtype != torch.bfloat16 or not rule.dithers_weights:
        return theta.to(param.dtype), None
    position = torch.arange(theta.numel(), device=theta.device).view(theta.shape) % BLOCK
    if "error" in state:
        return split_weight(theta, position, step)
    return dithered_bfloat16(theta, position, step, WEIGHT), None


def _commit(old: Tensor, new: Tensor, skip_step: Tensor | None) -> None:
    # where, not arithmetic: NaN * 0 is NaN.
    old.copy_(new if skip_step is None else torch.where(skip_step, old, new))
