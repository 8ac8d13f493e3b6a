"""A sweep survives its points, keeps what they showed, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eco_llm.cli.main import main
from eco_llm.outcome import Outcome
from eco_llm.proof import runs
from eco_llm.proof.runs import Program

Flags = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]
FAKE = Program((sys.executable, str(Path(__file__).with_name("fake_train.py"))))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path) -> Callable[..., int]:
    """`faked("--batch-size 2,4", {4: "out_of_memory"})`: sweep with runs that only pretend; its exit code."""
    monkeypatch.setattr(Program, "this", staticmethod(lambda: FAKE))

    def sweep(line: str, behaviour: dict[int, str] | None = None) -> int:
        monkeypatch.setenv("FAKE", json.dumps(behaviour or {}))
        return main(["sweep", "--data", str(corpus), "--output-dir", str(tmp_path / "out"), *line.split()])

    return sweep


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "perf" / "sweep.json").read_text(encoding="utf-8"))


def started(out: Path) -> list[int]:
    return [int(line) for line in (out / "perf" / "sweep" / "started.txt").read_text().split()]


def statuses(content: dict[str, Any]) -> dict[str, str]:
    return {row["name"].removeprefix("batch-size-"): row["status"] for row in content["points"]}


def test_failures_are_survived_recorded_and_cleaned(
    faked: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    failures = {10: "out_of_memory", 12: "crashed", 14: "killed", 16: "refused"}
    assert faked("--batch-size 2,4,6,8,10,12,14,16", failures) == 0
    content = result(out)
    done = dict.fromkeys(("2", "4", "6", "8"), "done")
    assert statuses(content) == {**done, "10": "out_of_memory", "12": "crashed", "14": "killed", "16": "refused"}
    assert content["largest_stable_batch"] == 8
    assert content["fastest_point"] == "batch-size-6"
    assert content["complete"] is False  # a crash or a refusal is tried again
    rows = {row["batch_size"]: row for row in content["points"]}
    assert rows[10]["message"] == "RuntimeError: no room"
    assert rows[16]["message"] == "the text is too short"
    assert "signal 9" in rows[14]["message"]
    for batch in (10, 12):
        (kept,) = rows[batch]["crash_reports"]
        assert json.loads((out / kept).read_text())["exception"] == "RuntimeError"
        assert f"batch-size-{batch}" in kept
    for batch in (2, 4, 6, 8):
        assert (out / rows[batch]["evidence"]).exists()
        assert rows[batch]["peak_memory_gib"] == 1.5
        assert rows[batch]["environment"] == {"commit": "abc"}
    left = {p.name for p in (out / "perf" / "sweep").iterdir() if p.is_dir()}
    assert left == {"errors", *(f"batch-size-{b}" for b in (2, 4, 6, 8))}
    assert not list(out.rglob("checkpoints"))
    shown = capsys.readouterr().out
    assert "largest stable batch: 8" in shown
    assert "fastest: --batch-size 6 (600.0 tokens/s)" in shown
    assert "batch-size-10: out of memory: RuntimeError: no room" in shown


def test_commands_are_recorded_as_typed_and_say_each_thing_once(
    faked: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("--steps 77 --perf-warmup-steps 3  # of the run, not of a point\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eco_train", "sweep", "@mine.txt", "--batch-size", "2,4"])
    assert faked("@mine.txt --batch-size 2,4") == 0
    content = result(tmp_path / "out")
    assert content["command"] == "eco_train sweep @mine.txt --batch-size 2,4"
    command = content["points"][0]["command"].split()
    for flag in ("--output-dir", "--steps", "--batch-size", "--perf-warmup-steps", "--no-resume", "--data"):
        assert sum(word.partition("=")[0] == flag for word in command) == 1, (flag, command)
    assert "--steps=23" in command


def test_a_terminal_gets_a_progress_bar(
    faked: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: this is a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert faked("--batch-size 2,4") == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"step\s+0/60 [━╸╺]+ batch-size-2", shown)
    assert re.search(r"step\s+30/60 [━╸╺]+ batch-size-4", shown)
    monkeypatch.delenv("FORCE_COLOR")
    assert faked("--batch-size 2,4,6") == 0
    assert "━ batch" not in capsys.readouterr().out


def test_a_second_start_runs_what_is_missing(faked: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert faked("--batch-size 2,4,6", {4: "crashed", 6: "out_of_memory"}) == 0
    assert started(out) == [2, 4, 6]
    assert faked("--batch-size 2,4,6,3") == 0
    assert started(out) == [2, 4, 6, 4, 3]
    assert statuses(result(out)) == {"2": "done", "4": "done", "6": "out_of_memory", "3": "done"}
    assert faked("--batch-size 2,4") == 0
    assert started(out) == [2, 4, 6, 4, 3]
    assert statuses(result(out)).keys() == {"2", "4", "6", "3"}  # what is known stays
    assert result(out)["complete"] is True


@pytest.mark.parametrize(
    ("line", "message"),
    [("--batch-size 2,4 --lr 0.5", "--lr 0.001 → 0.5"), ("--lr 1,2 --batch-size 2", "it swept --batch-size")],
)
def test_changed_flags_are_refused_or_start_anew(
    line: str, message: str, faked: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert faked("--batch-size 2,4") == 0
    before = result(out)
    assert faked(line) == 2
    assert message in capsys.readouterr().err
    assert result(out) == before
    assert faked(f"{line} --no-resume") == 0
    assert result(out) != before
    kept = out / "perf" / "previous_sweeps" / "001"
    assert json.loads((kept / "sweep.json").read_text(encoding="utf-8")) == before
    assert (kept / "batch-size-2" / "perf" / "baseline_throughput.json").exists()


def test_changed_code_is_refused(
    faked: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert faked("--batch-size 2,4") == 0
    monkeypatch.setattr("eco_llm.perf.environment.source_digest", lambda: "another")
    assert faked("--batch-size 2,4,6") == 2
    assert "code has changed" in capsys.readouterr().err


def test_another_machine_does_not_add_to_a_table(
    faked: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert faked("--batch-size 2,4") == 0
    file = tmp_path / "out" / "perf" / "sweep.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for row in content["points"]:
        row["environment"] = {"gpu": {"name": "NVIDIA H200"}, "cpu": {"model": "elsewhere"}, "versions": {"torch": "2"}}
    file.write_text(json.dumps(content), encoding="utf-8")
    before = file.read_bytes()
    assert faked("--batch-size 2,4,6") == 2
    assert "was measured on NVIDIA H200, elsewhere, 2, and this is " in capsys.readouterr().err
    assert file.read_bytes() == before
    assert faked("--batch-size 2,4") == 0  # nothing to measure


def test_nothing_but_failures_is_exit_code_1(faked: Callable[..., int], tmp_path: Path) -> None:
    assert faked("--batch-size 2,4", {2: "out_of_memory", 4: "out_of_memory"}) == 1
    assert result(tmp_path / "out")["largest_stable_batch"] is None
    assert result(tmp_path / "out")["fastest_point"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-size 4", "nothing to sweep"),
        ("--batch-size 2,x", "'x' is not a whole number"),
        ("--batch-size 2,4 --stepz 3", "unknown flag --stepz"),
        ("--d-model 64,70 --n-heads 4 --rope-head-dim 8", "not divisible"),
        ("--batch-size 2,4 --data nowhere.txt", "nowhere.txt"),
        ("--steps 2,4", "--steps cannot be a list"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    line: str, message: str, faked: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert faked(line) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_and_its_sweep_share_an_output_directory(tiny_flags: Flags, faked: Callable[..., int]) -> None:
    """Sweep first, train there after, sweep on: neither touches the other's files."""
    flags = tiny_flags("--steps 1", run="out")
    assert faked("--batch-size 2,4") == 0
    assert main(flags) == 0
    out = Path(flags[flags.index("--output-dir") + 1])
    assert not (out / "previous").exists()
    assert result(out)["complete"] is True
    assert (out / "config.json").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
def test_a_stop_leaves_what_was_measured(sent: signal.Signals, tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from eco_llm.cli.main import main; from eco_llm.proof.runs import Program;"
        f"Program.this = staticmethod(lambda: Program({FAKE.command!r})); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "sweep", "--data", str(corpus), "--output-dir", str(out)]
    environment = {**os.environ, "FAKE": json.dumps({"4": "slow"})}
    process = subprocess.Popen([*command, "--batch-size", "2,4,6"], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not (out / "perf" / "sweep" / "batch-size-4" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=30) == {signal.SIGINT: Outcome.INTERRUPTED, signal.SIGTERM: Outcome.TERMINATED}[sent]
    assert statuses(result(out)) == {"2": "done"}
    assert not (out / "perf" / "sweep" / "batch-size-4").exists()


def limited(arguments: Sequence[str], gib: float) -> subprocess.CompletedProcess[str]:
    """eco_train under a limit of its address space, as `ulimit -v` sets it; what it starts inherits it."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30),) * 2)

    return subprocess.run(
        [sys.executable, "-m", "eco_llm", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_real_sweep_with_a_real_out_of_memory(tiny_flags: Flags, tmp_path: Path) -> None:
    flags = tiny_flags("--perf-warmup-steps 1 --perf-measure-steps 2 --seq-len 256 --batch-size 2,4,8192", run="out")
    done = limited(["sweep", *flags], 6)
    assert done.returncode == 0, done.stderr
    content = result(tmp_path / "out")
    assert statuses(content) == {"2": "done", "4": "done", "8192": "out_of_memory"}, done.stdout
    assert content["largest_stable_batch"] == 4
    for row in content["points"][:2]:
        assert row["avg_effective_tokens_per_s"] > 0
        assert row["environment"]["source_sha256"] == content["source_sha256"]
        assert len(runs.read_records(tmp_path / "out" / "perf" / "sweep" / row["name"])) == 3
    (crash,) = content["points"][2]["crash_reports"]
    assert json.loads((tmp_path / "out" / crash).read_text())["kind"] == "out_of_memory"
    assert "largest stable batch: 4" in done.stdout
