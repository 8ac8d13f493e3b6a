"""`eco_train train` (the default command)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig, to_dict

DESCRIPTION = "Train a SigmaLLM. Flags may come from @FILE or --args-file FILE; later ones override earlier ones."


@dataclass(frozen=True)
class TrainCommand:
    """Command line of `eco_train train`."""

    config: TrainConfig = field(default_factory=TrainConfig)
    print_config: bool = False
    """Print every setting as JSON and stop."""


def run(args: Sequence[str]) -> int:
    """Refuse what cannot work, cheapest check first and without torch; then train."""
    command = parse(TrainCommand, args, prog="eco_train train", description=DESCRIPTION)
    config = command.config
    config.validate()
    planned = with_modes(config)
    if command.print_config:
        print(json.dumps(to_dict(planned), indent=1))
        return 0
    # Imported here and not above: help and most refusals have ended by now, and are quicker without.
    from eco_llm.data.sources import check_sources
    from eco_llm.head_start import waking_gpu
    from eco_llm.imports import importing
    from eco_llm.runtime import set_cache_dirs
    from eco_llm.training.run_directory import RunDirectory

    check_sources(config.data, seq_len=config.training.seq_len)
    RunDirectory(Path(config.training.output_dir)).check(planned)
    set_cache_dirs()  # before torch
    with waking_gpu(config.runtime.device), importing("torch", freeze=True):
        from eco_llm.training.launch import train

    return int(train(config, command=sys.argv))


def with_modes(config: TrainConfig) -> TrainConfig:
    """`--instant-mode auto` as a plan without a GPU has it; `launch.train` chooses again when it knows what this one
    assumes.
    """
    if config.instant.instant_mode != "auto":
        return config
    from eco_llm.instant.plan.search import choose

    return choose(config)
