"""A run in turns is the same run, and works only when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from eco_llm.cli.main import main
from eco_llm.proof.runs import Program, read_records
from eco_llm.proof.turns import RunFailed, TurnRun
from eco_llm.training.hooks.turns import TakeTurns

Flags = Callable[..., list[str]]


def test_turns_change_nothing_but_when(tiny_flags: Flags, tmp_path: Path) -> None:
    assert main(tiny_flags("--steps 8 --eval-interval 0", run="plain")) == 0
    flags = tiny_flags("--steps 8 --eval-interval 0", run="turns")
    with TurnRun("a", Program.this(), flags, tmp_path / "turns", tmp_path / "a.log") as run:
        run.start()
        assert read_records(tmp_path / "turns") == []
        run.turn(3)
        assert [r["step"] for r in read_records(tmp_path / "turns")] == [1, 2, 3]
        process = psutil.Process(run._child.process.pid)
        time.sleep(0.3)  # OpenMP's threads spin for a while
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.1  # idle is idle
        assert len(read_records(tmp_path / "turns")) == 3
        run.turn(7)
        run.leave()
    plain = [(r["loss"], r["grad_norm"]) for r in read_records(tmp_path / "plain")]
    assert [(r["loss"], r["grad_norm"]) for r in read_records(tmp_path / "turns")] == plain[:7]
    assert list((tmp_path / "turns" / "checkpoints").glob("*")) == []
    assert (tmp_path / "turns" / "perf" / "window_10m_bottlenecks.json").exists()


def test_a_run_whose_parent_is_gone_leaves(tiny_flags: Flags, tmp_path: Path) -> None:
    with TurnRun("a", Program.this(), tiny_flags("--steps 8"), tmp_path / "run", tmp_path / "a.log") as run:
        run.start()
        run._child.stdin.close()
        assert run._child.process.wait(timeout=30) == 0


def test_a_refusal_is_told(tiny_flags: Flags, tmp_path: Path) -> None:
    flags = tiny_flags("--seq-len 1000000")
    run = TurnRun("b", Program.this(), flags, tmp_path / "run", tmp_path / "b.log")
    with run, pytest.raises(RunFailed, match="B refused: --seq-len 1000000 is longer") as failure:
        run.start()
    assert (failure.value.ending, failure.value.side) == ("refused", "b")


def test_a_killed_run_is_told(tiny_flags: Flags, tmp_path: Path) -> None:
    with TurnRun("a", Program.this(), tiny_flags("--steps 8"), tmp_path / "run", tmp_path / "a.log") as run:
        run.start()
        run._child.process.kill()
        with pytest.raises(RunFailed, match="A killed"):
            run.turn(3)


def test_the_planted_delay_is_a_share_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = 0.0, []
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr("time.sleep", sleep)
    answers = iter([3, 5])
    hook = TakeTurns(lambda done: next(answers), delay=0.05)
    for step in range(1, 6):
        hook.on_step(step)
        now += 2.0
    assert slept == pytest.approx([0.1, 0.1, 0.1])  # not in a turn's first step, whose time holds the wait
