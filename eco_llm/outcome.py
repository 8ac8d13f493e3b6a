"""How a run can end, and what the shell is told. Read by training, which ends so, and by proof, which starts runs."""

from __future__ import annotations

import enum


class Outcome(enum.IntEnum):
    """Exit codes of `eco_train train` (2 is bad input, and never reaches the trainer)."""

    DONE = 0
    CRASHED = 1
    OUT_OF_MEMORY = 3
    NOT_FINITE = 4
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


REFUSED = 2
"""Exit code of every command for bad input (`UserError`)."""

NOT_COMPARABLE = 5
"""Exit code of `eco_train compare` when the correctness gate is red: there is no verdict on speed."""
