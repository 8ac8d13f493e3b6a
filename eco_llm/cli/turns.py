"""`eco_train _turns SIDE FLAGS`: train as one side of a comparison, in turns. Only eco_llm.proof.turns starts it.

One JSON object a line: this process writes `{"protocol": 1, "done": STEP}` to its standard output whenever it waits,
and reads `{"until": STEP}` (the last step of the next turn) or `{"leave": true}` from its standard input. The end of
that input, such as the parent's death, means leave. What a run prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.proof.turns import PROTOCOL

PLANTED_DELAY = "ECO_LLM_PLANTED_DELAY"
"""`SIDE:SHARE`, say `b:0.05`: that side sleeps for this share of every step. For tests of the comparison only."""


def run(args: Sequence[str]) -> int:
    """Train until told to leave."""
    side, *flags = args
    config = parse(TrainConfig, flags, prog="eco_train _turns")
    config.validate()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
    os.dup2(2, 1)  # whatever prints, libraries too, must not speak on the protocol's pipe

    from eco_llm.data.sources import check_sources
    from eco_llm.runtime import set_cache_dirs

    check_sources(config.data, seq_len=config.training.seq_len)
    set_cache_dirs()  # before torch

    from eco_llm.training.hooks.turns import TakeTurns
    from eco_llm.training.launch import train

    def ask(done: int) -> int | None:
        answers.write(json.dumps({"protocol": PROTOCOL, "done": done}) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        return json.loads(line).get("until") if line else None

    name, _, share = os.environ.get(PLANTED_DELAY, "").partition(":")
    delay = float(share) if name == side else 0.0
    with answers:
        return int(train(config, command=sys.argv, hooks=[TakeTurns(ask, delay=delay)]))
