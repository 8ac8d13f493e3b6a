"""Claim: `eco_train compare` sees no difference where there is none, and a slowdown of 5% where there is one.

    python benchmarks/compare_verdicts.py [--times N] [--jobs J] [FURTHER FLAGS OF eco_train compare]

N comparisons (20) of A with itself and N with a delay of 5% of every step planted in B, each in processes of its own
with one thread of torch each, J of them (1) at a time: one for every three or four cores that have nothing else to do.
The claim: at least 19 of 20 of either kind get the right verdict, and none the opposite one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import write_evidence

from eco_llm.cli.turns import PLANTED_DELAY
from eco_llm.proof.compare import REPORT_FILE
from eco_llm.proof.runs import Program

DEFAULT = (
    "--d-model 32 --n-layers 3 --mamba-ratio 2 --attention-ratio 1 --n-heads 2 --kv-latent-dim 16 --rope-head-dim 8"
    " --mamba-state-dim 16 --vocab-size 300 --batch-size 2 --seq-len 24 --device cpu --no-torch-compile --data eco_llm"
    " --lr 4e-3"
)
PLANTED = 0.05


def compare(flags: list[str], planted: float, out: Path) -> dict[str, Any]:
    """One comparison of A with B, which is A but for the planted delay."""
    command = [*Program.this().command, "compare", *flags, "--a", "", "--b", "", "--output-dir", str(out)]
    settings = {**os.environ, **Program.this().environment, "OMP_NUM_THREADS": "1"}
    settings[PLANTED_DELAY] = f"b:{planted}" if planted else ""
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"eco_train compare ended with {done.returncode}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    return found


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    times, jobs = 20, 1
    while argv[:1] in (["--times"], ["--jobs"]):
        times, jobs = (int(argv[1]), jobs) if argv[0] == "--times" else (times, int(argv[1]))
        argv = argv[2:]
    flags = [*DEFAULT.split(), *argv]
    kinds = [(i, planted) for i in range(times) for planted in (0.0, PLANTED)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def one(kind: tuple[int, float]) -> dict[str, Any]:
            i, planted = kind
            # The seed also draws the order of the windows.
            found = compare([*flags, "--seed", str(i)], planted, Path(folder, f"{i}_{planted}"))
            sample = {"round": i, "planted": planted, "verdict": found["verdict"], **found["paired"]}
            sample["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            print(json.dumps(sample), flush=True)
            return sample

        samples = [one(kinds[0]), *pool.map(one, kinds[1:])]  # the first prepares the data for all
    verdicts = {p: [s["verdict"] for s in samples if s["planted"] == p] for p in (0.0, PLANTED)}
    summary = {
        "comparisons_of_each_kind": times,
        "a_a_no_difference_shown": verdicts[0.0].count("no difference shown"),
        "planted_found_slower": verdicts[PLANTED].count("slower"),
        "planted_found_faster": verdicts[PLANTED].count("faster"),
        "planted_percent": 100 * PLANTED,
        "at_a_time": jobs,
    }
    print(summary)
    print(write_evidence("compare_verdicts", {"flags": flags, "summary": summary, "samples": samples}))


if __name__ == "__main__":
    main(sys.argv[1:])
