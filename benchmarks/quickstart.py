"""Claim: the quickstart learns Python on two CPU cores in under three minutes, data preparation included.

python benchmarks/quickstart.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import record_training

FLAGS = ["@presets/quickstart_cpu.txt"]

if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/bench_quickstart")
    # A fresh data cache, so that the time is that of a first run.
    with tempfile.TemporaryDirectory() as cache:
        print(record_training("quickstart", [*FLAGS, "--data-cache", cache], run=where))
