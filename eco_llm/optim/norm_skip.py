"""When may a tensor's exact update norm be skipped? (row S6; proofs: docs/c3o.md, "The norm skip")

All functions are elementwise over tensors of one shape (0-dim in the for-loop, [tensors] in the foreach path) and
decide on the device; nothing here is read by the host.

Per tensor three numbers are carried from step to step:
    update_norm  U >= |u_t|   the plain direction's norm (the one without `nesterov`), before credit and learning rate;
                              for coded moments that of the direction of what is stored, measured as it is written
    param_norm   L <= |θ_t|
    norm_age     steps since L was last measured
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eco_llm.optim.rule import Rule
from eco_llm.optim.storage import Storage


class NormCache(NamedTuple):
    """Bounds carried between steps; see the module's docstring."""

    update_norm: Tensor
    param_norm: Tensor
    norm_age: Tensor


class Slack(NamedTuple):
    """Relative errors that turn the exact-arithmetic bounds into bounds on what is computed and stored."""

    state: float
    param: float
    compute: float

    @classmethod
    def of(cls, storage: Storage, param: torch.dtype, compute: torch.dtype) -> Slack:
        # Coded moments are read back as they were measured: only arithmetic is between.
        state = torch.finfo(compute if storage.bits else storage.dtype).eps
        return cls(state, torch.finfo(param).eps, 8 * torch.finfo(compute).eps)


def update_norm_bound(
    previous: Tensor, step: Tensor, bias1: Tensor, bias2: Tensor, sqrt_n: Tensor, rule: Rule, slack: Slack
) -> Tensor:
    """U_t = α_t U_{t-1} + β_t sqrt(n) >= |u_t|, from step t's bias corrections 1 - b1^t and 1 - b2^t.

    α_t = b1 (1 - b1^{t-1}) / ((1 - b1^t) ρ_t),  ρ_t = sqrt(b2 (1 - b2^{t-1}) / (1 - b2^t)),  α_1 = 0
    β_t = (1 - b1) / (1 - b1^t) · sqrt((1 - b2^t) / (1 - b2))
    """
    # b (1 - b^{t-1}) = (1 - b^t) - (1 - b), which needs no b^{t-1}.
    shrink1 = ((bias1 - (1 - rule.beta1)) / bias1).clamp_(min=0)
    rho = ((bias2 - (1 - rule.beta2)) / bias2).clamp_(min=0).sqrt_()
    alpha = torch.where(step > 1, shrink1 / rho, 0.0)
    beta = _gradient_bound(bias1, bias2, rule)
    # What step t reads are moments rounded to their storage type: |m| up, sqrt(v) down.
    stored = (1 + slack.state) / (1 - slack.state) ** 0.5
    return (alpha * (stored * previous) + beta * sqrt_n) * (1 + slack.compute)


def _gradient_bound(bias1: Tensor, bias2: Tensor, rule: Rule) -> Tensor:
    """β_t: the most that this step's gradient adds to an element of the direction."""
    return (1 - rule.beta1) / bias1 * (bias2 / (1 - rule.beta2)).sqrt()


def look_ahead(bias1: Tensor, rule: Rule) -> Tensor:
    """κ_t = b1 (1 - b1^t) / (1 - b1^{t+1}), the plain direction's share in Nesterov's; from bias1 = 1 - b1^t."""
    # 1 - b1^{t+1} = (1 - b1) + b1 (1 - b1^t): a sum of what is positive, and no power.
    return rule.beta1 * bias1 / ((1 - rule.beta1) + rule.beta1 * bias1)


def applied_norm_bound(bound: Tensor, bias1: Tensor, bias2: Tensor, sqrt_n: Tensor, rule: Rule, slack: Slack) -> Tensor:
    """At least the norm of the direction that is applied: U_t itself, or with `nesterov` κ_t U_t + β_t sqrt(n)."""
    if not rule.nesterov:
        return bound
    beta = _gradient_bound(bias1, bias2, rule)
    return (look_ahead(bias1, rule) * bound + beta * sqrt_n) * (1 + slack.compute)


def stored_direction_bound(ratio_norm: Tensor, bias1: Tensor, bias2: Tensor, slack: Slack) -> Tensor:
    """At least |u| of coded moments as read back: m / bias1 / (sqrt(v / bias2) + eps) <= sqrt(bias2) / bias1 |r|."""
    return bias2.sqrt() / bias1 * ratio_norm * (1 + slack.compute)


def may_skip(bound: Tensor, cache: NormCache, sqrt_n: Tensor, rule: Rule) -> Tensor:
    """True where the cap provably does not bind, with the margin `trust_norm_refresh_drift` to spare.

    lr (s_max U + λ|θ|) <= (1 - drift) r max(|θ|, F) follows from lr s_max U <= room max(L, F), where
    room = (1 - drift) r - lr λ must not be negative and F = trust_floor sqrt(n). A negative room compares false,
    because lr > 0 then and U >= β_t sqrt(n) > 0; so does NaN. Here U is the `bound` of `applied_norm_bound`.
    """
    room = (1 - rule.trust_norm_refresh_drift) * rule.trust_radius - rule.lr * rule.weight_decay
    weight = torch.maximum(cache.param_norm, rule.trust_floor * sqrt_n)
    skip = rule.lr * rule.credit_range[1] * bound <= room * weight
    return skip & (cache.norm_age <= rule.trust_norm_refresh_steps)


def next_cache(
    skip: Tensor,
    bound: Tensor,
    applied: Tensor,
    cache: NormCache,
    direction_norm: Tensor,
    param_norm: Tensor,
    scale: Tensor,
    rule: Rule,
    slack: Slack,
    *,
    plain_norm: Tensor | None = None,
    stored_norm: Tensor | None = None,
) -> NormCache:
    """The bounds after the step: from bounds alone where it skipped, from the measured norms where it did not.

    Args:
        bound: `update_norm_bound`; `applied`: `applied_norm_bound` of it.
        direction_norm: |s u + λ θ|, as measured.
        param_norm: |θ| before the step, as measured.
        scale: the trust region's factor that was applied.
        plain_norm: where the plain direction is not the applied one: |s u| of the plain one, as measured.
        stored_norm: coded moments: `stored_direction_bound` of them.
    """
    s_min, s_max = rule.credit_range
    # fmin: an unknown (infinite) history times α = 0 is NaN, and then only the measurement counts.
    # |s u| <= |s u + λθ| + λ|θ|: an upper bound on |u| without a norm of its own.
    if plain_norm is None:
        plain_norm = direction_norm + rule.weight_decay * param_norm
    measured = plain_norm * ((1 + slack.compute) / s_min)
    update_norm = torch.where(skip, bound, torch.fmin(bound, measured))
    if stored_norm is not None:
        update_norm = stored_norm

    # θ' = (1 - lr λ) θ - lr s u when skipped (scale is 1); |θ'| >= |θ| - |Δ| when measured.
    keep = 1 - rule.lr * rule.weight_decay
    keep = keep.clamp(min=0) if isinstance(keep, Tensor) else max(keep, 0.0)
    moved = rule.lr * s_max * applied
    unmeasured = cache.param_norm * keep * (1 - slack.compute) - moved * (1 + slack.compute)
    exact = param_norm * (1 - slack.compute) - rule.lr * scale * direction_norm * (1 + slack.compute)
    lower = torch.where(skip, unmeasured, exact).clamp_(min=0) * (1 - slack.param)
    age = torch.where(skip, cache.norm_age + 1, 1.0)
    return NormCache(update_norm, lower, age)
