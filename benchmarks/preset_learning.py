"""Claim: the learning rate and the sphere that a preset ships with are the best of those tried, in a run as it ships.

    python benchmarks/preset_learning.py @presets/quickstart_cpu.txt [--jobs 2] [--runs DIR] [--points …]
    python benchmarks/preset_learning.py @train_sigma_args.txt --jobs 4 -- --data stdlib --eval-batches 64

Every point is `eco_train PRESET --c3o-sphere S --lr R --seed N` in a process of its own, judged by its validation loss
after the last step. Points are written S:R, or S:R:SEEDS for more seeds than one; S = 0 is C3O without a sphere. A run
directory that is there and complete is not trained again, so a study can be stopped and gone on with. What stands
behind `--` goes to every run.

The noise is the largest spread of one point over its seeds, where a point has several.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import write_evidence

ROOT = Path(__file__).resolve().parents[1]
POINTS = "0:0.004:2,0:0.008,1:0.008,1:0.016:2,0.5:0.016,2:0.008"


def folder_of(sphere: float, lr: float, seed: int) -> str:
    """A run's directory, by what it is."""
    return f"sphere-{sphere:g}-lr-{lr:g}-seed-{seed}"


def finished(run: Path) -> dict[str, Any] | None:
    """What a complete run learned; None if it is not complete.

    Returns:
        val_loss, val_bits_per_byte, tokens, steps, started (when).
    """
    log, settings = run / "metrics.jsonl", run / "config.json"
    if not log.is_file() or not settings.is_file():
        return None
    config = json.loads(settings.read_text(encoding="utf-8"))
    steps = config["config"]["training"]["steps"]
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    last = next((row for row in rows if row["step"] == steps and "val_loss" in row), None)
    if last is None:
        return None
    found = {name: last[name] for name in ("val_loss", "val_bits_per_byte", "tokens")}
    return {**found, "steps": steps, "started": config["started"]["date"]}


def train(flags: list[str], run: Path) -> None:
    """One run, in a process of its own; its output goes to a file beside the run directory.

    Raises:
        SystemExit: it failed.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "eco_llm", "train", *flags, "--output-dir", str(run), "--no-resume"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    output = run.parent / f"{run.name}.log"
    with output.open("wb") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths})
    if code.returncode:
        raise SystemExit(f"preset_learning: {run.name} ended with {code.returncode}; see {output}")


def tabulated(samples: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(summary, table) of runs: sphere, lr, seed, val_loss, val_bits_per_byte and tokens each."""
    points: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for sample in samples:
        points.setdefault((sample["sphere"], sample["lr"]), []).append(sample)
    means = {at: sum(s["val_loss"] for s in runs) / len(runs) for at, runs in points.items()}
    best = min(means, key=lambda at: means[at])
    plain = min((at for at in means if not at[0]), key=lambda at: means[at], default=None)
    spreads = [max(ls) - min(ls) for runs in points.values() if len(ls := [s["val_loss"] for s in runs]) > 1]
    rows = []
    for (sphere, lr), runs in sorted(points.items()):
        losses = [f"{s['val_loss']:.4f}" for s in sorted(runs, key=lambda s: s["seed"])]
        bits = sum(s["val_bits_per_byte"] for s in runs) / len(runs)
        rows.append([
            f"{sphere:g}" if sphere else "off", f"{lr:g}", f"{runs[0]['tokens'] / 1e6:.2f}", f"{runs[0]['steps']}",
            " / ".join(losses), f"{bits:.4f}", "best" if (sphere, lr) == best else "",
        ])  # fmt: skip
    header = ["sphere", "lr", "M tokens", "steps", "validation loss by seed", "bits/byte", ""]
    summary = {"best_sphere": best[0], "best_lr": best[1], "best_loss": means[best], "runs": len(samples)}
    if plain is not None:
        summary |= {"best_without_sphere_lr": plain[1], "best_minus_without_sphere": means[best] - means[plain]}
    if spreads:
        summary["noise"] = max(spreads)
    return summary, {"header": header, "rows": rows}


def main(argv: list[str]) -> None:
    """Train what is missing, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="@FILE")
    parser.add_argument("--points", default=POINTS, help="sphere:lr or sphere:lr:seeds, separated by commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/preset_learning"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, after a first one that compiles")
    arguments, more = parser.parse_known_args(argv)
    common = [arguments.preset, "--sample-tokens", "0", *(word for word in more if word != "--")]
    todo = []
    for text in arguments.points.split(","):
        sphere, lr, *seeds = (float(part) for part in text.split(":"))
        for seed in range(int(seeds[0]) if seeds else 1):
            todo.append((sphere, lr, seed, arguments.runs / folder_of(sphere, lr, seed)))

    def ensure(item: tuple[float, float, int, Path]) -> None:
        sphere, lr, seed, run = item
        if finished(run) is None:
            train([*common, "--c3o-sphere", f"{sphere:g}", "--lr", f"{lr:g}", "--seed", str(seed)], run)
        found = finished(run)
        print(run.name, "no result" if found is None else f"{found['val_loss']:.4f}", flush=True)

    ensure(todo[0])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(ensure, todo[1:]))
    samples = []
    for sphere, lr, seed, run in todo:
        found = finished(run)
        if found is None:
            raise SystemExit(f"preset_learning: {run} has no validation after its last step")
        samples.append({"sphere": sphere, "lr": lr, "seed": seed, **found})
    summary, table = tabulated(samples)
    device = json.loads((todo[0][3] / "config.json").read_text(encoding="utf-8"))["resolved"]["device"]
    name = Path(arguments.preset.lstrip("@")).stem
    places = [i for i, word in enumerate(common) if word == "--data-cache"]  # where tokens lie changes nothing
    flags = [word for i, word in enumerate(common) if i not in places and i - 1 not in places]
    payload = {"preset": arguments.preset, "flags": flags, "summary": summary, "table": table, "samples": samples}
    print(summary)
    print(write_evidence(f"preset_learning_{name}", payload, device=device))


if __name__ == "__main__":
    main(sys.argv[1:])
