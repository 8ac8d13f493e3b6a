"""C3O, the report's optimizer, as a `torch.optim.Optimizer`.

This module holds arguments, state and metrics and chooses a path; the rule itself is in `c3o_reference` (for-loop,
the judge), `c3o_foreach` (multi-tensor), `c3o_host` (a CPU, tensor by tensor) and `c3o_triton` (kernels, on a GPU). The
mathematics, the norm skip's proof and the limits: docs/c3o.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from eco_llm.ops.backend import uses_triton
from eco_llm.optim.c3o_foreach import Arena, Bucket, Plan, foreach_step
from eco_llm.optim.c3o_host import host_serves, host_step
from eco_llm.optim.c3o_reference import init_state, reference_step
from eco_llm.optim.grads import clamp_, clip_factor, global_norm, scale_
from eco_llm.optim.rule import Rule, check_group, compiled_settings

if TYPE_CHECKING:
    from eco_llm.optim.c3o_triton import KernelPlan

Groups = list[tuple[dict[str, Any], Rule, list[Tensor]]]

_STATS = ("c3o_trust_norm_skipped", "c3o_trust_norm_exact", "c3o_trust_capped", "c3o_update_to_weight")
_MAX_PLANS = 4  # tables that are kept, for optimizers whose set of gradients alternates
_KERNEL_TYPES = (torch.float32, torch.bfloat16)
_KERNEL_STORAGES = ("float32", "bfloat16", "int8", "int4")
_COUNTS = ("c3o_foreach_groups", "c3o_grad_clip_foreach_groups", "c3o_grad_clip_scale")


class C3O(Optimizer):
    """Counterfactual Credit-Carrying Optimizer: Adam's moments, block credit, and a trust region per tensor.

    Per tensor θ with gradient g, in this order (docs/c3o.md):
        g  <- clip(g)
        h  =  cos(g, u_old) of each block of 4096 elements;  e <- credit_beta e + (1 - credit_beta)(h - mean h)
        m  <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g²
        u  =  (b1 m / (1-b1^(t+1)) + (1-b1) g / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
        s  =  clamp(exp(credit_gain e), credit_min, credit_max)
        Δ  =  lr (s u + weight_decay θ)
        θ  <- θ - Δ min(1, trust_radius max(|θ|, trust_floor sqrt(n)) / |Δ|)
    or, with `sphere` > 0, R being |θ| before the tensor's first step:
        θ  <- R normalize(θ - sphere lr R s u / |s u|)

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
        nesterov: the direction looks one step ahead, as above (NAdam, Dozat 2016, without its schedule of b1); False
            has AdamW's m / (1-b1^t) over the same root.
        sphere: step length on the sphere |θ| = R, as a multiple of `lr`: a step moves a tensor by the share
            sphere · lr < 1 of R, its norm stays, and there is no weight decay; 0 is off. Meant for hidden matrices.
            Where R, the update or lr is 0 the rule above holds (decided on the device). R is in the state
            (`sphere_radius`; -1: not known yet).
        trust_norm_refresh_drift: margin of the norm skip in [0, 1); 0 measures every norm in every step.
        trust_norm_refresh_steps: steps after which a cached |θ| must be measured again.
        credit_gain: strength of the block credit; 0 is off and keeps no state.
        credit_min, credit_max: range of the credit factors; must contain 1.
        credit_beta: decay of the credit's average.
        grad_clip: threshold; 0 is off. What `.grad` holds after a step that clips is unspecified: the kernels leave it
            alone, the other paths clip in place.
        grad_clip_mode: "norm" clips by the norm of all gradients of this optimizer; "value" clamps each element.
        state_dtype: storage of both moments: torch.float32, bfloat16 or float64, or "int8" or "int4": codes with a
            scale per 64 elements, 2.0625 or 1.0625 bytes per parameter for both.
        weight_rounding: of bfloat16 parameters: "dithered" (up or down so that the average over steps is right) or
            "nearest", under which updates smaller than 2^-9 of a weight are lost.
        error_bits: 8 keeps, in the state, the next 8 bits of bfloat16 parameters; 0 is off.
        foreach: True or False forces PyTorch's multi-tensor calls or the for-loop; None takes the Triton kernels where
            they serve (a GPU, float32 or bfloat16, contiguous, no credit), on a CPU one large tensor after another
            where that serves, else multi-tensor calls.

    Attributes read by `step` when a caller sets them (the first two are PyTorch's gradient-scaler protocol):
        found_inf: 0-dim float tensor. Not 0 means that no bit of any parameter or state changes in this step, even if
            gradients are NaN. On a GPU it is not read by the host.
        grad_scale: 0-dim float tensor that gradients are divided by, in place, before anything else.
        grad_norm: 0-dim tensor, the norm of all gradients (after `grad_scale`) if it is already known, for "norm"
            clipping; used by one step and then forgotten.

    Parameters whose `.grad` is None, and empty ones, are left alone.

    Raises:
        ValueError: a setting outside its range, or a parameter that is not floating point.
        RuntimeError: from `step`, a sparse gradient, or a loaded state whose moments are stored in another way.
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
        sphere: float = 0.0,
        trust_norm_refresh_drift: float = 0.0,
        trust_norm_refresh_steps: int = 16,
        credit_gain: float = 0.0,
        credit_min: float = 0.5,
        credit_max: float = 2.0,
        credit_beta: float = 0.9,
        nesterov: bool = True,
        grad_clip: float = 0.0,
        grad_clip_mode: str = "norm",
        state_dtype: torch.dtype | str = torch.float32,
        weight_rounding: str = "dithered",
        error_bits: int = 0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_radius": trust_radius,
            "trust_floor": trust_floor,
            "sphere": sphere,
            "trust_norm_refresh_drift": trust_norm_refresh_drift,
            "trust_norm_refresh_steps": trust_norm_refresh_steps,
            "credit_gain": credit_gain,
            "credit_min": credit_min,
            "credit_max": credit_max,
            "credit_beta": credit_beta,
            "nesterov": nesterov,
            "grad_clip": grad_clip,
            "grad_clip_mode": grad_clip_mode,
            "state_dtype": _dtype_name(state_dtype),
            "weight_rounding": weight_rounding,
            "error_bits": error_bits,
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
        self._kernel_arenas: list[tuple[Arena, dict[str, Any]]] = []
        self._kernel_plans: dict[tuple[Any, ...], KernelPlan] = {}
        self._kernel_metrics: KernelPlan | None = None  # the last step was all theirs
        self._split_key: tuple[Any, ...] | None = None
        self._others: Groups = []
        self._whole: KernelPlan | None = None  # after make_capturable: every parameter, gradient or not
        self._whole_key: tuple[Any, ...] = ()
        self._whole_arenas: tuple[Any, ...] = ()
        self._guard: Tensor | None = None
        self._verdict: tuple[Tensor, Tensor] | None = None

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
        """Load `state_dict()`'s result: moments keep the type they were saved in, values are copied.

        Settings that a state of an earlier version lacks are what that version did: `nesterov` is then False.

        Raises:
            ValueError: the state was stepped with cautious weight decay, which is gone; nothing was loaded.
        """
        seen: list[dict[str, Any]] = []

        def see(_: Optimizer, final: dict[str, Any]) -> None:
            seen.append(final)  # last of the hooks, which may have replaced it

        def keep_types(_: Optimizer) -> None:
            self._adopt_state(seen[0])

        handles = (
            self.register_load_state_dict_pre_hook(see),
            self.register_load_state_dict_post_hook(keep_types, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _adopt_state(self, state_dict: dict[str, Any]) -> None:
        """Copy the state as saved: the base class casts it to the parameter's type, which would round moments."""
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        here = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, here, strict=True):
            if index in state_dict["state"]:
                self.state[param] = {
                    name: value.detach().clone().to(param.device) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][index].items()
                }
                step = self.state[param].get("step")
                if isinstance(step, int | float):
                    self.state[param]["step"] = torch.tensor(float(step), dtype=torch.float32, device=param.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by copying, unpickling and loading.

        Raises:
            ValueError: a group was stepped with cautious weight decay, which is gone; nothing was changed.
        """
        if any(group.get("cautious", False) for group in state["param_groups"]):
            raise ValueError("C3O: this state was stepped with cautious weight decay, which C3O no longer has")
        for group in state["param_groups"]:
            group.pop("cautious", None)
        super().__setstate__(state)
        for group in self.param_groups:  # states saved before these settings were: as it was then
            group.setdefault("weight_rounding", "nearest")
            group.setdefault("error_bits", 0)
            group.setdefault("sphere", 0.0)
            group.setdefault("nesterov", False)
            group.setdefault("foreach", None)
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
        guard, self._guard = self._guard, None
        found_inf = getattr(self, "found_inf", None)  # set by the caller, or not there at all

        groups: Groups = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in params:
                if p.grad.layout is not torch.strided:
                    raise RuntimeError("C3O does not support sparse gradients; use a dense embedding (sparse=False)")
            groups.append((group, Rule.from_group(group), params))
        if not any(params for _, _, params in groups):
            if guard is not None:
                self._judge(guard, found_inf)
            return loss

        kernels, rest = self._split(groups)
        if kernels is None or any(params for _, _, params in rest):
            self._mixed_step(kernels, rest, groups, norm, guard, found_inf)
        else:
            self._kernel_step(kernels, groups, norm, guard, found_inf)
        return loss

    @torch.no_grad()
    def guarded_step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """`step`, unless the loss or the norm of all gradients is not finite; the host does not look.

        Args:
            loss: 0-dim, the loss that the gradients belong to.

        Returns:
            (norm, applied): the norm before clipping, 0-dim; and whether the step was taken, 0-dim bool. On the
            gradients' device, and not overwritten by later steps.

        Raises:
            ValueError: no parameter has a gradient.
        """
        self._verdict, self._guard = None, loss.detach()
        try:
            self.step()
        finally:
            self._guard = None
        verdict, self._verdict = self._verdict, None
        assert verdict is not None
        return verdict

    def _judge(self, loss: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
        """Norm of all gradients, and whether to step (`guarded_step`), by PyTorch's calls."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(grads)
        applied = torch.isfinite(norm) & torch.isfinite(loss).to(norm.device, non_blocking=True)
        if found_inf is not None:
            applied &= _on(found_inf.reshape(()) == 0, norm)
        self._verdict = norm, applied
        return norm, applied

    def _kernel_step(
        self, kernels: KernelPlan, groups: Groups, norm: Tensor | None, guard: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """The step when kernels serve every tensor."""
        like = kernels.params[0]
        self._unscale([_Part(_gradients(params), rule, True) for _, rule, params in groups if params])
        self._verdict = kernels.step(
            measure=norm is None and (guard is not None or kernels.clips_norm),
            norm=_on(norm, like),
            loss=None if guard is None else _on(guard, like).to(torch.float32),
            found_inf=_on(found_inf, like),
        )
        self._kernel_metrics = kernels

    def _mixed_step(
        self,
        kernels: KernelPlan | None,
        rest: Groups,
        groups: Groups,
        norm: Tensor | None,
        guard: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The step when some tensors, or all, take PyTorch's calls: these also measure and judge the gradients."""
        skip_step = None if found_inf is None else found_inf.reshape(()) != 0
        parts = [_Part(_gradients(params), rule, True) for _, rule, params in groups if params]
        if guard is not None:
            self._unscale(parts)
            norm, applied = self._judge(guard, found_inf)
            skip_step = ~applied
        if skip_step is not None and skip_step.device.type == "cpu" and self._read_flag_on_cpu:
            if skip_step:  # host memory: reading it waits for nothing
                return
            skip_step = None
        if guard is None:
            self._unscale(parts)

        buckets = self._bucketed([g for g in rest if g[0]["foreach"] is not False])
        rules = {id(group): rule for group, rule, _ in groups}
        bulk = [_Part(_gradients(b.params), rules[id(b.group)], True) for b in buckets]
        tensors = [
            (p, _Part(_gradients([p]), rule, False))
            for group, rule, params in rest
            if group["foreach"] is False
            for p in params
        ]
        if norm is None and any(rule.clips_norm for _, rule, params in groups if params):
            # In the order of the groups: that of buckets, hence the sum's last bit, may differ after a resume.
            norm = global_norm([g for _, _, params in groups for g in _gradients(params)])
        if skip_step is None:
            bulk = [
                part._replace(on_host=host_serves(bucket, part.rule))
                for bucket, part in zip(buckets, bulk, strict=True)
            ]
        factors = self._clip_gradients(bulk + [part for _, part in tensors], norm)

        stats = []
        for bucket, part in zip(buckets, bulk, strict=True):
            if part.on_host:
                clip = factors[part.rule.grad_clip] if part.rule.clips_norm else None
                stats.append(host_step(bucket, part.grads, part.rule, _on(clip, part.grads[0])))
            else:
                stats.append(foreach_step(bucket, part.grads, part.rule, _on(skip_step, part.grads[0])))
        for p, part in tensors:
            init_state(p, part.rule, self.state[p])
            stats.append(reference_step(p, part.grads[0], self.state[p], part.rule, _on(skip_step, p)))
        if kernels is not None:
            flag = None if skip_step is None else _on(skip_step, kernels.params[0]).to(torch.float32)
            kernels.step(measure=False, norm=_on(norm, kernels.params[0]), loss=None, found_inf=flag)
            stats.append(kernels.stats())
        measured = sum(len(params) for _, rule, params in groups if rule.measures)
        self._record(stats, measured, skip_step)

    _read_flag_on_cpu = True  # tests clear it, to take the device's path without a GPU

    def _bucketed(self, groups: list[tuple[dict[str, Any], Rule, list[Tensor]]]) -> list[Bucket]:
        key = (
            len(self.state),
            *((*_features(rule), tuple(map(id, params))) for _, rule, params in groups),
        )
        if key != self._buckets_key:
            if len(self.state) < len(self._plan):  # someone cleared the state
                self._plan = Plan()
            self._buckets = self._plan.buckets(groups, self.state)
            self._buckets_key = (len(self.state), *key[1:])
        return self._buckets

    def _split(self, groups: Groups) -> tuple[KernelPlan | None, Groups]:
        """Which tensors the kernels step, bound to this step's gradients, and all the others."""
        if self._whole is not None:
            if self._whole_serves(groups):
                return self._whole, []
            if self._whole.capturing:
                raise RuntimeError("C3O: parameters or settings changed; call make_capturable() before this capture")
            self._whole = None
        first = next(p for _, _, params in groups for p in params)
        key = (
            len(self.state),
            self._force_kernels or uses_triton(first),
            *((id(g), g["foreach"], *_features(r), tuple(map(id, ps))) for g, r, ps in groups),
        )
        if key != self._split_key:
            if len(self.state) < len(self._plan):  # someone cleared the state
                self._plan, self._buckets_key, self._kernel_plans = Plan(), None, {}
            self._kernel_arenas, self._others = self._served(groups)
            self._split_key = (len(self.state), *key[1:])
        arenas, rest = self._kernel_arenas, self._others
        while arenas:
            plan_key = tuple((id(group), *compiled_settings(group), *_addresses(arena)) for arena, group in arenas)
            if plan_key not in self._kernel_plans:
                if len(self._kernel_plans) >= _MAX_PLANS:
                    self._kernel_plans.clear()
                self._kernel_plans[plan_key] = self._new_kernel_plan(arenas)
            plan = self._kernel_plans[plan_key]
            unfit = plan.bind([Rule.from_group(g) for g in plan.groups])
            if not unfit:
                return plan, rest
            out = {id(plan.arenas[k]) for k in unfit}
            for arena, group in arenas:
                if id(arena) in out:
                    with_grad = [p for p in arena.params if p.grad is not None]
                    rest = [*rest, (group, Rule.from_group(group), with_grad)]
            arenas = [x for x in arenas if id(x[0]) not in out]
        return None, rest

    def _whole_serves(self, groups: Groups) -> bool:
        """Bind the plan of `make_capturable`, if it is still that of this optimizer."""
        whole = self._whole
        assert whole is not None
        return (
            self._whole_key == self._settings_of(groups)
            and len(self.state) >= len(self._plan)
            and not whole.bind([Rule.from_group(g) for g in whole.groups])
            and whole.bound == sum(len(params) for _, _, params in groups)
        )

    @staticmethod
    def _settings_of(groups: Groups) -> tuple[Any, ...]:
        return tuple((id(g), g["foreach"], *_features(r), len(g["params"])) for g, r, _ in groups)

    _force_kernels = False  # tests set it, to run the kernels in Triton's interpreter without a GPU

    def _may_serve(self, group: dict[str, Any], rule: Rule, p: Tensor) -> bool:
        return (
            group["foreach"] is None
            and not rule.has_credit
            and (self._force_kernels or uses_triton(p))
            and p.dtype in _KERNEL_TYPES
            and rule.storage.name in _KERNEL_STORAGES
            and p.is_contiguous()
        )

    def _served(self, groups: Groups) -> tuple[list[tuple[Arena, dict[str, Any]]], Groups]:
        """Arenas, of one device, whose tensors are all fit for the kernels; and what is left of the groups."""
        arenas: list[tuple[Arena, dict[str, Any]]] = []
        rest: Groups = []
        for group, rule, params in groups:
            fit = [p for p in params if self._may_serve(group, rule, p)]
            fit = [p for p in fit if p.device == (arenas[0][0].device if arenas else fit[0].device)]
            taken: set[int] = set()
            for arena, _ in self._plan.place(fit, rule, self.state) if fit else ():
                if arena.storage.name in _KERNEL_STORAGES and all(p.is_contiguous() for p in arena.params):
                    arenas.append((arena, group))
                    taken |= set(map(id, arena.params))
            rest.append((group, rule, [p for p in params if id(p) not in taken]))
        return arenas, rest

    def _new_kernel_plan(self, arenas: list[tuple[Arena, dict[str, Any]]]) -> KernelPlan:
        from eco_llm.optim.c3o_triton import KernelPlan  # Triton is optional, and slow to import

        return KernelPlan(arenas)

    # ---- CUDA graphs ------------------------------------------------------------------------------------------

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can record the step: the kernels serve every parameter, on one GPU."""
        rules = [(group, Rule.from_group(group)) for group in self.param_groups]
        params = [(group, rule, p) for group, rule in rules for p in _trainable(group)]
        return (
            bool(params)
            and all(self._may_serve(group, rule, p) for group, rule, p in params)
            and len({p.device for _, _, p in params}) == 1
        )

    @torch.no_grad()
    def make_capturable(self) -> None:
        """Prepare for CUDA-graph capture, changing no parameter; call before each capture.

        Learning rates become one-element device tensors; state and tables are made for every parameter that requires a
        gradient; the kernels are compiled and loaded by a step of tiny tensors. From here on `metrics_tensor` returns
        not a copy but the tensor itself that every step refreshes: the same one every time.

        Raises:
            RuntimeError: not `capturable`.
        """
        if not self.capturable:
            raise RuntimeError("C3O: to be captured, every parameter must be served by the Triton kernels of one GPU")
        device = next(p.device for group in self.param_groups for p in _trainable(group))
        values = torch.empty(len(self.param_groups), dtype=torch.float32, device=device)
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if not (isinstance(lr, Tensor) and lr.dtype == torch.float32 and lr.device == device):
                group["lr"] = values[i].copy_(lr) if isinstance(lr, Tensor) else values[i].fill_(lr)
        groups = [(group, Rule.from_group(group), _trainable(group)) for group in self.param_groups]
        arenas, rest = self._served(groups)
        if any(params for _, _, params in rest):  # a state of another type was loaded
            raise RuntimeError("C3O: the loaded state cannot be stepped by the Triton kernels")
        key = tuple((id(group), *compiled_settings(group), *_addresses(arena)) for arena, group in arenas)
        if self._whole is None or key != self._whole_arenas:
            self._whole, self._whole_arenas = self._new_kernel_plan(arenas), key
            self._warm()
        self._whole_key = self._settings_of(groups)
        self._whole.bind([Rule.from_group(g) for g in self._whole.groups])
        self._whole.prepare_capture()

    def _warm(self) -> None:
        """Compile and load every kernel that a step will launch: neither is allowed during capture."""
        assert self._whole is not None
        twins = []
        for arena, group in zip(self._whole.arenas, self._whole.groups, strict=True):
            settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            tiny = torch.zeros(8, dtype=arena.param_dtype, device=arena.device)
            twins.append({**settings, "params": [tiny]})
        twin = C3O(twins)
        twin._force_kernels = True
        for group in twins:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        twin.guarded_step(torch.zeros((), device=self._whole.device))
        twin.metrics_tensor()

    def _unscale(self, parts: list[_Part]) -> None:
        """Divide gradients by a gradient scaler's factor, in place."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            inverse = scale.reshape(()).double().reciprocal()
            for part in parts:
                for _, grads in _alike(part.grads):
                    scale_(grads, _on(inverse, grads[0]))

    def _clip_gradients(self, parts: list[_Part], norm: Tensor | None) -> dict[float, Tensor]:
        """Clip, in place, in lists that share device, dtype and group, by the norm of all gradients.

        Returns:
            The factor of each `grad_clip`, which parts `on_host` are still to be multiplied by.
        """
        self._clip_groups, self._clip_scale = 0, None
        factors: dict[float, Tensor] = {}
        for grads, rule, bulk, on_host in parts:
            if rule.clips_norm:
                assert norm is not None
                if rule.grad_clip not in factors:
                    factors[rule.grad_clip] = clip_factor(norm, rule.grad_clip)
                self._clip_scale = factors[rule.grad_clip]
                if not on_host:
                    scale_(grads, _on(self._clip_scale, grads[0]))
                self._clip_groups += bulk
            elif rule.clips_value and bulk:
                self._clip_groups += clamp_(grads, rule.grad_clip)
            elif rule.clips_value:
                grads[0].clamp_(-rule.grad_clip, rule.grad_clip)
        return factors

    # ---- metrics ----------------------------------------------------------------------------------------------

    def _record(self, stats: list[Tensor], measured: int, skip_step: Tensor | None) -> None:
        total = torch.stack([_on(s, stats[0]) for s in stats]).sum(0)
        total[3] /= max(measured, 1)
        clip = torch.ones_like(total[:1]) if self._clip_scale is None else _on(self._clip_scale, total).reshape(1)
        total = torch.cat([total, clip.to(total.dtype)])
        if skip_step is not None:
            last = torch.zeros_like(total) if self._stats is None else self._stats
            total = torch.where(_on(skip_step, total), last, total)
        self._stats, self._kernel_metrics = total, None

    def metrics_tensor(self) -> tuple[tuple[str, ...], Tensor]:
        """What `metrics` reads, without reading it: (names, float32 [names] on the parameters' device).

        No sync: copy the tensor to the host asynchronously and look at it a step later. After `make_capturable` it is
        the same tensor every time, which steps keep up to date, replayed ones too.
        """
        if self._whole is not None:
            return (*_STATS, _COUNTS[2], *_COUNTS[:2]), self._whole.summary
        if self._kernel_metrics is not None:
            return (*_STATS, _COUNTS[2], *_COUNTS[:2]), self._kernel_metrics.summary.clone()
        stats = self._stats
        if stats is None:
            some = next(p for group in self.param_groups for p in group["params"])  # the first group may be empty
            stats = torch.zeros(5, device=some.device)
        counts = [torch.full((1,), float(n), device=stats.device) for n in (len(self._buckets), self._clip_groups)]
        return (*_STATS, _COUNTS[2], *_COUNTS[:2]), torch.cat([stats, *counts])

    def metrics(self) -> dict[str, float]:
        """Figures of the last applied step; the only method that synchronises with the device.

        c3o_trust_norm_skipped: tensors whose bound proved that the cap does not bind.
        c3o_trust_norm_exact: tensors under a trust region that needed their norms measured, or in a group
            with a sphere.
        c3o_trust_capped: tensors whose update the cap reduced; none that moved on its sphere.
        c3o_update_to_weight: mean over those tensors of |Δ| / max(|θ|, trust_floor sqrt(n)), or sphere · lr; with the
            Triton kernels, a tensor whose norm was skipped counts with the ratio last measured, and one that was
            measured before the norm of the gradients was known with that of the last step's clip factor.
        c3o_grad_clip_scale: factor that "norm" clipping applied (of the last group clipped); 1 if it did not.
        c3o_foreach_groups: buckets in a step.
        c3o_grad_clip_foreach_groups: buckets whose gradients were clipped, not counting those that a PyTorch without
            multi-tensor clamps clips one tensor after another.
        """
        names, values = self.metrics_tensor()
        return dict(zip(names, values.tolist(), strict=True))


class _Part(NamedTuple):
    """Gradients that are prepared by one call: a bucket's, or one tensor's in the for-loop path."""

    grads: list[Tensor]
    rule: Rule
    bulk: bool
    on_host: bool = False  # `host_step` takes it, and clips by the norm itself


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [g for p in params if (g := p.grad) is not None]


def _addresses(arena: Arena) -> tuple[int, ...]:
    """What a table of addresses depends on, but for parameters and gradients."""
    kept = (arena.error, arena.sphere_radius, *(arena.cache or ()))
    return (id(arena), *(0 if x is None else x.data_ptr() for x in kept))


def _features(rule: Rule) -> tuple[Any, ...]:
    """Settings that decide which state and which launches there are."""
    return (
        rule.has_credit,
        rule.nesterov,
        rule.may_skip_norms,
        rule.has_sphere,
        rule.weight_rounding,
        rule.error_bits,
    )


def _alike(grads: list[Tensor]) -> list[tuple[Any, list[Tensor]]]:
    """Gradients by device and dtype."""
    kinds: dict[Any, list[Tensor]] = {}
    for g in grads:
        kinds.setdefault((g.device, g.dtype), []).append(g)
    return list(kinds.items())


def _trainable(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.requires_grad and p.numel()]


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _on(x: Any, like: Tensor) -> Any:
    """`x`, None or a tensor, on the device of `like`."""
    # A copy to the host must have arrived before it is read; one to a device need not be waited for.
    return x if x is None or x.device == like.device else x.to(like.device, non_blocking=like.device.type != "cpu")
