"""Claim: the quickstart learns Python on two CPU cores in under three minutes, data preparation included.

    python benchmarks/quickstart.py [--torch-compile] [RUN DIRECTORY]

With `--torch-compile` the same job with compiled blocks (`quickstart_compiled`), from cold caches: whether compiling
pays for a whole short run is another question than whether it pays a step (`compile_on_off.py`).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from common import record_training

FLAGS = ["@presets/quickstart_cpu.txt"]

if __name__ == "__main__":
    switches = [word for word in sys.argv[1:] if word.startswith("--")]
    places = [word for word in sys.argv[1:] if not word.startswith("--")]
    claim = "quickstart_compiled" if "--torch-compile" in switches else "quickstart"
    # Fresh caches, so that the time is that of a first run.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / "inductor")
        flags = [*FLAGS, *switches, "--data-cache", str(Path(cache) / "data")]
        print(record_training(claim, flags, run=Path(places[0] if places else f"runs/bench_{claim}")))
