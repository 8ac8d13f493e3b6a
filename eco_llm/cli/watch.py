"""`eco_train watch`: a run's report, live on 127.0.0.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from eco_llm.cli.parse import parse
from eco_llm.config import WatchConfig
from eco_llm.errors import UserError

DESCRIPTION = "Show a run's report in a browser on this machine while it trains; Ctrl-C ends it."


@dataclass(frozen=True)
class WatchCommand:
    """Command line of `eco_train watch`."""

    run: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """The run directory."""
    config: WatchConfig = field(default_factory=WatchConfig)


def run(args: Sequence[str]) -> int:
    """Serve until interrupted."""
    command = parse(WatchCommand, args, prog="eco_train watch", description=DESCRIPTION)
    command.config.validate()
    if len(command.run) != 1:
        raise UserError("eco_train watch needs one run directory, such as runs/sigma_main")
    # Imported here and not above: help has ended by now, and is quicker without.
    from eco_llm.proof.watch import Server

    with Server(Path(command.run[0]), command.config.port) as server:
        print(f"{command.run[0]} at {server.address} (Ctrl-C ends this, not the training)", flush=True)
        server.serve()
    return 0
