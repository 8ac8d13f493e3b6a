"""Claim: the executable's size, the time to build it, and that it starts as fast as the Python it was built with.

    python benchmarks/executable.py [--rounds N] [--keep-build]

Builds dist/eco_train as `make exe` does (from nothing; `--keep-build` takes the build that is there), measures it, and
then runs the same three commands with Python (A) and with the executable (B), A B A B …: `--help`, `doctor` (which
compiles a function with torch.compile from empty caches), and a training of one step of 64 tokens, on data prepared
beforehand and on one thread, so that it is importing and building that is timed and not who else uses the cores.
Gate: both train that step to the same loss. Files are in the page cache: the first start after a boot takes longer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Comparison, interleave, require_close, write_evidence

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "dist" / "eco_train"
PARTS = {  # folders of the build, what they are for
    "torch/lib": "torch's libraries",
    "torch/include": "torch's headers, for compiling",
    "torch": "torch's modules, source and byte code",
    "lib": "the standard library's sources, for `--data stdlib`",
    "triton": "Triton",
}


def build() -> float:
    """Seconds of a build from nothing."""
    for folder in (PROGRAM, ROOT / "build" / "exe"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN", "--distpath", "dist"]
    started = time.perf_counter()
    subprocess.run([*command, "--workpath", "build/exe", "packaging/eco_train.spec"], cwd=ROOT, check=True)
    return time.perf_counter() - started


def sizes() -> dict[str, float]:
    """MiB of the build: `total`, each of PARTS (without those named before it), and `other`."""
    inside = PROGRAM / "_internal"
    left = {path: path.stat().st_size for path in PROGRAM.rglob("*") if path.is_file() and not path.is_symlink()}
    found = {"total": sum(left.values()) / 2**20, "files": float(len(left))}
    for part in PARTS:
        mine = [path for path in left if path.is_relative_to(inside / part)]
        found[part] = sum(left.pop(path) for path in mine) / 2**20
    found["other"] = sum(left.values()) / 2**20
    return found


def compare(words: list[str], place: Path, rounds: int) -> Comparison:
    """Seconds from start to end of `words`, with Python and with the executable; the first pair is not counted."""

    def seconds(program: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run([*program, *words], cwd=place, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - started

    executable = [str(PROGRAM / ("eco_train.exe" if sys.platform == "win32" else "eco_train"))]
    return interleave(lambda: seconds([sys.executable, "-m", "eco_llm"]), lambda: seconds(executable), rounds)


def main(argv: list[str]) -> None:
    """Build, measure, print, write the evidence."""
    rounds = int(argv[argv.index("--rounds") + 1]) if "--rounds" in argv else 5
    built = None if "--keep-build" in argv else build()
    size = sizes()
    print({"build_s": built, **size}, flush=True)
    summary: dict[str, Any] = {"build_s": built, "size_mib": size["total"], "files": int(size["files"])}
    samples: list[dict[str, Any]] = []
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)  # this checkout also where another one is installed; the executable ignores it
    rows = [["size, MiB", f"{size['total']:.0f}", None, None]]
    rows += [[f"… of it {what}", f"{size[part]:.0f}", None, None] for part, what in PARTS.items() if size[part]]
    rows += [["… of it the rest", f"{size['other']:.0f}", None, None], ["files", f"{size['files']:,.0f}", None, None]]
    if built is not None:
        rows.append(["build, s", f"{built:.0f}", None, None])
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        once = ["--steps", "1", "--batch-size", "1", "--seq-len", "64", "--eval-interval", "0", "--sample-tokens", "0"]
        first = [f"@{ROOT / 'presets' / 'quickstart_cpu.txt'}", *once, "--no-resume"]
        commands = {"help": ["--help"], "doctor": ["doctor"], "first_step": [*first, "--output-dir", "run"]}
        for name, words in commands.items():
            found = compare(words, place, rounds)
            samples += [{"command": name, **sample} for sample in found.samples()]
            summary |= {f"{name}_executable_s": found.median_b, f"{name}_python_s": found.median_a}
            shown = f"{found.ratio:.2f} ({found.ratio_low:.2f} to {found.ratio_high:.2f})"
            title = {"help": "`--help`", "doctor": "`doctor`", "first_step": "one small step"}[name] + ", s"
            rows.append([title, f"{found.median_b:.2f}", f"{found.median_a:.2f}", shown])
            print(rows[-1], flush=True)
        # Each training set the one before aside: the last two are one of each.
        losses = [
            json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]
            for folder in (sorted((place / "run" / "previous").iterdir())[-1], place / "run")
        ]
        require_close(*losses, relative=1e-6)
    table = {"header": ["", "executable", "Python", "Python / executable (95%)"], "rows": rows}
    print(write_evidence("executable", {"table": table, "sizes_mib": size, "summary": summary, "samples": samples}))


if __name__ == "__main__":
    main(sys.argv[1:])
