"""What fits: the largest batch, the largest model, the cheapest mode per block. All by `estimate`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from eco_llm.config import MEMORY_MODES, InstantConfig, SigmaConfig, TrainConfig
from eco_llm.errors import UserError
from eco_llm.instant.plan.sizes import MAX_CHANNELS, STATE_BYTES, Job, Shapes, round_to
from eco_llm.instant.plan.step import GIB, Estimate, estimate

MAX_BATCH = 65_536
MAX_LAYERS = 1024
NEAR = 4
"""How many numbers are tried beyond the first that does not fit."""


def job_of(config: TrainConfig) -> Job:
    """The job that validated settings describe; `auto` modes are planned as `none`.

    Raises:
        UserError: a setting whose memory is not foretold.
    """
    o, r, t = config.optimizer, config.runtime, config.training
    if r.device == "cpu":
        raise UserError("--device cpu: a plan is for the memory of a CUDA GPU")
    if o.optimizer == "muon":
        raise UserError("--optimizer muon: the memory of its step is not foretold; c3o and adamw are")
    if o.optimizer == "c3o" and config.c3o.c3o_credit_gain > 0:
        raise UserError("--c3o-credit-gain: its step is not C3O's kernels, and its memory is not foretold")
    instant = config.instant
    return Job(
        model=config.model,
        batch=t.batch_size,
        seq_len=t.seq_len,
        modes=modes_of("none" if instant.instant_mode == "auto" else instant.instant_mode, config.model),
        grad_accum=t.grad_accum,
        optimizer=o.optimizer,
        state_bytes=STATE_BYTES[config.c3o.c3o_state_dtype],
        weight_bytes=2 if r.weights_dtype == "bf16" else 4,
        error_bytes=1 if config.c3o.c3o_error_bits else 0,
        compute_bytes=4 if r.dtype == "fp32" else 2,
        compiled={"on": True, "off": False}.get(r.torch_compile),
        graph=r.cuda_graph != "off" and config.excludes_cuda_graph() is None,
        release=o.gradient_release,
        bits=4 if instant.instant_bits == "4" else 8,
        evaluates=t.eval_interval > 0,
        expandable=_segments_grow(),
        probed=instant.instant_bits == "auto",
    )


def _segments_grow() -> bool:
    """What PyTorch would read in the environment of this process."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + "," + os.environ.get("PYTORCH_ALLOC_CONF", "")
    return "expandable_segments:true" in settings.lower().replace(" ", "")


def modes_of(text: str, model: SigmaConfig) -> tuple[str, ...]:
    """The modes that an `--instant-mode` gives a model's blocks."""
    return InstantConfig(instant_mode=text).block_modes(model.mixer_pattern)


def mode_text(modes: tuple[str, ...]) -> str:
    """As `--instant-mode` takes it."""
    runs = [(mode, len(list(run))) for mode, run in groupby(modes)]
    return runs[0][0] if len(runs) == 1 else ",".join(f"{mode}*{count}" for mode, count in runs)


def fits(job: Job, gib: float) -> bool:
    """Whether the job, allocator's gaps and CUDA context included, stays within `gib` GiB."""
    return estimate(job).total <= gib * GIB


def last_that_fits(fit: Callable[[int], bool], most: int) -> int:
    """The largest n in 1 … most with fit(n), where `fit` holds up to some number; 0 if 1 does not fit.

    By doubling and bisection. Estimates hold so but for the allocator's gaps, by which a larger number may fit where a
    smaller did not: therefore NEAR more are tried beyond the first that does not.
    """
    if not fit(1):
        return 0
    good, bad = 1, 2
    while bad <= most and fit(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fit(middle) else (good, middle)
    return next((n for n in range(min(bad + NEAR, most), bad, -1) if fit(n)), good)


def largest_batch(job: Job, gib: float) -> int:
    """Sequences in one forward pass; 0 if not even one fits."""
    most = min(MAX_BATCH, 2**31 // job.seq_len)
    return last_that_fits(lambda batch: fits(job.replace(batch=batch), gib), most)


def cheapest_modes(job: Job, gib: float) -> tuple[str, ...] | None:
    """The exact modes with the least extra work that fit: everything kept; the first k blocks recomputed, k as small
    as can be (backward reaches them last, when later blocks have freed theirs); all; then the coupled form, which is
    another function of the same weights. None if nothing fits.
    """
    count = len(job.modes)

    def modes(recomputed: int) -> tuple[str, ...]:
        return ("recompute",) * recomputed + ("none",) * (count - recomputed)

    if fits(job.replace(modes=modes(0)), gib):
        return modes(0)
    kept = last_that_fits(lambda n: fits(job.replace(modes=modes(count - n)), gib), count - 1)
    for found in (modes(count - kept), ("coupled",) * count):
        if fits(job.replace(modes=found), gib):
            return found
    return None


def scaled(model: SigmaConfig, size: int) -> SigmaConfig:
    """The model of the same proportions with `size` heads: the rule by which `largest_model` grows and shrinks.

    The width of a head stays; D is heads times that (without attention: times Mamba's heads, not expanded). Depth,
    latents and a pinned MLP width follow D in proportion (latents in multiples of 32, the MLP of 64). D stops where the
    kernels do (expand · D ≤ 8192); sizes beyond add depth alone, as much as a head more would have added.
    """
    attends = "mla" in model.mixer_pattern
    width = model.d_model // model.n_heads if attends else model.mamba_head_dim
    widest = max(1, MAX_CHANNELS // model.mamba_expand // width)
    heads = min(size, widest) if "mamba" in model.mixer_pattern else size
    now = model.d_model / width
    ratio = heads / now
    return dataclasses.replace(
        model,
        d_model=heads * width,
        n_heads=heads if attends else model.n_heads,
        n_layers=max(1, round(model.n_layers * size / now)),
        kv_latent_dim=round_to(model.kv_latent_dim * ratio, 32),
        q_latent_dim=round_to(model.q_latent_dim * ratio, 32) if model.q_latent_dim else 0,
        mlp_hidden_dim=round_to(model.mlp_hidden_dim * ratio, 64) if model.mlp_hidden_dim else 0,
    )


def largest_model(job: Job, mode: str, gib: float) -> SigmaConfig | None:
    """The largest `scaled` model that fits at this job's batch with one mode for all blocks; None if none does."""
    models = [model for size in range(1, 4096) if _can_be_built(model := scaled(job.model, size))]

    def fit(number: int) -> bool:
        model = models[number - 1]
        return fits(job.replace(model=model, modes=modes_of(mode, model)), gib)

    best = last_that_fits(fit, len(models)) if models else 0
    return models[best - 1] if best else None


def _can_be_built(model: SigmaConfig) -> bool:
    """Not all sizes can: Mamba's heads must divide its channels, and the kernels have limits."""
    if model.n_layers > MAX_LAYERS:
        return False
    try:
        model.validate()
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Candidate:
    """One line of a plan."""

    mode: str
    batch: int
    estimate: Estimate
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer to `eco_train plan`."""

    job: Job
    gib: float
    wanted: str
    """`--instant-mode` as it was given."""
    candidates: tuple[Candidate, ...]
    """The given batch in every mode, and every mode's largest batch."""
    chosen: tuple[str, ...] | None
    """Modes for the given batch; None if it fits in none."""
    models: tuple[tuple[str, SigmaConfig | None], ...]
    """The largest model at the given batch, by mode."""

    @property
    def parameters(self) -> int:
        """Of the given model."""
        return Shapes(self.job.model).parameters()


def make_plan(config: TrainConfig) -> Plan:
    """Everything that `eco_train plan` prints.

    Raises:
        UserError: no `--vram-gib`, or a setting whose memory is not foretold.
    """
    gib, wanted, job = _budget(config), config.instant.instant_mode, job_of(config)
    estimate(job)  # refuses a shape
    chosen = cheapest_modes(job, gib) if wanted == "auto" else job.modes if fits(job, gib) else None
    modes = list(MEMORY_MODES)
    for text in (wanted, mode_text(chosen) if chosen else wanted):
        if text not in (*modes, "auto"):
            modes.insert(1, text)
    candidates: list[Candidate] = []
    for mode in modes:
        one = job.replace(modes=modes_of(mode, job.model))
        most = largest_batch(one, gib)
        for batch in sorted({job.batch, most} - {0}):
            found = estimate(one.replace(batch=batch))
            candidates.append(Candidate(mode, batch, found, found.total <= gib * GIB))
    for_models = ("none", "recompute", "coupled") if wanted == "auto" else (wanted,)
    models = tuple((mode, largest_model(job, mode, gib)) for mode in for_models if "*" not in mode)
    return Plan(job, gib, wanted, tuple(candidates), chosen, models)


def choose(config: TrainConfig, *, model: SigmaConfig | None = None, compute_bytes: int | None = None) -> TrainConfig:
    """The same settings, `--instant-mode auto` replaced by the modes that it comes to; others come back as they are.

    Args:
        model: the shape with the vocabulary of a given tokenizer, if that is known by now.
        compute_bytes: of a number in a product, 2 or 4, likewise; else `--dtype auto` is taken for bf16.

    Raises:
        UserError: no `--vram-gib`, nothing fits, or a setting whose memory is not foretold.
    """
    if config.instant.instant_mode != "auto":
        return config
    gib, job = _budget(config), job_of(config)
    job = job.replace(model=model or job.model, compute_bytes=compute_bytes or job.compute_bytes)
    modes = cheapest_modes(job, gib)
    if modes is None:
        least = min(estimate(job.replace(modes=modes_of(mode, job.model))).total for mode in ("recompute", "coupled"))
        raise UserError(
            f"--instant-mode auto: this model at --batch-size {job.batch} × --seq-len {job.seq_len} takes"
            f" {least / GIB:.1f} GiB at least, --vram-gib is {gib:g}; `eco_train plan` with these flags says what fits"
        )
    return dataclasses.replace(config, instant=dataclasses.replace(config.instant, instant_mode=mode_text(modes)))


def _budget(config: TrainConfig) -> float:
    if not config.instant.vram_gib:
        raise UserError("--vram-gib is needed: the GPU's memory that training may take, as in --vram-gib 8")
    return config.instant.vram_gib
