"""`eco_train` whose side B skips its third optimizer step: what a comparison must notice."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from eco_llm.cli.main import main

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from faults import planted

with planted("third step skipped") if sys.argv[1:3] == ["_turns", "b"] else contextlib.nullcontext():
    code = main(sys.argv[1:])
sys.exit(code)
