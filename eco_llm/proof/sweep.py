"""One short run for each point of a grid of settings: what fits, and what is fastest.

Every point is a process of its own, so that one that runs out of memory takes nothing with it. Results are in
OUT/perf/sweep.json, rewritten after every point; what points leave is in OUT/perf/sweep/:

POINT/          run directory of a point that ended well, without checkpoints
POINT.log       what it printed
errors/         crash reports of points that did not; the rest of their run directories is removed
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eco_llm.config import TrainConfig, flag_of, flatten
from eco_llm.errors import UserError
from eco_llm.files import strict, write_json
from eco_llm.locks import lock_folder
from eco_llm.perf import environment
from eco_llm.proof import runs
from eco_llm.proof.runs import Program

FINISHED = ("done", "out_of_memory", "not_finite", "killed")
"""Endings that a second start takes as they are; a crash or a refusal may have had a cause that is gone."""

_POLL_S = 0.2
_NUMBERS = (
    "avg_effective_tokens_per_s", "avg_core_tokens_per_s", "avg_step_time_s", "avg_core_step_time_s",
    "avg_phase_data_s", "avg_phase_forward_s", "avg_phase_backward_s", "avg_phase_opt_step_s", "avg_phase_zero_grad_s",
    "avg_gpu_util_percent",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One combination of the swept values."""

    values: dict[str, str]
    """{field name: value as typed}."""
    flags: tuple[str, ...]
    """Everything that `eco_train train` is told, but for the output directory."""
    config: TrainConfig
    """The same, parsed and validated."""

    @property
    def name(self) -> str:
        """A folder name, the same whatever else is in the grid."""
        typed = "_".join(f"{k.replace('_', '-')}-{v}" for k, v in self.values.items())
        safe = re.sub(r"[^A-Za-z0-9.+_-]+", "-", typed)
        return safe if safe == typed else f"{safe}-{hashlib.sha1(typed.encode()).hexdigest()[:6]}"


class Sweep:
    """A grid of points and what is known of them.

    Args:
        out: the output directory that the user named.
        points: the grid, in the order in which it is run.
        fresh: set earlier results aside instead of completing them.
        command: the command line, for the record.

    Raises:
        UserError: earlier results are of other settings or of other code, or cannot be read.
    """

    def __init__(
        self, out: Path, points: Sequence[Point], *, fresh: bool, command: Sequence[str], program: Program | None = None
    ) -> None:
        self.file = out / "perf" / "sweep.json"
        self.folder = out / "perf" / "sweep"
        self.points = list(points)
        self._command, self._program = list(command), program or Program.this()
        self._out, self._fresh = out, fresh
        self.rows: dict[str, dict[str, Any]] = {}
        runs.check_place(out)
        if not fresh:
            self.rows = {row["name"]: row for row in self._earlier()}

    @property
    def steps_per_point(self) -> int:
        """Optimizer steps of one point."""
        return self.points[0].config.training.steps

    @property
    def waiting(self) -> list[Point]:
        """Points still to be run."""
        return [p for p in self.points if self.rows.get(p.name, {}).get("status") not in FINISHED]

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder and hold its lock.

        Raises:
            UserError: another sweep works here.
        """
        in_use = "another sweep; wait for it or name another folder"
        lock = lock_folder(self.folder, output_dir=self._out, in_use=in_use)
        try:
            if self._fresh:
                self._set_aside()
            yield
        finally:
            lock.release()

    def run(self, on_step: Callable[[int], None], on_row: Callable[[dict[str, Any]], None]) -> None:
        """Run what is waiting. Whatever interrupts it, finished points are in the file.

        Args:
            on_step: told how many steps of the running point are done, a few times a second.
            on_row: told each point's result.
        """
        with runs.stoppable():
            for point in self.waiting:
                try:
                    row = self._measure(point, on_step)
                except BaseException:
                    shutil.rmtree(self.folder / point.name, ignore_errors=True)
                    raise
                self._check_machine(row.get("environment"))
                self.rows[point.name] = row
                self.write()
                on_row(row)

    def summary(self) -> dict[str, Any]:
        """What the sweep found, ready for JSON."""
        rows = [self.rows[p.name] for p in self.points if p.name in self.rows]
        rows += [row for name, row in self.rows.items() if name not in {p.name for p in self.points}]
        done = [row for row in rows if row["status"] == "done"]
        fastest = max(done, key=lambda row: row["avg_effective_tokens_per_s"], default=None)
        largest = max(done, key=lambda row: (row["batch_size"], row["avg_effective_tokens_per_s"]), default=None)
        batches = {row["batch_size"] for row in rows if row["batch_size"] is not None}
        return {
            "kind": "sweep",
            "command": environment.command_line(self._command),
            "axes": {name: list(dict.fromkeys(row["values"][name] for row in rows)) for name in self.points[0].values},
            "complete": not self.waiting,
            "largest_stable_batch": largest["batch_size"] if largest and len(batches) > 1 else None,
            "largest_stable_batch_point": largest["name"] if largest and len(batches) > 1 else None,
            "fastest_point": fastest["name"] if fastest else None,
            "steps_per_point": self.steps_per_point,
            "source_sha256": environment.source_digest(),
            "settings": self._settings(),
            "environment": next((row["environment"] for row in done if row.get("environment")), None),
            "points": rows,
        }

    def write(self) -> None:
        """Write sweep.json, atomically."""
        write_json(self.file, strict(self.summary()))

    # -- earlier results -----------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What all points share."""
        swept = self.points[0].values
        own = {*swept, *FIXED, "output_dir", "data_cache"}
        return {k: v for k, v in flatten(self.points[0].config).items() if k not in own}

    def _earlier(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        content = runs.read_json(self.file)
        anew = "--no-resume sets it aside and starts anew"
        try:
            before, rows = content["settings"], content["points"]
            digest, axes = content["source_sha256"], list(content["axes"])
        except (KeyError, TypeError):
            raise UserError(f"{self.file} cannot be read; {anew}") from None
        now = strict(self._settings())
        if axes != list(self.points[0].values):
            changed = f"it swept {', '.join(map(flag_of, axes))}"
        elif differing := [k for k in now if before.get(k) != now[k]]:
            k = differing[0]
            changed = f"{flag_of(k)} {before.get(k)} → {now[k]}"
        elif digest != environment.source_digest():
            changed = "eco-llm's code has changed since"
        else:
            return list(rows)
        raise UserError(f"{self.file} holds another sweep ({changed}); {anew}, or name another --output-dir")

    def _check_machine(self, here: dict[str, Any] | None) -> None:
        """Rates of two machines must not share a table.

        Raises:
            UserError: an earlier row was measured on another.
        """
        for row in self.rows.values():
            if here and (there := row.get("environment")) and _machine(there) != _machine(here):
                was, now = (", ".join(map(str, filter(None, _machine(x)))) for x in (there, here))
                raise UserError(
                    f"{self.file} was measured on {was}, and this is {now}; --no-resume sets it aside and starts anew,"
                    " or name another --output-dir"
                )

    def _set_aside(self) -> None:
        if not self.file.exists():
            return
        shelf = self._out / "perf" / "previous_sweeps"
        taken = [int(p.name) for p in shelf.glob("*") if p.name.isdecimal()]
        target = shelf / f"{max(taken, default=0) + 1:03d}"
        target.mkdir(parents=True)
        for entry in self.folder.iterdir():
            if entry.name != ".lock":
                entry.rename(target / entry.name)
        self.file.rename(target / self.file.name)

    # -- one point -----------------------------------------------------------------------------------------

    def _measure(self, point: Point, on_step: Callable[[int], None]) -> dict[str, Any]:
        run, log = self.folder / point.name, self.folder / f"{point.name}.log"
        shutil.rmtree(run, ignore_errors=True)  # of a start that was cut off
        log.unlink(missing_ok=True)
        flags = [*point.flags, "--output-dir", str(run)]
        started = time.perf_counter()
        with self._program.start(["train", *flags], log) as child:
            while child.process.poll() is None:
                on_step(len(runs.read_records(run)))
                time.sleep(_POLL_S)
            code = child.wait()
        row: dict[str, Any] = {
            "name": point.name,
            "values": point.values,
            "batch_size": point.config.training.batch_size,
            "status": runs.ending(code),
            "exit_code": code,
            "message": None,
            "command": "eco_train " + shlex.join(["train", *flags]),
            "seconds": time.perf_counter() - started,
            "crash_reports": [],
        }
        if code == 0:
            return row | self._numbers(run)
        row["message"] = runs.why(run, log, code)
        row["crash_reports"] = self._keep_crash_reports(run, point.name)
        shutil.rmtree(run, ignore_errors=True)
        if row["status"] == "interrupted":  # somebody stopped this point only
            row["message"] = "stopped by a signal"
        return row

    def _numbers(self, run: Path) -> dict[str, Any]:
        baseline = runs.read_json(run / runs.BASELINE_FILE)
        if baseline is None:
            raise RuntimeError(f"{run} ended well and left no {runs.BASELINE_FILE}")
        records = runs.read_records(run)
        for heavy in ("checkpoints", "tb"):
            shutil.rmtree(run / heavy, ignore_errors=True)
        return {
            **{k: baseline[k] for k in _NUMBERS},
            "tokens_per_step": baseline["tokens_per_step"],
            "peak_memory_gib": runs.peak_memory_gib(records),
            "first_step_s": records[0]["step_time_s"],
            "last_loss": records[-1]["loss"],
            "evidence": (run / runs.BASELINE_FILE).relative_to(self._out).as_posix(),
            "environment": baseline["environment"],
        }

    def _keep_crash_reports(self, run: Path, name: str) -> list[str]:
        kept = []
        for report in runs.crash_reports(run):
            target = self.folder / "errors" / report.name.replace("crash_", f"crash_{name}_", 1)
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(report, target)
            kept.append(target.relative_to(self._out).as_posix())
        return kept


def _machine(about: dict[str, Any]) -> tuple[Any, ...]:
    """What rates depend on, of an `environment.collect`."""
    cpu, gpu = about.get("cpu") or {}, about.get("gpu") or {}
    return gpu.get("name"), cpu.get("model"), cpu.get("logical_cores"), (about.get("versions") or {}).get("torch")


def point_config(config: TrainConfig) -> TrainConfig:
    """The user's settings as a point has them: a perf window, steps for it, and nothing that is not measured."""
    perf = dataclasses.replace(config.perf, perf_profile_enable=True)
    steps = perf.perf_warmup_steps + perf.perf_measure_steps + perf.perf_profiler_steps
    return dataclasses.replace(config, perf=perf, training=dataclasses.replace(config.training, steps=steps, **QUIET))


QUIET: dict[str, Any] = {"resume": False, "save_interval": 1_000_000_000, "eval_interval": 0, "sample_tokens": 0}
"""Settings of runs that are only timed: no checkpoint on the way, no validation, no sample."""

FIXED = (*QUIET, "steps", "perf_profile_enable")
"""Settings that a point does not take from the user."""


def fixed_flags(config: TrainConfig) -> list[str]:
    """The words that set FIXED as `point_config(config)` has them."""
    t = point_config(config).training
    return [
        "--no-resume", f"--save-interval={t.save_interval}", f"--eval-interval={t.eval_interval}",
        f"--sample-tokens={t.sample_tokens}", f"--steps={t.steps}", "--perf-profile-enable",
    ]  # fmt: skip
