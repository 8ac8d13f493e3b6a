"""Whether two sides do the same work: the question before any comparison of their speed.

Three answers, from the first steps of both sides, which train without learning-rate warm-up (docs/compare.md has the
measurements behind every limit):

loss of step 1            the untrained models, on the same batch: forward
gradient norm of step 1   backward, before anything was updated
progress                  how far the loss has moved since step 1, at each later step: the optimizer, and that no step
                          was skipped. Both sides see the same batches, so what batches differ by cancels.

With one step there is no progress to compare, and the gate says that it was not applied to the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from eco_llm.config import BEFORE_THEM, SigmaConfig, TrainConfig, flag_of, flatten
from eco_llm.errors import UserError

Records = Sequence[dict[str, Any]]

LEAST_PROGRESS = 0.01
"""Share of the first loss by which the last must differ from it. Below, batches differ by as much as was learned."""

# What decides which tokens a step sees; two sides that differ in one of these do different work.
_SAME_TOKENS = ("data", "text_field", "tokenizer", "val_fraction", "vocab_size", "seed", "seq_len")
# What decides how weights move by intention, and not only how fast or in how much memory.
_LEARNING = (
    "optimizer", "lr", "weight_decay", "beta1", "beta2", "eps", "grad_clip", "grad_clip_mode", "schedule",
    "decay_fraction", "min_lr_ratio", "c3o_trust_radius", "c3o_sphere", "c3o_credit_gain", "c3o_nesterov",
)  # fmt: skip

# Settings of the model that change how its function is computed, and nothing else.
_SAME_FUNCTION = ("mamba_chunk", "loss_chunk_tokens")


@dataclass(frozen=True)
class Allowed:
    """Largest differences that are still the same work, each as a share."""

    loss: float
    """Of the losses of step 1, of their value."""
    grad_norm: float
    """Of the gradient norms of step 1, of their value."""
    progress: float
    """Of the progress, mean over the later steps, of its value at the last step."""

    @staticmethod
    def of(dtypes: Iterable[str], given: float = 0.0) -> Allowed:
        """The limits for sides that compute in these types; `given` (--gate-tolerance) sets the first, and widens
        the others if it is larger."""
        limits = [_LIMITS[dtype] for dtype in dtypes]
        loss, grad_norm, progress = (max(column) for column in zip(*limits, strict=True))
        return Allowed(given or loss, max(given, grad_norm), max(given, progress))


_LIMITS = {"float32": (1e-4, 0.02, 0.02), "bfloat16": (2e-3, 0.02, 0.02)}


def check_same_tokens(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Refuse settings of two sides whose steps would not see the same tokens.

    Raises:
        UserError: naming the first setting that makes them differ.
    """
    for name in _SAME_TOKENS:
        if a.get(name) != b.get(name):
            raise UserError(
                f"{flag_of(name)} is {_shown(a.get(name))} in A and {_shown(b.get(name))} in B: their steps would not"
                " see the same tokens"
            )
    tokens = [int(s["batch_size"] * s["seq_len"] * s["grad_accum"]) for s in (a, b)]
    if tokens[0] != tokens[1]:
        raise UserError(
            f"A has {tokens[0]} tokens a step and B {tokens[1]} (--batch-size × --seq-len × --grad-accum): compare"
            " equal work, or measure batch sizes with `eco_train sweep`"
        )


def check_same_learning(a: dict[str, Any], b: dict[str, Any], steps: int) -> None:
    """Refuse sides that would learn differently by intention, unless only their first step is asked about.

    Raises:
        UserError: naming the first such setting.
    """
    standing = flatten(TrainConfig()) | BEFORE_THEM  # a side of an earlier version lacks what was added since
    a, b = standing | a, standing | b
    differing = [name for name in _LEARNING if a[name] != b[name]]
    if differing and steps > 1:
        name = differing[0]
        raise UserError(
            f"{flag_of(name)} is {_shown(a[name])} in A and {_shown(b[name])} in B: they would learn differently,"
            " which a comparison of speed cannot judge; --gate-steps 1 compares speed alone, with the gate not applied"
            " to the optimizer"
        )


def check_same_network(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    """Refuse sides that are not the same function of the same weights, unless a tolerance was asked for.

    The gate's limits are those of rounding: some such settings (`--rope-theta`) move a few steps' losses by less.

    Raises:
        UserError: naming the first such setting.
    """
    standing = flatten(TrainConfig()) | BEFORE_THEM
    a, b = standing | a, standing | b
    names = [f.name for f in fields(SigmaConfig) if f.name not in _SAME_FUNCTION]
    differing = [name for name in names if a[name] != b[name]]
    if differing and not tolerance:
        name = differing[0]
        raise UserError(
            f"{flag_of(name)} is {_shown(a[name])} in A and {_shown(b[name])} in B: two networks, which the gate could"
            " take for one; --gate-tolerance X says how much their first losses may differ"
        )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Gate:
    """Whether the sides compute the same."""

    passed: bool
    reason: str | None
    """Why it did not pass, in one line."""
    covers: str
    steps: int
    tolerance: float
    """Of `loss_difference`."""
    loss_difference: float
    grad_norm_tolerance: float
    grad_norm_difference: float
    progress_tolerance: float
    progress_difference: float | None
    """Mean difference of the two sides' progress over the later steps, as a share of the larger progress at the last
    step; None with one step."""
    progress_a: float | None
    progress_b: float | None
    """How far the loss has fallen from the first to the last step, nats."""
    losses_a: list[float]
    losses_b: list[float]

    @staticmethod
    def judge(a: Records, b: Records, steps: int, allowed: Allowed) -> Gate:
        """Compare steps 1 … `steps` of both sides; NaN equals nothing."""
        losses = [[float(r["loss"]) for r in records[:steps]] for records in (a, b)]
        norms = [float(records[0]["grad_norm"]) for records in (a, b)]
        loss = _relative(losses[0][0], losses[1][0])
        norm = _relative(*norms)
        fallen = [[of[0] - x for x in of] for of in losses]
        moved = max(abs(side[-1]) for side in fallen)
        # The mean and not the largest: near the edge of stability a difference in the last bit may decide whether one
        # step is a bad one, and the next losses are close again. What learns differently is apart from then on.
        apart = sum(abs(x - y) for x, y in zip(*fallen, strict=True)) / max(1, steps - 1)
        if not all(map(math.isfinite, (*losses[0], *losses[1], *norms))):
            loss = norm = apart = math.inf
        progress = apart / moved if moved else math.inf if apart else 0.0
        reason = None
        if math.isinf(loss):
            reason = f"a loss or gradient norm of the first {steps} steps is not finite"
        elif loss > allowed.loss:
            reason = f"the losses of step 1 differ by {loss:.2g} of their value, {allowed.loss:g} is allowed"
        elif norm > allowed.grad_norm:
            reason = (
                f"the gradient norms of step 1 differ by {norm:.2g} of their value, {allowed.grad_norm:g} is allowed"
            )
        elif steps > 1 and moved < LEAST_PROGRESS * abs(losses[0][0]):
            reason = (
                f"the gate could not tell: in {steps} steps the loss moved by {moved:.2g} from {losses[0][0]:.4g}, less"
                f" than {LEAST_PROGRESS:.0%}; more --gate-steps or a higher --lr for both show more, --gate-steps 1"
                " compares speed alone"
            )
        elif steps > 1 and progress > allowed.progress:
            reason = (
                f"in {steps} steps the loss fell by {fallen[0][-1]:.4g} in A and by {fallen[1][-1]:.4g} in B, on"
                f" average {progress:.2g} of that apart, {allowed.progress:g} is allowed"
            )
        several = steps > 1
        return Gate(
            passed=reason is None, reason=reason, steps=steps,
            covers="forward, backward, optimizer" if several else "forward, backward; not applied to the optimizer",
            tolerance=allowed.loss, loss_difference=loss,
            grad_norm_tolerance=allowed.grad_norm, grad_norm_difference=norm,
            progress_tolerance=allowed.progress, progress_difference=progress if several else None,
            progress_a=fallen[0][-1] if several else None, progress_b=fallen[1][-1] if several else None,
            losses_a=losses[0], losses_b=losses[1],
        )  # fmt: skip

    def sentence(self) -> str:
        """A green gate for a person."""
        loss, norm = f"{self.loss_difference:.1g}", f"{self.grad_norm_difference:.1g}"
        first = f"gate: step 1 agrees, loss to {loss} and gradient norm to {norm}"
        if self.progress_difference is None:
            return f"{first}; not applied to the optimizer (--gate-steps 1)"
        return (
            f"{first}; in {self.steps} steps the loss fell by {self.progress_a:.3g} in A and {self.progress_b:.3g} in B"
            f" ({self.progress_difference:.1g} apart, {self.progress_tolerance:g} allowed)"
        )


def _relative(x: float, y: float) -> float:
    """Difference of two numbers as a share of the larger."""
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


class NotComparable(Exception):
    """The gate is not green."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(f"{gate.reason}: A and B are not shown to compute the same, so there is no verdict on speed")
        self.gate = gate
