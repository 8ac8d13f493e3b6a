"""A plan for people, and as plain data."""

from __future__ import annotations

from typing import Any

from eco_llm.instant.plan.search import Candidate, Plan, mode_text
from eco_llm.instant.plan.sizes import Shapes
from eco_llm.instant.plan.step import GIB, context_of

_HEADER = ("mode", "batch", "weights", "grads", "optim", "activ", "temp", "peak", "reserve", "total", "fits", "cost")


def as_text(plan: Plan) -> str:
    """The whole page."""
    job = plan.job
    lines = [
        f"{_model(job.model)} at {job.batch} × {job.seq_len} tokens on {plan.gib:g} GiB, estimated; GiB:",
        "",
        *_table(plan),
        "",
        "  peak     torch.cuda.max_memory_allocated, the sum of the five before it",
        "  reserve  the allocator's gaps, validation beside a CUDA graph, and what is outside the allocator: the CUDA",
        f"           context, libraries and kernels ({context_of(job) / GIB:.2f}, an H200's)",
        "  cost     time of a step against one that keeps everything, by its forward work",
        "  none, recompute and coupled give exact gradients, compress and fixed-point approximate ones; coupled is",
        "  another function of the same weights; fixed-point begins as recompute, whose memory it therefore needs",
        "",
    ]
    most: dict[str, int] = {}
    for c in plan.candidates:
        if c.fits:
            most[c.mode] = max(most.get(c.mode, 0), c.batch)
    batches = ", ".join(f"{mode} {batch}" for mode, batch in most.items()) or "none in any mode"
    lines.append(f"largest batch for this model: {batches}")
    for mode, model in plan.models:
        lines.append(
            f"largest model for this batch, {mode}: "
            + (_model(model) if model is not None else "none of these proportions")
        )
    if plan.chosen is None:
        lines.append(f"this batch does not fit with --instant-mode {plan.wanted}")
    else:
        lines.append(f"modes for this batch: {mode_text(plan.chosen)}")
    lines += ["", "eco_train @… with:", *("  " + flags for flags in flags_of(plan))]
    return "\n".join(lines)


def flags_of(plan: Plan) -> list[str]:
    """Flags to add to the given ones: for the given batch, and for the largest model."""
    found = []
    if plan.chosen is not None:
        found.append(f"--batch-size {plan.job.batch} --instant-mode {mode_text(plan.chosen)}")
    else:
        # The largest batch of a mode that is exact and the same function; failing that, of the coupled form, or any.
        preferred = {"none": 2, "recompute": 2, "coupled": 1}
        fitting = [c for c in plan.candidates if c.fits]
        best = max(fitting, key=lambda c: (preferred.get(c.mode, 0), c.batch), default=None)
        if best is not None:
            found.append(f"--batch-size {best.batch} --instant-mode {best.mode}")
    for mode, model in plan.models[-1:]:
        if model is not None:
            m = model
            found.append(
                f"--d-model {m.d_model} --n-heads {m.n_heads} --n-layers {m.n_layers} --kv-latent-dim {m.kv_latent_dim}"
                + (f" --q-latent-dim {m.q_latent_dim}" if m.q_latent_dim else "")
                + (f" --mlp-hidden-dim {m.mlp_hidden_dim}" if m.mlp_hidden_dim else "")
                + f" --batch-size {plan.job.batch} --instant-mode {mode}"
            )
    return found or ["(nothing fits; lower --batch-size, --seq-len or the model's size)"]


def as_data(plan: Plan) -> dict[str, Any]:
    """For `--json`; bytes."""
    return {
        "vram_gib": plan.gib,
        "batch_size": plan.job.batch,
        "seq_len": plan.job.seq_len,
        "parameters": plan.parameters,
        "candidates": [
            {
                "instant_mode": c.mode,
                "batch_size": c.batch,
                "fits": c.fits,
                **c.estimate.by_kind,
                "peak": c.estimate.peak,
                "reserve": c.estimate.reserve,
                "total": c.estimate.total,
                "extra_forwards": c.estimate.extra_forwards,
            }
            for c in plan.candidates
        ],
        "instant_mode": None if plan.chosen is None else mode_text(plan.chosen),
        "largest_models": [
            {"instant_mode": mode, "parameters": None if m is None else Shapes(m).parameters()}
            | ({} if m is None else {"d_model": m.d_model, "n_layers": m.n_layers, "n_heads": m.n_heads})
            for mode, m in plan.models
        ],
        "flags": flags_of(plan),
    }


def _model(model: Any) -> str:
    numbers = Shapes(model).parameters()
    size = f"{numbers / 1e9:.2f}B" if numbers >= 1e9 else f"{numbers / 1e6:.1f}M"
    return f"{size} parameters (D {model.d_model}, {model.n_layers} layers)"


def _table(plan: Plan) -> list[str]:
    rows = [_HEADER, *(_row(c) for c in plan.candidates)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _row(c: Candidate) -> tuple[str, ...]:
    e = c.estimate
    sizes = (*e.by_kind.values(), e.peak, e.reserve, e.total)
    cost = f"{e.relative_cost:.2f}"
    return (c.mode, str(c.batch), *(f"{size / GIB:.2f}" for size in sizes), "yes" if c.fits else "no", cost)
