"""Claim: the default GPU profile trains as shipped. 200 steps of train_sigma_args.txt on this machine's Python sources.

python benchmarks/default_profile.py        (on a machine with an NVIDIA GPU)
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import record_training

FLAGS = ["@train_sigma_args.txt", "--data", "python-env", "--steps", "200", "--eval-interval", "50"]

if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/bench_default_profile")
    print(record_training("default_profile", FLAGS, run=where))
