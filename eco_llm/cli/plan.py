"""`eco_train plan`: what fits into a GPU's memory, estimated without one. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig

DESCRIPTION = "Estimate the memory of a training on a CUDA GPU of --vram-gib GiB: any flag of train, and @FILE."


@dataclass(frozen=True)
class PlanCommand:
    """Command line of `eco_train plan`."""

    config: TrainConfig = field(default_factory=TrainConfig)
    json: bool = False
    """Print one JSON object instead of a page."""


def run(args: Sequence[str]) -> int:
    """Print the plan."""
    command = parse(PlanCommand, args, prog="eco_train plan", description=DESCRIPTION)
    command.config.validate()
    from eco_llm.instant.plan.search import make_plan
    from eco_llm.instant.plan.text import as_data, as_text

    plan = make_plan(command.config)
    print(json.dumps(as_data(plan)) if command.json else as_text(plan))
    return 0
