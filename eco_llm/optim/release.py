"""Gradient release: the update of a part of the model taken inside backward, as soon as that part's gradients exist.

Backward walks from the loss to the embedding. When the last gradient of a unit (a block, say) has been accumulated, its
own optimizer steps and its gradients are freed, so that those of two units never exist together: what a model of n
blocks needs for gradients is a block's worth.

- It may change weights under a running backward: every node that reads a weight also makes a gradient of it, so that
  the weight's gradient is complete only after all its readers are done.
- A hook on each parameter counts (`register_post_accumulate_grad_hook`). It fires in whatever backward accumulates the
  gradient, nested ones that recompute a block among them, and on the stream of that gradient.
- The verdict travels on the device: a unit is given the loss, or NaN once a unit before it was refused. The host waits
  for nothing (Muon, which reads every verdict, excepted).
- A unit whose gradients are not finite stops itself and those after it; those before it (later layers) have been
  updated already. `applied` is then 0 all the same. A loss that is not finite stops all, as in an ordinary step.

What cannot be had this way: docs/gradient_release.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eco_llm.config import C3OConfig, OptimizerConfig
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.update import Update, UpdateResult

_MEAN, _LEAST = "c3o_update_to_weight", "c3o_grad_clip_scale"  # over units; other metrics are counts, and add up
_COUNTED = ("c3o_trust_norm_skipped", "c3o_trust_norm_exact")  # the tensors that the mean is over


class _Unit:
    """Parameters that step together, and what is still missing of their gradients."""

    def __init__(self, params: list[Tensor], update: Update, groups: list[int], indices: list[int]) -> None:
        self.params, self.update = params, update
        self.groups = groups
        """Of each of the optimizer's groups, its place among the model's."""
        self.indices = indices
        """Of each of the optimizer's parameters, in its order, the place among the model's."""
        self.missing: set[int] = set()
        self.stepped = False


def _hook(update: weakref.ref[ReleasedUpdate], number: int) -> Callable[[Tensor], None]:
    """What a parameter of that unit calls. A parameter holds its hooks where Python's collector cannot see them, so a
    hook that held the update, and with it the parameters, would keep the whole model alive for ever."""

    def arrived(parameter: Tensor) -> None:
        if (alive := update()) is not None:
            alive._arrived(number, parameter)

    return arrived


class ReleasedUpdate:
    """`Update` for a model that is stepped unit by unit inside backward: the same numbers, the same state dict.

    Args:
        groups: the model's parameter groups, as `build_optimizer` takes them; none is empty.
        units: lists of parameters that step together; every parameter of the groups in exactly one. Best in the order
            in which backward completes them.
        config: rule and settings; clips by value or not at all (`TrainConfig.validate`).
        c3o: settings of C3O.
        device: where the parameters live.
        guard: what a unit is told in place of the loss, asked when it is about to step; NaN refuses it and all after it
            (INSTANT's gate, whose verdicts come block by block).

    Raises:
        ValueError: clipping by norm; a parameter in no unit, or in two; an empty group.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        units: Sequence[Sequence[nn.Parameter]],
        config: OptimizerConfig,
        c3o: C3OConfig,
        device: torch.device | str,
        *,
        guard: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> None:
        self._guard = guard
        if config.grad_clip > 0 and config.grad_clip_mode == "norm":
            raise ValueError("gradient release: the norm of all gradients is not known when the first are used")
        if not all(group["params"] for group in groups):
            raise ValueError("gradient release: a parameter group is empty")
        everything = [p for group in groups for p in group["params"]]
        if sorted(map(id, everything)) != sorted(id(p) for unit in units for p in unit):
            raise ValueError("gradient release: every parameter must be in one group and in one unit")
        self._sizes = [len(group["params"]) for group in groups]
        index = {id(p): i for i, p in enumerate(everything)}
        self._units: list[_Unit] = []
        for members in units:
            inside = {id(p) for p in members}
            parts = [(i, [p for p in group["params"] if id(p) in inside]) for i, group in enumerate(groups)]
            parts = [(i, params) for i, params in parts if params]
            own = [{**groups[i], "params": params} for i, params in parts]
            update = Update(build_optimizer(own, config, c3o, device), config)
            order = [p for _, params in parts for p in params]
            self._units.append(_Unit(order, update, [i for i, _ in parts], [index[id(p)] for p in order]))
        self._lr: Tensor | None = None  # after make_capturable: one number for all units
        self._walking = False
        self._apply = False
        self._verdict: Tensor | None = None
        """0-dim: finite as long as no unit of this step was refused."""
        self._norms: list[Tensor] = []
        for number, unit in enumerate(self._units):
            for p in unit.params:
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_hook(weakref.ref(self), number))

    @property
    def optimizers(self) -> list[Optimizer]:
        """One a unit."""
        return [unit.update.optimizer for unit in self._units]

    # ---- backward, and the updates inside it --------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, apply each unit's as soon as they are there, and free them.

        Args:
            loss: 0-dim; not finite, nothing is changed.

        Raises:
            RuntimeError: a parameter had another gradient after its unit had stepped (it is used in two parts that are
                differentiated apart). Its unit has been updated without it.
        """
        self._walk(loss, apply=True)

    def rehearse(self, loss: Tensor) -> None:
        """`backward` that frees the gradients and applies none: what compiles and tunes, and changes nothing."""
        self._walk(loss, apply=False)

    def _walk(self, loss: Tensor, *, apply: bool) -> None:
        self._apply, self._norms = apply, []
        self._verdict = loss.detach()
        for unit in self._units:
            unit.missing, unit.stepped = {id(p) for p in unit.params if p.requires_grad}, False
        self._walking = True
        try:
            loss.backward()
            for unit in self._units:  # a parameter that had no part in this loss has no gradient to wait for
                if not unit.stepped and any(p.grad is not None for p in unit.params):
                    self._finish(unit)
        finally:
            self._walking = False

    def _arrived(self, number: int, parameter: Tensor) -> None:
        """A parameter of a unit has its gradient."""
        unit = self._units[number]
        if not self._walking:  # somebody else's backward
            return
        if unit.stepped:
            raise RuntimeError("gradient release: a gradient came after its unit was updated; use an ordinary step")
        unit.missing.discard(id(parameter))
        if not unit.missing:
            self._finish(unit)

    def _finish(self, unit: _Unit) -> None:
        """Step one unit, unless the step is refused already, and free its gradients."""
        unit.stepped = True
        if self._apply:
            assert self._verdict is not None
            result = unit.update.step(self._guard(self._verdict))
            self._norms.append(result.grad_norm)
            self._verdict = torch.where(result.applied, self._verdict, torch.nan)
        unit.update.zero_grad()

    def step(self, loss: Tensor) -> UpdateResult:
        """What the last `backward` did. The norm is that of all units together; `applied` says that none was refused.

        Args:
            loss: the one that `backward` was given; it has been judged there.

        Raises:
            ValueError: no parameter had a gradient.
        """
        norms, verdict = self._norms, self._verdict
        self._norms, self._verdict = [], None
        if not norms or verdict is None:
            raise ValueError("gradient release: no gradients; was backward() of this object called?")
        return UpdateResult(torch.linalg.vector_norm(torch.stack(norms)), torch.isfinite(verdict))

    def zero_grad(self) -> None:
        """Drop gradients that are left, if any."""
        for unit in self._units:
            unit.update.zero_grad()

    # ---- CUDA graphs --------------------------------------------------------------------------------------------

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can record `backward` and `step`: every unit's update can be."""
        return all(unit.update.capturable for unit in self._units)

    @torch.no_grad()
    def make_capturable(self) -> None:
        """As `Update.make_capturable`; the units then share one learning rate on the device.

        Raises:
            RuntimeError: not `capturable`.
        """
        groups = [group for unit in self._units for group in unit.update.optimizer.param_groups]
        if self.capturable:
            lr = groups[0]["lr"]
            if self._lr is None:
                self._lr = torch.empty(1, dtype=torch.float32, device=groups[0]["params"][0].device)
            if lr is not self._lr:
                _ = self._lr.copy_(lr) if isinstance(lr, Tensor) else self._lr.fill_(lr)
            for group in groups:
                group["lr"] = self._lr
        for unit in self._units:
            unit.update.make_capturable()

    def set_lr(self, lr: float) -> None:
        """Learning rate of every group from the next step on."""
        if self._lr is not None:
            self._lr.fill_(lr)
            return
        for unit in self._units:
            unit.update.set_lr(lr)

    # ---- metrics ------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The optimizer's own figures over all units; empty for PyTorch's. Synchronises with the device."""
        names, values = self.metrics_tensor()
        return dict(zip(names, values.tolist(), strict=True))

    def metrics_tensor(self) -> tuple[tuple[str, ...], Tensor]:
        """`metrics` without the wait: (names, float32 [names] on the device)."""
        parts = [unit.update.metrics_tensor() for unit in self._units]
        names = parts[0][0]
        if not names:
            return names, parts[0][1]
        rows = torch.stack([values for _, values in parts])
        # Column by column: a list as an index would be copied to the device, and waited for.
        weights = torch.stack([rows[:, names.index(name)] for name in _COUNTED]).sum(0)
        total = rows.sum(0)
        mean, least = names.index(_MEAN), names.index(_LEAST)
        total[mean] = (rows[:, mean] * weights).sum() / weights.sum().clamp(min=1)
        total[least] = rows[:, least].amin()
        return names, total

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What `Update.state_dict` of one optimizer over all groups would be."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = [{} for _ in self._sizes]
        for unit in self._units:
            own = unit.update.state_dict()
            state |= {unit.indices[i]: value for i, value in own["state"].items()}
            for place, group in zip(unit.groups, own["param_groups"], strict=True):
                groups[place] = group
        first = 0
        for group, size in zip(groups, self._sizes, strict=True):
            group["params"] = list(range(first, first + size))
            first += size
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict`, or an ordinary `Update`'s, gave; unit by unit, so that nothing is held twice.

        Raises:
            ValueError: it has other groups of parameters.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != self._sizes:
            raise ValueError("gradient release: the saved optimizer has other parameter groups than this model")
        keys = list(chain.from_iterable(group["params"] for group in saved))
        for unit in self._units:
            sizes = iter([len(group["params"]) for group in unit.update.optimizer.param_groups])
            places, first = [], 0
            for place in unit.groups:
                size = next(sizes)
                places.append({**saved[place], "params": list(range(first, first + size))})
                first += size
            values = {i: keys[at] for i, at in enumerate(unit.indices)}
            own = {i: state_dict["state"][key] for i, key in values.items() if key in state_dict["state"]}
            unit.update.load_state_dict({"state": own, "param_groups": places})
        if self._lr is not None:
            self.make_capturable()
