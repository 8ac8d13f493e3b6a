"""Learning-rate schedules as one pure function of the step. Torch-free.

Steps count from 0; `lr_at(step, …)` is the rate *used by* that step, so the last step is `total_steps - 1`.

    warm-up    (step + 1) / W of the peak, for the first W steps: the first step already moves, step W - 1 is the
               peak. W = min(warmup_steps, max(1, total_steps // 10)), or 0 if warmup_steps is 0.
    cosine     half a cosine from the peak to the minimum, which the last step uses (arXiv 1608.03983)
    wsd        the peak, then a straight line to the minimum over the last `decay_fraction` of all steps; the last
               step uses the minimum (warmup-stable-decay, arXiv 2404.06395)
    constant   the peak

The minimum is `min_lr_ratio` of the peak; steps past the end use what the last step used.
"""

from __future__ import annotations

import math

from eco_llm.config import OptimizerConfig


def warmup_length(config: OptimizerConfig, total_steps: int) -> int:
    """Steps of warm-up W in a run of `total_steps`."""
    if config.warmup_steps == 0:
        return 0
    return min(config.warmup_steps, max(1, total_steps // 10))


def lr_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) in a run of `total_steps`.

    Raises:
        ValueError: `step` is negative or `total_steps` is not positive.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"lr_at: need step >= 0 and total_steps >= 1, got {step} and {total_steps}")
    warmup = warmup_length(config, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    step = min(step, total_steps - 1)
    if config.schedule == "cosine":
        # The peak is at step W - 1 (or at 0 without warm-up), the minimum at the last step.
        peak = max(warmup - 1, 0)
        progress = (step - peak) / max(1, total_steps - 1 - peak)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd":
        decay = min(round(config.decay_fraction * total_steps), total_steps - warmup)
        into = step - (total_steps - decay) + 1
        share = 1.0 - into / decay if into > 0 else 1.0
    else:
        return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
