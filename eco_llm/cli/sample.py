"""`eco_train sample`: continue a prompt with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from eco_llm.cli.parse import parse
from eco_llm.config import RuntimeConfig, SampleConfig


def run(args: Sequence[str]) -> int:
    """Load the run's model and print the prompt with its continuation."""
    config = parse(SampleConfig, args, prog="eco_train sample", description="Continue a prompt with a trained model.")
    config.validate()
    # Imported here and not above: help and refusals of flags have ended by now, and are quicker without.
    from eco_llm.runtime import set_cache_dirs
    from eco_llm.training.run_directory import RunDirectory

    run_directory = RunDirectory(Path(config.run))
    saved = run_directory.saved_config()  # refuses a folder that holds no run, before torch is imported
    set_cache_dirs()

    from eco_llm.runtime import Runtime
    from eco_llm.training.trained import continue_text, load

    runtime = Runtime.detect(RuntimeConfig(device=config.device, dtype=saved.runtime.dtype))
    trained = load(run_directory, runtime, step=config.step)
    text = continue_text(
        trained,
        config.prompt,
        config.tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    print(visible(text) if sys.stdout.isatty() else text)
    return 0


def visible(text: str) -> str:
    """Control characters spelt out: a model may write an escape sequence, and a terminal would obey it."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
