"""Claim: `eco_train compare` sees no difference where there is none, and a slowdown of 5% where there is one.

    python benchmarks/compare_verdicts.py [--times N] [FLAGS OF eco_train compare, but for the sides]

N comparisons of A with itself and N with a delay of 5% of every step planted in B, in turn, each in processes of its
own. The claim: at least 19 of 20 of either kind get the right verdict, and none the opposite one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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
    settings = {**os.environ, **Program.this().environment, PLANTED_DELAY: f"b:{planted}" if planted else ""}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"eco_train compare ended with {done.returncode}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    return found


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    times = 20
    if argv[:1] == ["--times"]:
        times, argv = int(argv[1]), argv[2:]
    flags = argv or DEFAULT.split()
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(times):
            for planted in (0.0, PLANTED):
                # The seed also draws the order of the windows.
                found = compare([*flags, "--seed", str(i)], planted, Path(folder))
                samples.append(
                    {"round": i, "planted": planted, "verdict": found["verdict"], **found["paired"]}
                    | {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
                )
                print(json.dumps(samples[-1]), flush=True)
    verdicts = {p: [s["verdict"] for s in samples if s["planted"] == p] for p in (0.0, PLANTED)}
    summary = {
        "comparisons_of_each_kind": times,
        "a_a_no_difference_shown": verdicts[0.0].count("no difference shown"),
        "planted_found_slower": verdicts[PLANTED].count("slower"),
        "planted_found_faster": verdicts[PLANTED].count("faster"),
        "planted_percent": 100 * PLANTED,
    }
    print(summary)
    print(write_evidence("compare_verdicts", {"flags": flags, "summary": summary, "samples": samples}))


if __name__ == "__main__":
    main(sys.argv[1:])
