"""Two settings, or two revisions, against each other: is B faster than A, by how much, and how sure is that.

Both sides train the same tokens from the same seed. First they must be seen to do the same work (eco_llm.proof.gate);
then adjacent windows of steps are compared in pairs (eco_llm.proof.statistics). Windows come from two live runs that
take turns, or, where two do not fit in memory, where a revision cannot take turns, or on request, each from a process
of its own.

OUT/perf/latest_bottleneck_fix_report.json   the result, raw samples included
OUT/perf/compare/                            the runs' directories, without checkpoints, and what they printed
OUT/perf/previous_comparisons/NNN.json       earlier results
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import statistics as simple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eco_llm.config import FEWEST_PAIRS, CompareConfig
from eco_llm.files import strict, write_json
from eco_llm.locks import lock_folder
from eco_llm.perf import environment
from eco_llm.proof import runs
from eco_llm.proof.gate import Allowed, Gate, NotComparable
from eco_llm.proof.revisions import Revision
from eco_llm.proof.runs import Program
from eco_llm.proof.statistics import PRECISION, Difference, coin_order, difference, precise
from eco_llm.proof.turns import RunFailed, TurnRun

REPORT_FILE = Path("perf") / "latest_bottleneck_fix_report.json"

SETTLE_STEPS = 1
"""Steps at the head of each turn that are not measured: the wait is in their time, and the caches were the other's."""

LIVES = 4
"""Pairs of processes that the pairs of windows are taken from, at least 8 of each. Two processes of one program differ
for as long as they live, by 1.5% on our CPU machine (docs/compare.md), which more windows of the same two do not mend.
"""

MIN_EFFECT = {"cpu": 2.0, "cuda": 1.0}
"""Percent, where the user names none: what so many processes of one program can differ by on average, and more. Of
fewer the average differs by more (`least_effect`).
"""

_PAIRS_IN_TURNS, _MOST_PAIRS_IN_TURNS, _PAIRS_SEPARATE = 40, 400, 10
_PAIRS_BETWEEN_LOOKS = 20
_PHASES = ("data", "forward", "backward", "opt_step", "zero_grad")
_TIMES = ("step_time_s", "core_step_time_s", *(f"phase_{name}_s" for name in _PHASES))
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """A or B, ready to be run."""

    label: str
    """`a` or `b`."""
    typed: str
    """Its own flags, as the user typed them."""
    flags: tuple[str, ...]
    """All its flags, those common to both included."""
    settings: dict[str, Any]
    """What they come to: {field name: value}, as this side's code reads them."""
    program: Program
    revision: Revision | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return int(self.settings["batch_size"] * self.settings["seq_len"] * self.settings["grad_accum"])


class Comparison:
    """One comparison, from two sides to a report.

    Args:
        out: the output directory that the user named.
        settings: validated; see CompareConfig.
        warmup_steps: steps before the first window; separate processes leave out as many.
        measure_steps: steps of a window in separate processes.
        why_not_in_turns: what prevents the sides from taking turns, if anything does.
        command: the command line, for the record.
        say: shows a person a line.
        on_pair: told (pairs done, pairs in all) after each pair.
    """

    def __init__(
        self,
        out: Path,
        a: Side,
        b: Side,
        settings: CompareConfig,
        *,
        warmup_steps: int,
        measure_steps: int,
        why_not_in_turns: str | None,
        command: Sequence[str],
        say: Callable[[str], None],
        on_pair: Callable[[int, int], None],
    ) -> None:
        runs.check_place(out)
        self.file = out / REPORT_FILE
        self.folder = out / "perf" / "compare"
        self._out, self._sides, self._settings = out, (a, b), settings
        self._warmup, self._measure = warmup_steps, measure_steps
        self._why_not_in_turns = why_not_in_turns
        self._command, self._say, self._on_pair = list(command), say, on_pair
        self.gate: Gate | None = None
        self._mode, self._why_separate = "in turns", why_not_in_turns
        self._pairs: Callable[[], list[tuple[Records, Records]]] = list
        """The pairs of windows measured so far."""
        self.lives: list[int] = []
        """Pairs of windows of each pair of processes that has ended, where sides take turns."""

    def run(self) -> dict[str, Any]:
        """Measure, write the report, return it.

        Raises:
            NotComparable: the gate is not green (the report says so, and has no speeds).
            RunFailed: a side ended by itself (the report says so).
            KeyboardInterrupt, Stopped: somebody stopped it. The report has the verdict of the pairs that were measured,
                where they are enough for one, and says that it was interrupted.
            UserError: another comparison works here.
        """
        with self._locked(), runs.stoppable():
            self._set_aside()
            try:
                windows = self._windows()
            except NotComparable as red:
                self._write(self._head() | {"verdict": None, "gate": dataclasses.asdict(red.gate)})
                raise
            except RunFailed as failure:
                self._write(self._head() | {"verdict": None, "failure": str(failure)})
                raise
            except (KeyboardInterrupt, runs.Stopped):
                self._write(self._interrupted())
                raise
            return self._write(self._report(windows))

    def _write(self, report: dict[str, Any]) -> dict[str, Any]:
        write_json(self.file, strict(report))
        return report

    def _set_aside(self) -> None:
        """An earlier report must not be found beside the runs of this comparison, however this one ends."""
        if not self.file.exists():
            return
        shelf = self.file.parent / "previous_comparisons"
        shelf.mkdir(exist_ok=True)
        taken = [int(p.stem) for p in shelf.glob("*.json") if p.stem.isdecimal()]
        self.file.replace(shelf / f"{max(taken, default=0) + 1:03d}.json")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = lock_folder(self.folder, output_dir=self._out, in_use="another comparison")
        try:
            yield
        finally:
            lock.release()

    # -- measuring -----------------------------------------------------------------------------------------

    def _windows(self) -> list[tuple[Records, Records]]:
        """All pairs of windows; how they were had is in `_mode` and `_why_separate`."""
        if self._why_separate is None:
            try:
                return self._in_turns()
            except RunFailed as failure:
                if failure.ending not in ("out_of_memory", "killed"):
                    raise
                self._why_separate = f"two live runs do not fit in memory ({failure})"
        self._mode, self._pairs, self.gate, self.lives = "separate processes", list, None, []
        if self._why_separate != "--separate":
            self._say(f"{self._why_separate}: each window gets a process of its own, which takes longer")
        return self._separately()

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()

    def _in_turns(self) -> list[tuple[Records, Records]]:
        s = self._settings
        fewest, most = (s.pairs, s.pairs) if s.pairs else (_PAIRS_IN_TURNS, _MOST_PAIRS_IN_TURNS)
        lives = max(1, min(LIVES, fewest // FEWEST_PAIRS))
        windows: list[tuple[Records, Records]] = []
        self.lives = []
        while len(windows) < most:
            life = len(self.lives)
            pairs = (fewest - len(windows)) // (lives - life) if life < lives else _PAIRS_BETWEEN_LOOKS
            pairs = min(pairs, most - len(windows))
            windows += self._life(life, windows, pairs, (fewest, most))
            self.lives.append(pairs)
            times = ([_medians(pair[k])["step_time_s"] for pair in windows] for k in (0, 1))
            if fewest <= len(windows) < most and precise(*times):
                break
        self._check_code()
        return windows

    def _life(
        self, life: int, before: list[tuple[Records, Records]], pairs: int, all_pairs: tuple[int, int]
    ) -> list[tuple[Records, Records]]:
        """So many pairs of windows of two processes, started for them."""
        before = list(before)
        self._pairs = lambda: before
        self._clear()
        s, (fewest, most) = self._settings, all_pairs
        turn = SETTLE_STEPS + s.window_steps
        warmup = max(self._warmup, s.gate_steps)
        steps = warmup + most * turn + 1  # the last is never done: leaving saves nothing, the end of a run does

        def window(of: Records, i: int) -> Records:
            first = warmup + i * turn + SETTLE_STEPS
            found = of[first : first + s.window_steps]
            if [r["step"] for r in found] != list(range(first + 1, first + s.window_steps + 1)):
                raise RuntimeError(f"steps {first + 1} to {first + s.window_steps} are not all in metrics.jsonl")
            return found

        def windows(records: Sequence[Records], pairs: int) -> list[tuple[Records, Records]]:
            return [(window(records[0], i), window(records[1], i)) for i in range(pairs)]

        def so_far() -> list[tuple[Records, Records]]:
            """Of runs that were cut off anywhere."""
            records = [runs.read_records(self.folder / side.label) for side in self._sides]
            self._check_gate(records if self.gate is None else None)
            return before + windows(records, max(0, (min(map(len, records)) - warmup) // turn))

        self._pairs = so_far
        with contextlib.ExitStack() as stack:
            started: dict[str, TurnRun] = {}
            for side in self._sides if life % 2 == 0 else reversed(self._sides):  # who comes first may matter for life
                run = self.folder / side.label
                # A schedule as long as the user's: what is measured is a part of that run.
                flags = self._quiet_flags(side, run, max(steps, side.settings["steps"]), turn)
                log = self.folder / f"{side.label}.log"
                started[side.label] = stack.enter_context(TurnRun(side.label, side.program, flags, run, log))
                started[side.label].start()
            for run_ in started.values():
                run_.turn(warmup)
            live = [started[side.label] for side in self._sides]
            coins = coin_order(most, self._sides[0].settings["seed"])[len(before) : len(before) + pairs]
            for i, a_first in enumerate(coins, 1):
                for run_ in live if a_first else reversed(live):
                    run_.turn(warmup + i * turn)
                self._check_gate([runs.read_records(run_.run) for run_ in live] if self.gate is None else None)
                done = len(before) + i
                self._on_pair(done, fewest if done <= fewest else most)
            for run_ in live:
                run_.leave()
            records = [runs.read_records(run_.run) for run_ in live]
        self._check_gate(records)
        return windows(records, pairs)

    def _separately(self) -> list[tuple[Records, Records]]:
        self._clear()
        s = self._settings
        pairs = s.pairs or _PAIRS_SEPARATE
        warmup = max(self._warmup, s.gate_steps)
        steps = warmup + self._measure
        windows: list[tuple[Records, Records]] = []
        self._pairs = lambda: windows
        for i, a_first in enumerate(coin_order(pairs, self._sides[0].settings["seed"])):
            found: dict[str, Records] = {}
            for side in self._sides if a_first else reversed(self._sides):
                run, log = self.folder / f"{side.label}_{i + 1:03d}", self.folder / f"{side.label}_{i + 1:03d}.log"
                flags = self._quiet_flags(side, run, steps, steps)
                with side.program.start(["train", *flags], log) as child:
                    code = child.wait()
                if code:
                    raise RunFailed(side.label, code, runs.why(run, log, code))
                for heavy in ("checkpoints", "tb"):
                    shutil.rmtree(run / heavy, ignore_errors=True)
                found[side.label] = runs.read_records(run)
            if i == 0:
                self._check_gate([found["a"], found["b"]])
                self._check_code()
            windows.append((found["a"][warmup:], found["b"][warmup:]))
            self._on_pair(i + 1, pairs)
        return windows

    def _quiet_flags(self, side: Side, run: Path, steps: int, log_interval: int) -> list[str]:
        """No warm-up of the learning rate: the gate's steps must train for it to see an optimizer at work."""
        return [
            *side.flags, "--no-resume", "--no-perf-profile-enable", "--perf-profiler-steps=0",
            "--save-interval=1000000000", "--eval-interval=0", "--sample-tokens=0", "--warmup-steps=0",
            f"--log-interval={log_interval}", f"--steps={steps}", f"--output-dir={run}",
        ]  # fmt: skip

    def _check_gate(self, records: Sequence[Records] | None) -> None:
        """Judge once both sides have the steps for it; on a GPU their numbers arrive some steps late."""
        s = self._settings
        if records is None or min(map(len, records)) < s.gate_steps:
            return
        dtypes = [str(self._resolved(side)["compute_dtype"]) for side in self._sides]
        self.gate = Gate.judge(records[0], records[1], s.gate_steps, Allowed.of(dtypes, s.gate_tolerance))
        if not self.gate.passed:
            raise NotComparable(self.gate)

    def _check_code(self) -> None:
        """A revision's checkout must be what ran, whatever is installed."""
        for side in self._sides:
            ran = (self._environment(side) or {}).get("commit")
            if side.revision is not None and ran != side.revision.commit:
                raise RuntimeError(f"{side.label} was to run {side.revision.commit} and ran {ran}")

    # -- the report ----------------------------------------------------------------------------------------

    def _newest_run(self, side: Side) -> Path | None:
        found = (p for p in self.folder.iterdir() if p.is_dir() and p.name.partition("_")[0] == side.label)
        return max(found, default=None)

    def _resolved(self, side: Side) -> dict[str, Any]:
        run = self._newest_run(side)
        content = (runs.read_json(run / "config.json") if run else None) or {}
        return dict(content.get("resolved", {}))

    def _environment(self, side: Side) -> dict[str, Any] | None:
        """What the side's run says of itself; None where it did not live to say it."""
        run = self._newest_run(side)
        content = (runs.read_json(run / runs.BOTTLENECKS_FILE) if run else None) or {}
        found = content.get("environment")
        return dict(found) if found else None

    def _head(self) -> dict[str, Any]:
        """What is known whatever was measured."""
        a, b = self._sides
        different = {k: [a.settings.get(k), b.settings.get(k)] for k in {**a.settings, **b.settings}}
        device = str(self._resolved(b).get("device") or b.settings.get("device"))
        about = environment.collect(device, self._command)
        return {
            "kind": "compare",
            "date": about["date"],
            "command": about["command"],
            "interrupted": False,
            "settings": dataclasses.asdict(self._settings),
            "changed": {k: v for k, v in different.items() if v[0] != v[1]},
            "environment": about,
            "a": self._identity(a, about),
            "b": self._identity(b, about),
        }

    def _identity(self, side: Side, about: dict[str, Any]) -> dict[str, Any]:
        return {
            "flags": side.typed,
            "revision": side.revision.name if side.revision else None,
            "commit": side.revision.commit if side.revision else about["commit"],
            "training_command": environment.command_line(["eco_train", *side.flags]),
        }

    def _interrupted(self) -> dict[str, Any]:
        """The report of a comparison that was stopped: a verdict by the same rule if the pairs are enough for one."""
        try:
            windows = self._pairs()
        except NotComparable as red:
            return self._head() | {"interrupted": True, "verdict": None, "gate": dataclasses.asdict(red.gate)}
        if self.gate is not None and len(windows) >= FEWEST_PAIRS:
            report = self._report(windows)
            return report | {"interrupted": True, "sentence": f"{report['sentence']}; interrupted before the end"}
        return self._head() | {"interrupted": True, "verdict": None, "failure": "interrupted", "pairs": len(windows)}

    def _report(self, windows: list[tuple[Records, Records]]) -> dict[str, Any]:
        assert self.gate is not None
        head = self._head()
        samples: list[dict[str, Any]] = [
            {"pair": i + 1, "a_first": first, "a": _medians(a), "b": _medians(b)}
            for i, ((a, b), first) in enumerate(
                zip(windows, coin_order(len(windows), self._sides[0].settings["seed"]), strict=True)
            )
        ]
        by_side = {side.label: [s[side.label] for s in samples] for side in self._sides}
        found = difference(*([w["step_time_s"] for w in by_side[label]] for label in "ab"))
        sides = {}
        for side in self._sides:
            tail = {name: simple.median(w[name] for w in by_side[side.label]) for name in _TIMES}
            # Of a run that was cut off: this process's, which is the same code on the same machine but for a revision.
            at = self._environment(side) or (head["environment"] if side.revision is None else {})
            run = self._newest_run(side)  # none, if it was stopped between two lives
            sides[side.label] = {
                **head[side.label],
                "commit": at.get("commit", head[side.label]["commit"]),
                "tail_throughput_tokens_per_s": side.tokens_per_step / tail["step_time_s"],
                "tail_core_throughput_tokens_per_s": side.tokens_per_step / tail["core_step_time_s"],
                **{f"tail_{name.removeprefix('phase_')}": value for name, value in tail.items()},
                "peak_memory_gib": runs.peak_memory_gib(runs.read_records(run)) if run else None,
                "resolved": {k: v for k, v in self._resolved(side).items() if k != "data_folder"},
                "environment": at,
            }
        a, b = sides["a"], sides["b"]
        device = str(self._resolved(self._sides[1]).get("device", "cpu"))
        lives = [1] * len(windows)
        if self._mode == "in turns":
            cut_off = len(windows) - sum(self.lives)  # of a life that somebody ended
            lives = [*self.lives, cut_off] if cut_off else self.lives
        min_effect = self._settings.min_effect or least_effect(device, lives)
        verdict = found.verdict(min_effect)
        memory = [side["peak_memory_gib"] for side in (a, b)]
        return head | {
            "verdict": verdict,
            "sentence": sentence(found, min_effect),
            "min_effect_percent": min_effect,
            "pairs_of_each_life": lives if self._mode == "in turns" else [],
            "tail_throughput_a_tokens_per_s": a["tail_throughput_tokens_per_s"],
            "tail_throughput_b_tokens_per_s": b["tail_throughput_tokens_per_s"],
            "throughput_delta_tokens_per_s": b["tail_throughput_tokens_per_s"] - a["tail_throughput_tokens_per_s"],
            "throughput_delta_percent": 100
            * (b["tail_throughput_tokens_per_s"] / a["tail_throughput_tokens_per_s"] - 1),
            **{
                f"tail_{name}_delta_s": b[f"tail_{name}_s"] - a[f"tail_{name}_s"]
                for name in ("step_time", "core_step_time", *_PHASES)
            },
            "peak_memory_delta_gib": None if None in memory else memory[1] - memory[0],
            "paired": dataclasses.asdict(found),
            "gate": dataclasses.asdict(self.gate),
            "mode": self._mode,
            "why_separate": self._why_separate,
            "pairs": len(windows),
            "steps_per_window": len(windows[0][0]),
            "tokens_per_step": self._sides[0].tokens_per_step,
            "environment": b["environment"] or head["environment"],
            "a": a,
            "b": b,
            "samples": samples,
        }


def least_effect(device: str, lives: Sequence[int]) -> float:
    """Percent that a difference must exceed on this device, given the pairs of windows of each pair of processes.

    MIN_EFFECT is for LIVES equal ones; the standard deviation of a mean over n is √(LIVES / n) times that, n being
    (Σ pairs)² / Σ pairs² where they are not equal.
    """
    equal = sum(lives) ** 2 / sum(n * n for n in lives)
    return MIN_EFFECT.get(device.partition(":")[0], 1.0) * math.sqrt(max(1.0, LIVES / equal))


def sentence(found: Difference, min_effect: float) -> str:
    """The verdict for a person: estimate and interval with it."""
    interval = f"{100 * found.confidence:.1f}% interval {found.low:+.2f}% to {found.high:+.2f}%, {found.pairs} pairs"
    verdict = found.verdict(min_effect)
    if verdict == "no difference shown" and found.high - found.low > 2 * PRECISION:
        return (
            f"no difference shown, nor could a small one be: B's throughput is {found.percent:+.2f}% against A's"
            f" ({interval}). More --pairs or a quieter machine narrow the interval"
        )
    if verdict == "no difference shown":
        return f"no difference shown: B's throughput is {found.percent:+.2f}% against A's ({interval})"
    return f"B is {verdict}: its throughput is {found.percent:+.2f}% against A's ({interval})"


def _medians(records: Records) -> dict[str, float]:
    """A window in a few numbers: the median of each time over its steps, seconds."""
    return {name: simple.median(r[name] for r in records) for name in _TIMES}
