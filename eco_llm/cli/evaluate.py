"""`eco_train evaluate`: score a checkpoint on the validation split it was trained beside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eco_llm.cli.parse import parse
from eco_llm.config import EvaluateConfig, RuntimeConfig

DESCRIPTION = "Validation loss (nats per token) and bits per byte of a checkpoint."


def run(args: Sequence[str]) -> int:
    """Print the score."""
    config = parse(EvaluateConfig, args, prog="eco_train evaluate", description=DESCRIPTION)
    config.validate()
    # Imported here and not above: help and refusals of flags have ended by now, and are quicker without.
    from eco_llm.runtime import set_cache_dirs
    from eco_llm.training.run_directory import RunDirectory

    run_directory = RunDirectory(Path(config.run))
    saved = run_directory.saved_config()
    set_cache_dirs()

    from eco_llm.runtime import Runtime
    from eco_llm.training.trained import load, score

    runtime = Runtime.detect(RuntimeConfig(device=config.device, dtype=saved.runtime.dtype))
    trained = load(run_directory, runtime, step=config.step)
    result = score(trained, batches=config.batches, batch_size=config.batch_size, seq_len=config.seq_len)
    if config.json:
        print(
            json.dumps(
                {
                    "run": config.run,
                    "step": trained.step,
                    "val_loss": result.loss,
                    "val_bits_per_byte": result.bits_per_byte,
                    "tokens": result.tokens,
                }
            )
        )
    else:
        print(
            f"step {trained.step}: validation loss {result.loss:.4f} nats/token,"
            f" {result.bits_per_byte:.4f} bits/byte over {result.tokens:,} tokens"
        )
    return 0
