"""Run directories: what starting a run in a place would do, who may work there, and what resuming does to the log."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eco_llm.config import COUPLED_FORM, InstantConfig, TrainConfig, to_dict
from eco_llm.errors import UserError
from eco_llm.training.run_directory import RunDirectory


def config(*, d_model: int = 64, lr: float = 1e-3, **training: Any) -> TrainConfig:
    default = TrainConfig()
    return dataclasses.replace(
        default,
        training=dataclasses.replace(default.training, **training),
        model=dataclasses.replace(default.model, d_model=d_model),
        optimizer=dataclasses.replace(default.optimizer, lr=lr),
    )


def run_at(path: Path, settings: TrainConfig | None = None) -> RunDirectory:
    """A run that has trained a little, and stopped."""
    run = RunDirectory(path)
    run.open()
    run.write_config({"config": to_dict(settings or config())})
    run.metrics_file.write_text('{"step": 1}\n', encoding="utf-8")
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    (run.checkpoints / "step_00000001" / "state.json").write_text("{}")
    run.close()
    return run


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes | None]]:
    """Every path under `folder` with its mode, time of change and content."""
    found = {}
    for p in sorted(folder.rglob("*")):
        status = p.stat()
        found[str(p)] = (status.st_mode, status.st_mtime_ns, p.read_bytes() if stat.S_ISREG(status.st_mode) else None)
    return found


def refusal(run: RunDirectory, settings: TrainConfig) -> str:
    """The one-line message with which `check` refuses."""
    with pytest.raises(UserError) as caught:
        run.check(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _check_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every call of `check` in this file, however it ends, must leave the file system as it was."""
    real = RunDirectory.check

    def watched(self: RunDirectory, settings: TrainConfig) -> str:
        before = snapshot(tmp_path)
        try:
            return real(self, settings)
        finally:
            assert snapshot(tmp_path) == before

    monkeypatch.setattr(RunDirectory, "check", watched)


# -- check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_place(tmp_path: Path, resume: bool) -> None:
    assert RunDirectory(tmp_path / "a" / "b").check(config(resume=resume)) == "new"
    (tmp_path / "empty").mkdir()
    assert RunDirectory(tmp_path / "empty").check(config(resume=resume)) == "new"


def test_what_open_makes_is_still_new(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    run.open()
    assert run.check(config()) == "new"
    run.close()
    assert run.check(config()) == "new"


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_other_things(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "not empty and holds no run" in refusal(RunDirectory(tmp_path), config(resume=resume))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "content", ['{"model_type": "llama"}', "[]", '{"format": 1}', '{"format": 1, "config": []}', "{"]
)
def test_the_config_of_another_program_is_left_alone(tmp_path: Path, content: str, resume: bool) -> None:
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").touch()
    assert str(tmp_path / "config.json") in refusal(RunDirectory(tmp_path), config(resume=resume))


@pytest.mark.parametrize("below", ["", "/run", "/a/b/run"])
def test_a_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is not a directory" in refusal(RunDirectory(Path(f"{tmp_path}/file{below}")), config())


def test_a_name_too_long(tmp_path: Path) -> None:
    assert "too long" in refusal(RunDirectory(tmp_path / ("x" * 300)), config())


@pytest.mark.parametrize("name", [".", "run/deeper"])
def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not (mode & os.W_OK))  # root may write anywhere
    assert f"no permission to write in {tmp_path}" in refusal(RunDirectory(tmp_path / name), config())


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_at(tmp_path)

    def deny(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", deny)
        assert "Permission denied" in refusal(run, config())


def test_the_same_settings_resume(tmp_path: Path) -> None:
    assert run_at(tmp_path / "run").check(config()) == "resume"


def test_settings_that_change_nothing_learned_may_change(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    changed = config(steps=9999, log_interval=3, keep_checkpoints=7, output_dir="elsewhere", sample_prompt="x")
    assert run.check(changed) == "resume"


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    message = refusal(run, config(d_model=128, lr=0.5))
    assert "--d-model 64 → 128" in message
    assert "--lr 0.001 → 0.5" in message
    assert "--no-resume" in message
    assert "--steps" not in message
    message = refusal(run, config(d_model=128, lr=0.5, seed=1, batch_size=1, seq_len=8))
    assert message.count("→") == 3
    assert "and 2 more" in message


def test_a_run_from_before_a_default_goes_on_with_what_it_had(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del saved["config"]["c3o"]["c3o_nesterov"]  # as a version without it wrote
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    assert "(--no-c3o-nesterov → --c3o-nesterov)" in refusal(run, config())
    without = config()
    without = dataclasses.replace(without, c3o=dataclasses.replace(without.c3o, c3o_nesterov=False))
    assert run.check(without) == "resume"


def test_other_settings_after_a_run_that_saved_nothing(tmp_path: Path) -> None:
    """Out of memory in step 1, and the advice is a smaller --batch-size: nothing would be lost."""
    run = run_at(tmp_path)
    shutil.rmtree(run.checkpoints / "step_00000001")
    assert run.check(config(batch_size=1)) == "set aside"
    assert run.check(config()) == "resume"


@pytest.mark.parametrize("settings", [config(resume=False), config(resume=False, seed=3)])
def test_no_resume_sets_aside(tmp_path: Path, settings: TrainConfig) -> None:
    assert run_at(tmp_path).check(settings) == "set aside"


@pytest.mark.parametrize(
    "content", ["", "{", "\0\0", "null", '{"format": 2}', '{"config": {}}', '{"format": 1, "config": 3}']
)
def test_damaged_settings(tmp_path: Path, content: str) -> None:
    run = run_at(tmp_path)
    run.config_file.write_text(content)
    assert str(run.config_file) in refusal(run, config())
    assert run.check(config(resume=False)) == "set aside"  # the way out: nothing else lies here


def test_settings_of_an_unknown_version(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    raw = to_dict(config())
    run.write_config({"config": {**raw, "model": {**raw["model"], "wings": 2}}})
    assert "wings" in refusal(run, config())


def test_undecodable_settings(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    run.config_file.write_bytes(b"\xff\xfe{}")
    assert str(run.config_file) in refusal(run, config())


def test_a_crash_before_the_settings_were_saved(tmp_path: Path) -> None:
    (tmp_path / "run" / "errors").mkdir(parents=True)
    run = RunDirectory(tmp_path / "run")
    assert run.check(config()) == "set aside"
    (run.errors / "crash.json").touch()
    assert run.check(config()) == "set aside"


def test_a_kill_while_the_settings_were_being_saved(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.open()
    run.close()
    (tmp_path / ".tmp-123-config.json").write_text("{")  # what files.replacing leaves
    assert run.check(config()) == "new"


# -- set aside -------------------------------------------------------------------------------------------------


def test_setting_aside_moves_the_run_whole(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    for folder in (run.perf, run.tensorboard, run.errors):
        folder.mkdir()
        (folder / "x").touch()
    for name in ("metrics.superseded.jsonl", "report.html", "notes.txt"):
        (run.path / name).write_text(name)

    def content(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    before = content(run.path)
    first = run.set_aside()
    assert first == run.path / "previous" / "001"
    assert content(first) == {k: v for k, v in before.items() if k not in (".lock", "notes.txt")}
    assert {p.name for p in run.path.iterdir()} <= {".lock", "previous", "notes.txt"}
    assert RunDirectory(first).saved_config() == config()  # still a run, to be looked at or sampled from


def test_a_second_one_beside_the_first(tmp_path: Path) -> None:
    run = run_at(tmp_path, config(seed=1))
    run.set_aside()
    run_at(tmp_path, config(seed=2))
    assert run.set_aside() == tmp_path / "previous" / "002"
    assert [RunDirectory(tmp_path / "previous" / n).saved_config().training.seed for n in ("001", "002")] == [1, 2]
    (tmp_path / "previous" / "007").mkdir()
    (tmp_path / "previous" / "old").mkdir()
    assert run.set_aside() == tmp_path / "previous" / "008"
    assert run.check(config(seed=3)) == "new"


def test_a_crash_while_setting_aside_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_at(tmp_path)
    (tmp_path / "notes.txt").touch()  # beside which nothing but the settings tells that this is a run
    rename, calls = Path.rename, 0

    def fail_late(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("killed")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_late)
        with pytest.raises(OSError, match="killed"):
            run.set_aside()
    assert run.check(config(resume=False)) == "set aside"
    run.set_aside()
    assert {p.name for p in tmp_path.iterdir()} <= {".lock", "previous", "notes.txt"}


# -- the lock --------------------------------------------------------------------------------------------------

HOLDER = """
import pathlib, sys, time
from eco_llm.training.run_directory import RunDirectory
run = RunDirectory(pathlib.Path(sys.argv[1]))
run.open()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_opener_is_refused(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.open()
    with pytest.raises(UserError, match="in use by another eco_train"):
        second.open()
    second.close()  # holds nothing, drops nothing
    with pytest.raises(UserError, match="in use"):
        RunDirectory(tmp_path).open()
    first.close()
    second.open()
    second.close()
    second.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_another_process_is_kept_out_until_the_holder_dies(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == b"held"
        run = RunDirectory(tmp_path)
        with pytest.raises(UserError, match="in use"):
            run.open()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        run.open()
        run.close()


def test_a_place_that_cannot_be_made_after_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output-dir"):
        RunDirectory(tmp_path / "file" / "run").open()


def test_an_interrupted_run_is_known_by_its_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory(tmp_path).saved()
    assert run_at(tmp_path).saved()["format"] == 1


# -- rewinding the log -----------------------------------------------------------------------------------------


def lines(*steps: int) -> list[bytes]:
    return [json.dumps({"step": s, "loss": s / 7}).encode() + b"\n" for s in steps]


def log(run: RunDirectory, *parts: bytes) -> None:
    run.path.mkdir(exist_ok=True)
    run.metrics_file.write_bytes(b"".join(parts))


def superseded(run: RunDirectory) -> bytes:
    path = run.path / "metrics.superseded.jsonl"
    return path.read_bytes() if path.exists() else b""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_later_lines_are_moved(run: RunDirectory) -> None:
    log(run, *lines(1, 2, 3, 4, 5))
    assert run.rewind_metrics(3) == 2
    assert run.metrics_file.read_bytes() == b"".join(lines(1, 2, 3))
    assert superseded(run) == b"".join(lines(4, 5))
    assert run.rewind_metrics(3) == 0
    assert superseded(run) == b"".join(lines(4, 5))
    assert {p.name for p in run.path.iterdir()} == {"metrics.jsonl", "metrics.superseded.jsonl"}


def test_a_later_rewind_appends(run: RunDirectory) -> None:
    log(run, *lines(1, 2))
    run.rewind_metrics(1)
    log(run, *lines(1, 2, 3))
    assert run.rewind_metrics(0) == 3
    assert run.metrics_file.read_bytes() == b""
    assert superseded(run) == b"".join(lines(2, 1, 2, 3))


def test_nothing_to_do_writes_nothing(run: RunDirectory) -> None:
    assert run.rewind_metrics(3) == 0  # no log at all
    log(run, *lines(1, 2, 3))
    before = snapshot(run.path)
    assert run.rewind_metrics(3) == 0
    assert snapshot(run.path) == before


def test_kept_lines_keep_their_bytes(run: RunDirectory) -> None:
    odd = [
        b'{"note":  "\xe2\x80\xa8 \xc2\x85", "step":2}\r\n',  # line separators inside a string, a Windows line end
        b'{ "step" : 1e0 }\n',
        b'{"step": 2, "loss": "nan"}\n',
    ]
    log(run, *odd, *lines(3))
    assert run.rewind_metrics(2) == 1
    assert run.metrics_file.read_bytes() == b"".join(odd)


@pytest.mark.parametrize(
    "torn",
    [
        b"{", b'{"step": 1', b'{"step": 2, "loss": 0.', b"\0\0\0\0", b'{"loss": \xff\xfe', b"null", b"[2]",
        b'{"loss": 1}', b'{"step": "x"}', b'{"step": NaN}', b'{"step": 1' + b"0" * 400 + b"}", b"\n",
    ],
)  # fmt: skip
def test_a_cut_off_last_line_is_moved(run: RunDirectory, torn: bytes) -> None:
    log(run, *lines(1, 2), torn)
    assert run.rewind_metrics(9) == 1
    assert run.metrics_file.read_bytes() == b"".join(lines(1, 2))
    assert superseded(run) == torn.rstrip(b"\n") + b"\n"


def test_a_last_line_without_its_end_does_not_swallow_the_next(run: RunDirectory) -> None:
    log(run, *lines(1), lines(2)[0].rstrip(b"\n"))
    assert run.rewind_metrics(2) == 0
    with run.metrics_file.open("ab") as f:
        f.writelines(lines(3))
    assert run.metrics_file.read_bytes() == b"".join(lines(1, 2, 3))


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_crash_while_rewinding_loses_no_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    log(run, *lines(1, 2, 3, 4))

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path if moment == "replace" else os, moment, die)
        with pytest.raises(KeyboardInterrupt):
            run.rewind_metrics(2)
    assert run.metrics_file.read_bytes() == b"".join(lines(1, 2, 3, 4))
    run.rewind_metrics(2)
    assert run.metrics_file.read_bytes() == b"".join(lines(1, 2))
    assert set(superseded(run).splitlines(keepends=True)) == set(lines(3, 4))  # twice is fine


def test_a_crash_within_the_superseded_lines_costs_none(run: RunDirectory) -> None:
    log(run, *lines(1, 2, 3))
    (run.path / "metrics.superseded.jsonl").write_bytes(lines(2)[0][:9])
    run.rewind_metrics(1)
    assert set(lines(2, 3)) <= set(superseded(run).splitlines(keepends=True))


def coupled(**training: Any) -> TrainConfig:
    return dataclasses.replace(config(**training), instant=InstantConfig(instant_mode="coupled"))


@pytest.mark.parametrize("resolved", [{}, {"resolved": None}, {"resolved": {"coupled_form": "halves"}}], ids=str)
def test_a_run_of_the_earlier_coupled_network(tmp_path: Path, resolved: dict[str, Any]) -> None:
    """Refused if it saved anything; set aside like any other that did not, with the settings it had or with others."""
    run = run_at(tmp_path, coupled())
    run.write_config({"config": to_dict(coupled()), **resolved})
    for settings in (coupled(), coupled(seed=7), config()):
        assert "as an earlier version had it" in refusal(run, settings)
    assert run.check(coupled(resume=False)) == "set aside"
    with pytest.raises(UserError, match="as an earlier version had it"):
        run.saved_config()
    shutil.rmtree(run.checkpoints / "step_00000001")
    for settings in (coupled(), coupled(seed=7), config()):
        assert run.check(settings) == "set aside"


def test_a_plain_run_needs_no_coupled_form(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    assert "resolved" not in run.saved()
    assert run.saved_config() == config()
    assert run.check(config()) == "resume"


def test_a_run_of_this_coupled_network_goes_on(tmp_path: Path) -> None:
    run = run_at(tmp_path, coupled())
    run.write_config({"config": to_dict(coupled()), "resolved": {"coupled_form": COUPLED_FORM}})
    assert run.saved_config() == coupled()
    assert run.check(coupled()) == "resume"
