"""C3O, the report's optimizer, as a `torch.optim.Optimizer`.

This module holds arguments, state and metrics and chooses a path; the rule itself is in `c3o_reference` (for-loop,
the judge) and `c3o_foreach` (multi-tensor). The mathematics, the norm skip's proof and the limits: docs/c3o.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from eco_llm.optim.c3o_foreach import Bucket, Plan, foreach_step
from eco_llm.optim.c3o_reference import init_state, reference_step
from eco_llm.optim.grads import clamp_, clip_factor, global_norm, scale_
from eco_llm.optim.rule import Rule, check_group

_STATS = ("c3o_trust_norm_skipped", "c3o_trust_norm_exact", "c3o_trust_capped", "c3o_update_to_weight")
_COUNTS = ("c3o_foreach_groups", "c3o_grad_clip_foreach_groups", "c3o_grad_clip_scale")


class C3O(Optimizer):
    """Counterfactual Credit-Carrying Optimizer: Adam's moments, block credit, and a trust region per tensor.

    Per tensor θ with gradient g, in this order (docs/c3o.md):
        g  <- clip(g)
        h  =  cos(g, u_old) of each block of 4096 elements;  e <- credit_beta e + (1 - credit_beta)(h - mean h)
        m  <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g²;   u = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
        s  =  clamp(exp(credit_gain e), credit_min, credit_max)
        Δ  =  lr (s u + weight_decay θ)
        θ  <- θ - Δ min(1, trust_radius max(|θ|, trust_floor sqrt(n)) / |Δ|)

    Args:
        params: parameters, or groups (dictionaries) that may override any setting but `foreach`'s default.
        lr: learning rate; a number, or a one-element tensor on the CPU or the parameters' device (a GPU's is never read
            by the host).
        betas: decays b1, b2 of the moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled decay λ; inside the trust region.
        trust_radius: r, the most |Δ| may be as a share of |θ|; 0 is off.
        trust_floor: root-mean-square under which a tensor is treated as having it, so that a zero-initialised tensor
            can leave zero (the idea of Adafactor's eps_2, arXiv 1804.04235; our addition to the report's rule).
        trust_norm_refresh_drift: margin of the norm skip in [0, 1); 0 measures every norm in every step.
        trust_norm_refresh_steps: steps after which a cached |θ| must be measured again.
        credit_gain: strength of the block credit; 0 is off and keeps no state.
        credit_min, credit_max: range of the credit factors; must contain 1.
        credit_beta: decay of the credit's average.
        grad_clip: threshold; 0 is off. Clipping changes `.grad` in place.
        grad_clip_mode: "norm" clips by the norm of all gradients of this optimizer; "value" clamps each element.
        state_dtype: storage of both moments: torch.float32, bfloat16 or float64.
        foreach: True or False forces the multi-tensor or the for-loop path; None takes multi-tensor.

    Attributes read by `step` when a caller sets them (the first two are PyTorch's gradient-scaler protocol):
        found_inf: 0-dim float tensor. Not 0 means that no bit of any parameter or state changes in this step, even if
            gradients are NaN. On a GPU it is not read by the host.
        grad_scale: 0-dim float tensor that gradients are divided by, in place, before anything else.
        grad_norm: 0-dim tensor, the norm of all gradients (after `grad_scale`) if it is already known, for "norm"
            clipping; used by one step and then forgotten.

    Parameters whose `.grad` is None, and empty ones, are left alone. bfloat16 parameters are rounded to nearest: keep
    float32 parameters where updates may be under 2^-9 of a weight.

    Raises:
        ValueError: a setting outside its range, or a parameter that is not floating point.
        RuntimeError: from `step`, a sparse gradient.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        trust_radius: float = 0.1,
        trust_floor: float = 1e-3,
        trust_norm_refresh_drift: float = 0.0,
        trust_norm_refresh_steps: int = 16,
        credit_gain: float = 0.0,
        credit_min: float = 0.5,
        credit_max: float = 2.0,
        credit_beta: float = 0.9,
        grad_clip: float = 0.0,
        grad_clip_mode: str = "norm",
        state_dtype: torch.dtype = torch.float32,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_radius": trust_radius,
            "trust_floor": trust_floor,
            "trust_norm_refresh_drift": trust_norm_refresh_drift,
            "trust_norm_refresh_steps": trust_norm_refresh_steps,
            "credit_gain": credit_gain,
            "credit_min": credit_min,
            "credit_max": credit_max,
            "credit_beta": credit_beta,
            "grad_clip": grad_clip,
            "grad_clip_mode": grad_clip_mode,
            "state_dtype": _dtype_name(state_dtype),
            "foreach": foreach,
        }
        check_group(defaults)
        self._forget_layout()
        super().__init__(params, defaults)

    def _forget_layout(self) -> None:
        """Drop everything derived from parameters and state; the next step rebuilds it."""
        # found_inf and grad_scale are not set here: a gradient scaler tells by their absence that it owns them.
        self.grad_norm: Tensor | None = None
        self._plan = Plan()
        self._buckets: list[Bucket] = []
        self._buckets_key: tuple[Any, ...] | None = None
        self._stats: Tensor | None = None
        self._clip_groups = 0
        self._clip_scale: Tensor | None = None

    # ---- groups and state -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings override the defaults.

        Raises:
            ValueError: a setting outside its range, or a parameter that is not floating point.
        """
        if isinstance(param_group.get("state_dtype"), torch.dtype):
            param_group["state_dtype"] = _dtype_name(param_group["state_dtype"])
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in param_group["params"]:
            if not p.is_floating_point():  # complex tensors are not
                self.param_groups.pop()
                raise ValueError(f"C3O: parameters must be real floating point, got {p.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict()`'s result: moments keep the type they were saved in, values are copied."""
        super().load_state_dict(state_dict)
        # The base class casts state to the parameter's type, which would round float32 moments of bfloat16 weights.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        here = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, here, strict=True):
            if index in state_dict["state"]:
                self.state[param] = {
                    name: value.detach().clone().to(param.device) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][index].items()
                }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by copying, unpickling and loading."""
        super().__setstate__(state)
        self._forget_layout()

    # ---- the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance every parameter that has a gradient. No host sync, once the state exists.

        Args:
            closure: recomputes the loss, optional.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm, self.grad_norm = self.grad_norm, None
        found_inf = getattr(self, "found_inf", None)  # set by the caller, or not there at all
        skip_step = None if found_inf is None else found_inf.reshape(()) != 0
        if skip_step is not None and skip_step.device.type == "cpu" and self._read_flag_on_cpu:
            if skip_step:  # host memory: reading it waits for nothing
                return loss
            skip_step = None

        groups = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in params:
                if p.grad.layout is not torch.strided:
                    raise RuntimeError("C3O does not support sparse gradients; use a dense embedding (sparse=False)")
            groups.append((group, Rule.from_group(group), params))
        if not any(params for _, _, params in groups):
            return loss

        buckets = self._bucketed([g for g in groups if g[0]["foreach"] is not False])
        rules = {id(group): rule for group, rule, _ in groups}
        bulk = [_Part(_gradients(b.params), rules[id(b.group)], True) for b in buckets]
        tensors = [
            (p, _Part([p.grad], rule, False))
            for group, rule, params in groups
            if group["foreach"] is False
            for p in params
        ]
        everything = [g for _, _, params in groups for g in _gradients(params)]
        self._prepare_gradients(bulk + [part for _, part in tensors], everything, norm)

        stats = []
        for bucket, part in zip(buckets, bulk, strict=True):
            stats.append(foreach_step(bucket, part.grads, part.rule, _on(skip_step, part.grads[0])))
        for p, part in tensors:
            init_state(p, part.rule, self.state[p])
            stats.append(reference_step(p, part.grads[0], self.state[p], part.rule, _on(skip_step, p)))
        trusted = sum(len(params) for _, rule, params in groups if rule.has_trust)
        self._record(stats, trusted, skip_step)
        return loss

    _read_flag_on_cpu = True  # tests clear it, to take the device's path without a GPU

    def _bucketed(self, groups: list[tuple[dict[str, Any], Rule, list[Tensor]]]) -> list[Bucket]:
        key = (
            len(self.state),
            *((rule.has_credit, rule.may_skip_norms, tuple(map(id, params))) for _, rule, params in groups),
        )
        if key != self._buckets_key:
            if len(self.state) < len(self._plan):  # someone cleared the state
                self._plan = Plan()
            self._buckets = self._plan.buckets(groups, self.state)
            self._buckets_key = (len(self.state), *key[1:])
        return self._buckets

    def _prepare_gradients(self, parts: list[_Part], everything: list[Tensor], norm: Tensor | None) -> None:
        """Unscale and clip, in place, in lists that share device, dtype and group; `everything` is all of them."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            inverse = scale.reshape(()).double().reciprocal()
            for part in parts:
                scale_(part.grads, _on(inverse, part.grads[0]))
        self._clip_groups, self._clip_scale = 0, None
        factors: dict[float, Tensor] = {}
        for grads, rule, bulk in parts:
            if rule.clips_norm:
                if norm is None:
                    # In the order of the groups: that of buckets, hence the sum's last bit, may differ after a resume.
                    norm = global_norm(everything)
                if rule.grad_clip not in factors:
                    factors[rule.grad_clip] = clip_factor(norm, rule.grad_clip)
                self._clip_scale = factors[rule.grad_clip]
                scale_(grads, _on(self._clip_scale, grads[0]))
                self._clip_groups += bulk
            elif rule.clips_value and bulk:
                self._clip_groups += clamp_(grads, rule.grad_clip)
            elif rule.clips_value:
                grads[0].clamp_(-rule.grad_clip, rule.grad_clip)

    # ---- metrics ----------------------------------------------------------------------------------------------

    def _record(self, stats: list[Tensor], trusted: int, skip_step: Tensor | None) -> None:
        total = torch.stack([_on(s, stats[0]) for s in stats]).sum(0)
        total[3] /= max(trusted, 1)
        clip = torch.ones_like(total[:1]) if self._clip_scale is None else _on(self._clip_scale, total).reshape(1)
        total = torch.cat([total, clip.to(total.dtype)])
        if skip_step is not None:
            last = torch.zeros_like(total) if self._stats is None else self._stats
            total = torch.where(_on(skip_step, total), last, total)
        self._stats = total

    def metrics_tensor(self) -> tuple[tuple[str, ...], Tensor]:
        """What `metrics` reads, without reading it: (names, float32 [names] on the parameters' device).

        No sync: copy the tensor to the host asynchronously and look at it a step later.
        """
        stats = self._stats
        if stats is None:
            some = next(p for group in self.param_groups for p in group["params"])  # the first group may be empty
            stats = torch.zeros(5, device=some.device)
        counts = [torch.full((1,), float(n), device=stats.device) for n in (len(self._buckets), self._clip_groups)]
        return (*_STATS, _COUNTS[2], *_COUNTS[:2]), torch.cat([stats, *counts])

    def metrics(self) -> dict[str, float]:
        """Figures of the last applied step; the only method that synchronises with the device.

        c3o_trust_norm_skipped: tensors whose bound proved that the cap does not bind.
        c3o_trust_norm_exact: tensors under a trust region that needed their norms measured.
        c3o_trust_capped: tensors whose update the cap reduced.
        c3o_update_to_weight: mean over those tensors of |Δ| / max(|θ|, trust_floor sqrt(n)).
        c3o_grad_clip_scale: factor that "norm" clipping applied (of the last group clipped); 1 if it did not.
        c3o_foreach_groups: multi-tensor buckets in a step.
        c3o_grad_clip_foreach_groups: buckets whose gradients were clipped by multi-tensor calls.
        """
        names, values = self.metrics_tensor()
        return dict(zip(names, values.tolist(), strict=True))


class _Part(NamedTuple):
    """Gradients that are prepared by one call: a bucket's, or one tensor's in the for-loop path."""

    grads: list[Tensor]
    rule: Rule
    bulk: bool


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [g for p in params if (g := p.grad) is not None]


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _on(x: Any, like: Tensor) -> Any:
    """`x`, None or a tensor, on the device of `like`, without waiting."""
    return x if x is None or x.device == like.device else x.to(like.device, non_blocking=True)
