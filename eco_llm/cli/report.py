"""`eco_train report`: PROOF_OF_EVOLUTION.md and report.html from run directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from eco_llm.cli.parse import parse
from eco_llm.config import ReportConfig
from eco_llm.errors import UserError

DESCRIPTION = (
    "Write PROOF_OF_EVOLUTION.md and report.html from what run directories hold, and from nothing else. With several"
    " runs the first is what the others are set against."
)


@dataclass(frozen=True)
class ReportCommand:
    """Command line of `eco_train report`."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN …]")] = ()
    """Run directories; the one before a change first."""
    config: ReportConfig = field(default_factory=ReportConfig)


def run(args: Sequence[str]) -> int:
    """Write the two files and say where they are."""
    command = parse(ReportCommand, args, prog="eco_train report", description=DESCRIPTION)
    if not command.runs:
        raise UserError("eco_train report needs a run directory, such as runs/sigma_main")
    # Imported here and not above: help has ended by now, and is quicker without.
    from eco_llm.proof.report import write_report

    out = Path(command.config.out) if command.config.out else None
    for path in write_report([Path(name) for name in command.runs], out):
        print(path)
    return 0
