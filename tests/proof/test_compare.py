"""A comparison: same work first, then a verdict that can be trusted, and a report that holds everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, Machine, Simulated

from eco_llm.cli.compare import _take
from eco_llm.cli.main import main
from eco_llm.cli.turns import PLANTED_DELAY
from eco_llm.outcome import NOT_COMPARABLE, Outcome
from eco_llm.perf import environment
from eco_llm.proof import compare
from eco_llm.proof.compare import REPORT_FILE, SETTLE_STEPS
from eco_llm.proof.report import write_report
from eco_llm.proof.revisions import Revision, turns_protocol
from eco_llm.proof.runs import Program, Stopped, read_records
from eco_llm.proof.statistics import difference
from eco_llm.proof.turns import PROTOCOL, RunFailed
from eco_llm.training.hooks import turns

Flags = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))


# -- the command line ---------------------------------------------------------------------------------------


def test_a_sides_flags_are_one_word() -> None:
    ours, others = _take(
        ["--a", "--no-torch-compile --lr 1", "--steps", "3", "--b=@x.txt", "--separate", "--pairs", "9"]
    )
    assert ours == ["--a=--no-torch-compile --lr 1", "--b=@x.txt", "--separate", "--pairs=9"]
    assert others == ["--steps", "3"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to compare"),
        (["--a", "--stepz 3"], "unknown flag --stepz"),
        (["--a", "--lr 'x"], "--a: unbalanced quote"),
        (["--a", "@nowhere.txt"], "nowhere.txt"),
        (["--a", "", "--pairs", "7"], "--pairs 7: fewer than 8"),
        (["--a", "", "--min-effect", "nan"], "--min-effect must be"),
        (["--b", "--batch-size 64"], "tokens a step"),
        (["--b", "--seed 5"], "--seed is 0 in A and 5 in B"),
        (["--b", "--lr 1e-9"], "--lr is 0.001 in A and 1e-09 in B: they would learn differently"),
        (["--b", "--optimizer adamw"], "--gate-steps 1 compares speed alone"),
        (["--b", "--output-dir elsewhere"], "--output-dir is the comparison's"),
        (["--a-rev", "no-such-revision"], "--a-rev 'no-such-revision' is no revision"),
        (["--a-rev", "--help"], "is no revision"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    more: list[str], message: str, tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["compare", *tiny_flags(), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- verdicts --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    """Sides that are no processes; all else, from flags to report, is the comparison's own."""
    monkeypatch.setattr(compare, "TurnRun", InProcess)
    monkeypatch.setattr(environment, "collect", lambda *of: {"date": "now", "command": "", "commit": None})
    return InProcess


STEP_S = 0.0015


@pytest.mark.slow
def test_equal_sides_differ_in_no_comparison_and_five_percent_are_found(
    in_process: type[InProcess], tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty comparisons of each kind, with steps of 1.5 ms of wall clock and 5% planted in B: at least 19 of 20 right
    and none the opposite. benchmarks/compare_verdicts.py asks the same of training in processes of its own."""
    verdicts: dict[float, list[str]] = {0.0: [], 0.05: []}
    for i in range(20):
        for planted, said in verdicts.items():
            monkeypatch.setattr(in_process, "seconds", {"a": STEP_S, "b": STEP_S * (1 + planted)})
            sides = ["--a", "", "--b", "", "--window-steps", "2", "--seed", str(i)]
            assert main(["compare", *tiny_flags("--perf-warmup-steps 0"), *sides]) == 0
            found = report(tmp_path / "run")
            said.append(found["verdict"])
            assert found["pairs"] >= 40
            assert min(s["b"]["step_time_s"] for s in found["samples"]) >= STEP_S * (1 + planted)
    assert verdicts[0.0].count("no difference shown") >= 19
    assert verdicts[0.05].count("slower") >= 19
    assert "faster" not in verdicts[0.05]


def test_the_real_loop_with_five_percent_planted_is_found_and_without_is_not(
    in_process: type[InProcess], tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty of each kind again, on a simulated machine whose processes differ as live ones do: the trainer's own clock
    and log, and the delay that live runs sleep."""
    monkeypatch.setattr(compare, "TurnRun", Simulated)
    right = {0.0: 0, 0.05: 0}
    for i in range(20):
        for planted in right:
            monkeypatch.setattr(Simulated, "machine", Machine(seed=i), raising=False)
            monkeypatch.setattr(turns, "time", Simulated.machine)
            monkeypatch.setattr(Simulated, "delays", {"b": planted})
            sides = ["--a", "", "--b", "", "--window-steps", "5", "--seed", str(i)]
            assert main(["compare", *tiny_flags("--perf-warmup-steps 0"), *sides]) == 0
            found = report(tmp_path / "run")
            right[planted] += found["verdict"] == ("slower" if planted else "no difference shown")
            assert found["verdict"] != "faster"
            assert found["paired"]["percent"] == pytest.approx(100 * (1 / (1 + planted) - 1), abs=2.5)
    assert right[0.0] >= 19
    assert right[0.05] >= 19


def test_pairs_come_from_several_pairs_of_processes_that_start_in_turn(
    in_process: type[InProcess], tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    honest = in_process.start

    def start(self: InProcess) -> None:
        started.append(self.side)
        honest(self)

    monkeypatch.setattr(in_process, "start", start)
    monkeypatch.setattr(in_process, "seconds", {"a": 1e-4, "b": 1e-4})
    for pairs, lives, effect in ((8, [8], 4.0), (17, [8, 9], 2.83), (40, [10, 10, 10, 10], 2.0)):
        started.clear()
        sides = ["--a", "", "--b", "", "--window-steps", "1", "--pairs", str(pairs)]
        assert main(["compare", *tiny_flags("--perf-warmup-steps 0"), *sides]) == 0
        found = report(tmp_path / "run")
        assert found["pairs_of_each_life"] == lives
        assert len(found["samples"]) == pairs
        assert "".join(started) == ("abba" * len(lives))[: 2 * len(lives)]
        assert found["min_effect_percent"] == pytest.approx(effect, rel=0.01)  # few processes differ by more


def test_fewer_processes_must_differ_by_more() -> None:
    """One program against itself, two processes of which differ by 1.5% for life: seldom a verdict."""
    generator = np.random.default_rng(0)
    for lives in ([8], [10], [8, 8], [8, 8, 8], [10, 10, 10, 10], [10, 3]):
        false = 0
        for _ in range(300):
            a, b = (
                np.concatenate([0.1 * (1 + 0.015 / 2**0.5 * generator.normal()) * np.ones(n) for n in lives])
                * (1 + 0.005 * generator.normal(size=sum(lives)))
                for _ in range(2)
            )
            found = difference(a.tolist(), b.tolist())
            false += found.verdict(compare.least_effect("cpu", lives)) != "no difference shown"
        assert false <= 9, lives  # 3%
    assert compare.least_effect("cuda", [20] * 7) == 1.0


# -- stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stopped_after", "stop", "code"),
    [(0, KeyboardInterrupt(), 130), (7, Stopped(Outcome.TERMINATED), 143), (8, Stopped(Outcome.TERMINATED), 143)],
)
def test_a_stopped_comparison_keeps_what_it_has(
    stopped_after: int,
    stop: BaseException,
    code: int,
    in_process: type[InProcess],
    tiny_flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """With the fewest pairs that can show something there is a verdict by the usual rule, and never the old report."""
    earlier = tmp_path / "run" / REPORT_FILE
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"verdict": "faster"}', encoding="utf-8")
    honest, turns = InProcess.turn, 0

    def turn(self: InProcess, until: int) -> None:
        nonlocal turns
        if turns == 2 * (1 + stopped_after) + 1:  # in the middle of a pair
            raise stop
        turns += 1
        honest(self, until)

    monkeypatch.setattr(in_process, "turn", turn)
    monkeypatch.setattr(in_process, "seconds", {"a": 0.001, "b": 0.004})
    sides = ["--a", "", "--b", "", "--window-steps", "2"]
    assert main(["compare", *tiny_flags("--perf-warmup-steps 0"), *sides]) == code
    found = report(tmp_path / "run")
    assert found["interrupted"] is True
    assert found["pairs"] == stopped_after
    if stopped_after < 8:
        assert (found["verdict"], found["failure"]) == (None, "interrupted")
    else:
        assert (found["verdict"], len(found["samples"])) == ("slower", 8)
        assert found["sentence"].endswith("; interrupted before the end")
    assert json.loads((earlier.parent / "previous_comparisons" / "001.json").read_text()) == {"verdict": "faster"}
    assert f"interrupted; what was measured: {earlier}" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
def test_a_signal_leaves_a_verdict_of_live_runs(tiny_flags: Flags, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eco_llm", "compare", *tiny_flags("--perf-warmup-steps 0 --lr 4e-3"), "--a", ""]
    delayed = {**os.environ, PLANTED_DELAY: "b:3.0"}
    process = subprocess.Popen([*command, "--pairs", "1000", "--window-steps", "1"], cwd=ROOT, env=delayed)
    run, deadline = tmp_path / "run" / "perf" / "compare", time.monotonic() + 120
    while min(len(read_records(run / side)) for side in "ab") < 10 + 2 * 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == Outcome.TERMINATED
    found = report(tmp_path / "run")
    assert (found["interrupted"], found["gate"]["passed"], found["mode"]) == (True, True, "in turns")
    assert len(found["samples"]) >= 8
    assert found["verdict"] == "slower"
    assert found["a"]["environment"]["source_sha256"] == environment.source_digest()


# -- whole comparisons -----------------------------------------------------------------------------------------


def test_a_planted_slowdown_is_found_and_everything_is_reported(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The smallest comparison, and a slowdown so large that no neighbour can hide it."""
    monkeypatch.setenv(PLANTED_DELAY, "b:3.0")
    flags = tiny_flags("--perf-warmup-steps 5 --steps 100000 --lr 4e-3")
    sides = ["--a", "--c3o-trust-norm-refresh-drift 0.02", "--b", "@empty.txt"]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    monkeypatch.chdir(tmp_path)
    typed = ["compare", *flags, *sides, "@empty.txt", "--pairs", "8", "--window-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/eco_train", *typed])
    assert main(typed) == 0
    out = tmp_path / "run"
    found = report(out)
    assert found["verdict"] == "slower"
    assert (found["mode"], found["interrupted"]) == ("in turns", False)
    assert " --a '--c3o-trust-norm-refresh-drift 0.02' --b @empty.txt @empty.txt --pairs 8" in found["command"]
    assert found["command"].startswith("eco_train compare --d-model 32 ")
    assert found["changed"] == {"c3o_trust_norm_refresh_drift": [0.02, 0.0]}
    assert found["paired"]["high"] < 0
    assert found["paired"]["confidence"] >= 0.99
    assert found["gate"]["passed"] is True
    assert found["gate"]["covers"] == "forward, backward, optimizer"
    assert found["gate"]["progress_difference"] == 0.0
    assert len(found["gate"]["losses_a"]) == 10
    assert len(found["samples"]) == 8
    assert {s["a_first"] for s in found["samples"]} == {True, False}
    a, b = found["a"], found["b"]
    assert found["throughput_delta_tokens_per_s"] == pytest.approx(
        b["tail_throughput_tokens_per_s"] - a["tail_throughput_tokens_per_s"]
    )
    assert found["throughput_delta_percent"] == pytest.approx(
        100 * (found["tail_throughput_b_tokens_per_s"] / found["tail_throughput_a_tokens_per_s"] - 1)
    )
    for name in ("step_time", "forward", "backward", "opt_step"):
        assert found[f"tail_{name}_delta_s"] == pytest.approx(b[f"tail_{name}_s"] - a[f"tail_{name}_s"])
    assert found["peak_memory_delta_gib"] is not None
    for key in ("commit", "versions", "cpu", "command", "source_sha256"):
        assert a["environment"][key] == b["environment"][key] or key == "command"
    for label in "ab":
        steps = read_records(out / "perf" / "compare" / label)
        assert len(steps) == 10 + 8 * (SETTLE_STEPS + 2)
        assert not list((out / "perf" / "compare" / label / "checkpoints").glob("*"))
    assert "B is slower" in capsys.readouterr().out


def test_a_red_gate_gives_no_speed(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """B skips one step of the ten, in bf16. The report says on what it was seen, and the earlier one is set aside."""
    faulty = Program((sys.executable, str(Path(__file__).with_name("faulty_train.py"))), Program.this().environment)
    monkeypatch.setattr(Program, "this", staticmethod(lambda: faulty))
    earlier = tmp_path / "run" / REPORT_FILE
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"verdict": "faster"}', encoding="utf-8")
    sides = ["--a", "", "--b", "", "--pairs", "8", "--window-steps", "1"]
    assert main(["compare", *tiny_flags("--dtype bf16 --lr 4e-3"), *sides]) == NOT_COMPARABLE
    found = report(tmp_path / "run")
    assert found["verdict"] is None
    gate = found["gate"]
    assert (gate["passed"], gate["losses_a"][:3]) == (False, gate["losses_b"][:3])
    assert gate["progress_difference"] > gate["progress_tolerance"] == 0.02
    assert not [key for key in found if "throughput" in key]
    assert "no verdict on speed" in capsys.readouterr().out
    kept = earlier.parent / "previous_comparisons" / "001.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == {"verdict": "faster"}
    about = environment.collect()
    for key in ("commit", "source_sha256", "versions", "cpu", "python"):
        assert found["environment"][key] == about[key] or key == "versions"
    assert found["date"][:10] == about["date"][:10]
    assert found["a"]["commit"] == about["commit"]
    markdown = write_report([tmp_path / "run"])[0].read_text(encoding="utf-8")
    assert "Paired comparison: no verdict on speed, since [in 10 steps the loss fell by" in markdown
    assert "#/environment/source_sha256)" in markdown
    assert f"{found['date']}](" in markdown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_separate_processes_and_a_revision(tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is the newest commit, checked out beside the working tree; nothing of it stays. Two pairs are processes, the
    others their copies, for speed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.chdir(ROOT)  # where an `eco_llm` lies that is not the revision's
    start, real = Program.start, []

    def twice(self: Program, words: list[str], log: Path) -> Any:
        run = Path(next(w for w in words if w.startswith("--output-dir=")).removeprefix("--output-dir="))
        side, number = run.name.split("_")
        if int(number) <= 2:
            real.append(run.name)
            return start(self, words, log)
        shutil.copytree(run.with_name(f"{side}_001"), run)
        return nullcontext(SimpleNamespace(wait=lambda: 0))

    monkeypatch.setattr(Program, "start", twice)
    flags = tiny_flags("--perf-warmup-steps 1 --perf-measure-steps 2")
    assert main(["compare", *flags, "--b-rev", "HEAD", "--separate", "--pairs", "8", "--gate-steps", "1"]) == 0
    found = report(tmp_path / "run")
    assert (found["mode"], found["why_separate"]) == ("separate processes", "--separate")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found["b"]["commit"] == head
    assert found["b"]["environment"]["dirty"] is False
    assert found["b"]["environment"]["commit"] == head
    assert len(found["samples"]) == 8
    assert sorted(real) == ["a_001", "a_002", "b_001", "b_002"]
    after = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "eco_llm_revision_" not in after.stdout
    assert not list((tmp_path / "run").rglob("checkpoints"))


def test_a_revision_is_checked_out_and_removed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    revision = Revision.find("HEAD", "--a-rev")
    with revision.checked_out() as root:
        assert (root / "eco_llm" / "__main__.py").exists()
        asked = Program.of(root).ask(["--version"])
        assert (asked.returncode, asked.stdout[:9]) == (0, "eco_train")
    assert not root.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(root) not in listed.stdout


def test_which_checkouts_can_take_turns(tmp_path: Path) -> None:
    assert turns_protocol(ROOT) == PROTOCOL
    assert turns_protocol(tmp_path) is None


def test_the_program_is_this_code_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eco_llm").mkdir()
    (tmp_path / "eco_llm" / "__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    assert Program.this().ask(["--version"]).returncode == 0
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert Program.this().command == (sys.executable,)


def test_without_room_for_two_each_window_gets_a_process(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The second run dies for lack of memory, as on a small card; the other way is replaced by turns, for speed."""
    started: list[str] = []

    class NoRoom(compare.TurnRun):
        def start(self) -> None:
            super().start()
            started.append(self.side)
            if started == ["a", "b"]:
                raise RunFailed("b", 3, "no room")

    monkeypatch.setattr(compare, "TurnRun", NoRoom)
    monkeypatch.setattr(compare.Comparison, "_separately", compare.Comparison._in_turns)
    sides = ["--a", "", "--pairs", "8", "--window-steps", "1"]
    assert main(["compare", *tiny_flags("--perf-warmup-steps 0 --lr 4e-3"), *sides]) == 0
    assert started == ["a", "b", "a", "b"]
    found = report(tmp_path / "run")
    assert found["mode"] == "separate processes"
    assert found["why_separate"] == "two live runs do not fit in memory (B out of memory: no room)"
    assert "each window gets a process of its own" in capsys.readouterr().out


def test_a_side_that_dies_gives_no_verdict(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def dies(self: compare.TurnRun, until: int) -> None:
        raise RunFailed(self.side, 4, "the loss is nan")

    monkeypatch.setattr(compare, "TurnRun", InProcess)
    monkeypatch.setattr(InProcess, "turn", dies)
    assert main(["compare", *tiny_flags(), "--a", "", "--pairs", "8"]) == 4
    found = report(tmp_path / "run")
    assert (found["verdict"], found["failure"]) == (None, "A not finite: the loss is nan")
    assert found["environment"]["source_sha256"] == environment.source_digest()
    assert "no verdict: A not finite" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("planted", "verdict"), [("b:0.3", "slower")])
def test_verdicts_of_live_runs(
    planted: str, verdict: str, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slowdown that is found even beside other tests; benchmarks/compare_verdicts.py does it 20 times with 5%.

    Two equal sides are compared there too, on a quiet machine: beside other tests one process may have the better core
    for a minute, and the verdict is then wrong (docs/compare.md)."""
    monkeypatch.setenv(PLANTED_DELAY, planted)
    assert (
        main(["compare", *tiny_flags("--lr 4e-3"), "--a", "", "--b", "", "--pairs", "60", "--window-steps", "3"]) == 0
    )
    assert report(tmp_path / "run")["verdict"] == verdict
