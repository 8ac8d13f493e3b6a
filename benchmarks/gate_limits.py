"""Claim: the limits of `eco_train compare`'s gate lie between what only costs differently and what learns differently.

    python benchmarks/gate_limits.py

Trains the gate's ten steps of small models on the CPU, as a comparison's sides do, in fp32 and with bf16 autocast, at
two learning rates: first plainly, then each of ALIKE (which must be green), and each of UNLIKE, settings and faults
planted in the optimizer (which must be red). What the gate measures of each pair goes into the evidence.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import write_evidence
from faults import planted

from eco_llm.cli.parse import parse
from eco_llm.config import CompareConfig, TrainConfig
from eco_llm.proof.gate import Allowed, Gate
from eco_llm.proof.runs import read_records
from eco_llm.training.launch import train

STEPS = CompareConfig().gate_steps
ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    f"--data {ROOT / 'eco_llm'} --device cpu --no-torch-compile --no-resume --warmup-steps 0"
    f" --schedule constant --steps {STEPS} --eval-interval 0 --eval-batches 1 --sample-tokens 0"
)
SIZES = {
    "0.03M": "--d-model 32 --n-layers 3 --mamba-ratio 2 --attention-ratio 1 --n-heads 2 --kv-latent-dim 16"
    " --rope-head-dim 8 --mamba-state-dim 16 --vocab-size 300 --batch-size 2 --seq-len 24",
    "0.4M": "--d-model 64 --n-layers 6 --n-heads 4 --kv-latent-dim 32 --rope-head-dim 8 --mamba-state-dim 16"
    " --vocab-size 1024 --batch-size 4 --seq-len 160",
}
ALIKE = {
    "accumulated": "--batch-size {half} --grad-accum 2",
    "chunk 128": "--mamba-chunk 128",
    "chunk 256": "--mamba-chunk 256",
    "recompute": "--instant-mode recompute",
    "norm skip": "--c3o-trust-norm-refresh-drift 0.02",
    "bf16 weights": "--weights-dtype bf16",
    "bf16 state": "--c3o-state-dtype bf16",
    "int8 state": "--c3o-state-dtype int8",
    "compress": "--instant-mode compress",
    "compiled": "--torch-compile",
}
UNLIKE = {
    "lr 1e-9": "--lr 1e-9",
    "coupled": "--instant-mode coupled",
    "zero gradients": "",
    "third step skipped": "",
    "sixth step skipped": "",
    "half of each step": "",
}
"""Those without flags are faults of the optimizer. AdamW is not among them: where C3O's trust region does not bind it
takes the same steps; `eco_train compare` refuses to judge such a pair by what it learns. Nor is a step skipped near
the end: a fault must be seen in several losses to be told from one bad step."""


def records(flags: str, folder: Path, fault: str = "") -> list[dict[str, Any]]:
    """Ten steps; `fault` is planted where it is one."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = [*flags.split(), "--output-dir", out, "--data-cache", str(folder / "data")]
        config = parse(TrainConfig, words, prog="gate_limits")
        config.validate()
        with contextlib.ExitStack() as stack:
            if fault:
                stack.enter_context(planted(fault))
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            code = train(config, command=["gate_limits", *words])
        if code:
            raise RuntimeError(f"{flags}: exit code {code}")
        return read_records(Path(out))


def main() -> None:
    """Measure, print, write the evidence."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for size, dtype, step in itertools.product(SIZES, ("fp32", "bf16"), (1, 4)):
            lr = step * (2e-3 if size == "0.03M" else 1e-3)  # the smaller model hardly moves in ten steps of 1e-3
            flags = f"{SIZES[size]} {COMMON} --dtype {dtype} --lr {lr}"
            plain = records(flags, folder)
            filled = {"half": "1" if size == "0.03M" else "2"}
            for alike, settings in ((True, ALIKE), (False, UNLIKE)):
                for name, more in settings.items():
                    other = records(f"{flags} {more.format(**filled)}", folder, "" if more else name)
                    allowed = Allowed.of([{"fp32": "float32", "bf16": "bfloat16"}[dtype]])
                    gate = Gate.judge(plain, other, STEPS, allowed)
                    samples.append(
                        {
                            "model": size, "dtype": dtype, "lr": lr, "b": name, "alike": alike, "green": gate.passed,
                            "loss": gate.loss_difference, "grad_norm": gate.grad_norm_difference,
                            "progress": gate.progress_difference, "fell_a": gate.progress_a, "fell_b": gate.progress_b,
                        }
                    )  # fmt: skip
                    print(samples[-1], flush=True)
    summary: dict[str, Any] = {"steps": STEPS, "wrong": [s for s in samples if s["green"] != s["alike"]]}
    for dtype in ("fp32", "bf16"):
        of = [s for s in samples if s["dtype"] == dtype]
        for key in ("loss", "grad_norm", "progress"):
            summary[f"{dtype}_alike_largest_{key}"] = max(s[key] for s in of if s["alike"])
        faults = [s["progress"] for s in of if not s["alike"] and s["b"] != "coupled"]
        summary[f"{dtype}_unlike_smallest_progress"] = min(faults)
    print(summary)
    print(write_evidence("gate_limits", {"limits": {d: vars(Allowed.of([d])) for d in ("float32", "bfloat16")},
                                         "summary": summary, "samples": samples}))  # fmt: skip


if __name__ == "__main__":
    main()
