"""What every claim script shares: fair comparisons, and the evidence files they end in.

A claim script compares with `interleave`, after a correctness gate, and ends with `write_evidence`:
benchmarks/results/<hardware>/<claim>.json. `render.py` turns those files into the tables and curves of the
docs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eco_llm.config import TrainConfig
from eco_llm.files import write_json
from eco_llm.perf import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _load() -> float | None:
    """Processes that ran or wanted to, a minute's mean; None on Windows, which does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


_LOAD_BEFORE = _load()


def gpu_profile() -> TrainConfig:
    """What `eco_train @train_sigma_args.txt` trains."""
    from eco_llm.cli.args_file import expand  # for those that ask: a process that is timed imports no flags' parser
    from eco_llm.cli.parse import parse

    return parse(TrainConfig, expand([f"@{ROOT / 'train_sigma_args.txt'}"]), prog="train_sigma_args.txt")


class GateError(Exception):
    """The two sides do not compute the same thing, so their speeds may not be compared."""


def require_close(a: float, b: float, *, relative: float, what: str = "loss") -> None:
    """The correctness gate of a comparison: raise GateError unless |a - b| <= relative · |a|."""
    if not abs(a - b) <= relative * abs(a):  # also refuses NaN
        raise GateError(f"{what} differs: A {a!r}, B {b!r}, allowed {relative:g} relative; no speed is reported")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired samples of A and B, lower being better (seconds, bytes)."""

    a: list[float]
    b: list[float]
    median_a: float
    median_b: float
    ratio: float
    """median A / median B: above 1, B is that many times faster (or smaller)."""
    ratio_low: float
    """Ends of the bootstrap 95% interval of the ratio of medians, rounds resampled as pairs."""
    ratio_high: float

    def summary(self) -> dict[str, float | int]:
        """The `summary` of an A/B evidence file."""
        numbers = asdict(self)
        del numbers["a"], numbers["b"]
        return {**numbers, "rounds": len(self.a)}

    def samples(self) -> list[dict[str, float | int]]:
        """The `samples` of an A/B evidence file: one entry a round."""
        return [{"round": i, "a": a, "b": b} for i, (a, b) in enumerate(zip(self.a, self.b, strict=True))]


def interleave(
    a: Callable[[], float], b: Callable[[], float], rounds: int, *, warmup: int = 1, resamples: int = 10_000
) -> Comparison:
    """Measure A B A B … in one process, so that drift (heat, clocks, neighbours) falls on both alike.

    Args:
        a, b: each does its work once and returns its measure (see `seconds_of`); both must be positive.
        rounds: pairs measured, at least 2.
        warmup: pairs run before and thrown away.
        resamples: bootstrap draws.
    """
    if rounds < 2:
        raise ValueError("a comparison needs at least 2 rounds: one pair has no spread")
    for _ in range(warmup):
        a()
        b()
    return compared([(a(), b()) for _ in range(rounds)], resamples=resamples)


def compared(samples: Sequence[tuple[float, float]], *, resamples: int = 10_000) -> Comparison:
    """What `interleave` makes of its pairs (a, b), at least 2, all positive."""
    rounds = len(samples)
    pairs = np.array(samples, dtype=np.float64)
    if not (np.isfinite(pairs).all() and (pairs > 0).all()):
        raise ValueError("a measure is zero, negative or not finite")
    median_a, median_b = np.median(pairs, axis=0)
    draws = np.random.default_rng(0).integers(rounds, size=(resamples, rounds))
    medians = np.median(pairs[draws], axis=1)  # [resamples, 2]
    low, high = np.percentile(medians[:, 0] / medians[:, 1], [2.5, 97.5])
    return Comparison(
        a=pairs[:, 0].tolist(),
        b=pairs[:, 1].tolist(),
        median_a=float(median_a),
        median_b=float(median_b),
        ratio=float(median_a / median_b),
        ratio_low=float(low),
        ratio_high=float(high),
    )


def seconds_of(work: Callable[[], object], synchronize: Callable[[], object] | None = None) -> Callable[[], float]:
    """A measure for `interleave`: host seconds of `work`, the device being idle before and after.

    Pass `torch.cuda.synchronize` for work on a GPU; without it only the launching would be timed.
    """

    def measure() -> float:
        if synchronize is not None:
            synchronize()
        start = time.perf_counter()
        work()
        if synchronize is not None:
            synchronize()
        return time.perf_counter() - start

    return measure


class NoTimer:
    """What a step asks of a PhaseTimer, doing nothing."""

    annotate = False

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """No phase."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Any]:
        """A capture without marks."""
        from eco_llm.perf.phases import CapturedPhases

        yield CapturedPhases()

    def replay(self, captured: Any, bind: Callable[..., None], launch: Callable[[], None]) -> None:
        """The launch alone."""
        launch()


def hardware_slug(env: dict[str, Any]) -> str:
    """Folder name of the measured hardware: `nvidia-h200`, or `cpu-2c-amd` for a run on the CPU.

    Raises:
        ValueError: the run was on a GPU that could not be identified.
    """
    if not env["device"].startswith("cuda"):
        return f"cpu-{env['cpu']['logical_cores']}c-{env['cpu']['vendor']}"
    if env["gpu"] is None:
        raise ValueError("the run was on a GPU, but neither torch nor NVML says which: import torch first")
    return re.sub(r"[^a-z0-9]+", "-", env["gpu"]["name"].lower()).strip("-")


def write_evidence(
    claim: str,
    payload: dict[str, Any],
    *,
    device: str = "cpu",
    results: Path = RESULTS,
    recorded: dict[str, Any] | None = None,
) -> Path:
    """Write `payload` with its environment as results/<hardware>/<claim>.json, atomically; return the path.

    Args:
        claim: the file's name: lower-case letters, digits, `-` and `_`.
        payload: `summary` (a dict of numbers) and `samples` (a non-empty list: the raw measurements), and
            whatever else the claim needs.
        device: what was measured on, `cpu` or `cuda[:N]`.
        recorded: the environment (`perf.environment.collect`) of a measurement that was taken earlier, perhaps on
            another machine; None is here and now.

    Raises:
        ValueError: no raw samples, a reserved key, a bad name, or a number that is NaN or infinite.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", claim):
        raise ValueError(f"claim {claim!r}: use lower-case letters, digits, - and _")
    if not isinstance(payload.get("samples"), list) or not payload["samples"]:
        raise ValueError(f"claim {claim!r} has no raw samples: evidence without them proves nothing")
    if not isinstance(payload.get("summary"), dict) or not payload["summary"]:
        raise ValueError(f"claim {claim!r} has no summary")
    if reserved := {"claim", "environment", "command", "hardware", "processor_load"} & set(payload):
        raise ValueError(f"claim {claim!r}: {sorted(reserved)} are filled in here")
    if recorded is None and device.startswith("cuda"):
        import torch

        torch.cuda.init()  # lets the environment name the GPU where the work was done by other processes
    env = environment.collect(device) if recorded is None else recorded
    hardware = hardware_slug(env)
    path = results / hardware / f"{claim}.json"
    head = {"claim": claim, "hardware": hardware, "command": env["command"], "environment": env}
    if recorded is None:
        head["processor_load"] = {"before": _LOAD_BEFORE, "after": _load()}
    write_json(path, head | payload)
    return path


def record_training(claim: str, flags: Sequence[str], *, run: Path) -> Path:
    """Train with `eco_train FLAGS --output-dir RUN --no-resume` in a process of its own and keep its log as evidence.

    The evidence's samples are the run's metrics.jsonl; its summary has the keys that `render.py` tables show.

    Args:
        claim: the evidence file's name.
        flags: as a user would type them.
        run: run directory to train in.

    Raises:
        RuntimeError: training did not end well.
    """
    command = [*flags, "--output-dir", str(run), "--no-resume"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "eco_llm", *command], check=False, stdout=subprocess.PIPE, text=True)
    wall_seconds = time.perf_counter() - started
    print(done.stdout)
    if done.returncode != 0:
        raise RuntimeError(f"eco_train ended with exit code {done.returncode}")
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validated = [row for row in rows if "val_loss" in row]
    device = settings["resolved"]["device"]
    memory = [row["memory_peak_gib"] for row in rows if row.get("memory_peak_gib") is not None]
    payload = {
        "training_command": "eco_train " + shlex.join(flags),
        "config": settings["config"],
        "resolved": {k: v for k, v in settings["resolved"].items() if k != "data_folder"},  # a path of this machine
        "sample": done.stdout.partition("--- sample")[2].partition("\n")[2],
        "summary": {
            "parameters": settings["resolved"]["parameters"],
            "steps": rows[-1]["step"],
            "tokens": rows[-1]["tokens"],
            "final_train_loss": statistics.fmean(row["loss"] for row in rows[-10:]),
            "final_val_loss": validated[-1]["val_loss"] if validated else None,
            "val_bits_per_byte": validated[-1]["val_bits_per_byte"] if validated else None,
            "core_tokens_per_s": statistics.median(row["core_tokens_per_s"] for row in rows),
            "effective_tokens_per_s": sum(row["tokens"] / row["step"] for row in rows)
            / sum(row["step_time_s"] for row in rows),
            "peak_memory_gib": max(memory) if memory else None,
            "wall_seconds": wall_seconds,
        },
        "samples": rows,
    }
    return write_evidence(claim, payload, device=device)
