"""Muon for hidden matrices with AdamW for everything else, as one optimizer. Both rules are PyTorch's.

For comparison with C3O only. `torch.optim.Muon` takes 2-D parameters alone (K. Jordan, "Muon: an optimizer for hidden
layers in neural networks", 2024); `adjust_lr_fn="match_rms_adamw"` scales its update to AdamW's root-mean-square
(arXiv 2502.16982), so that one learning rate serves both halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class MuonWithAdamW(Optimizer):
    """Two optimizers over one list of groups and one state, so that state dicts have PyTorch's usual form.

    Args:
        groups: dictionaries with "params" and "name"; groups named "matrix" go to Muon, the others to AdamW.
        lr, weight_decay: defaults of both rules.
        betas, eps: AdamW's; Muon keeps PyTorch's momentum of 0.95 with Nesterov.

    Raises:
        ValueError: a parameter in a "matrix" group is not 2-D.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        muon = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__([{**(muon if g["name"] == "matrix" else adamw), **g} for g in groups], {})
        self._bind()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by the constructor only.

        Raises:
            RuntimeError: called later; neither rule would ever step such a group.
        """
        if hasattr(self, "_rules"):
            raise RuntimeError("MuonWithAdamW takes all its groups when it is made; make a new one")
        super().add_param_group(param_group)

    def _bind(self) -> None:
        """(Re)create the two rules over this object's groups and state: they share, nothing is copied."""
        self._rules: list[Optimizer] = []
        for cls, is_muon in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
            groups = [g for g in self.param_groups if (g["name"] == "matrix") == is_muon]
            if groups:
                rule = cls(groups)  # fills in the settings a group lacks, in place
                rule.param_groups, rule.state = groups, self.state
                self._rules.append(rule)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by copying, unpickling and loading, with new groups and state."""
        super().__setstate__(state)
        self._bind()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both rules; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule in self._rules:
            rule.step()
        return loss
