"""Checkpoints: exact, whole or absent, and honest about damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eco_llm.training import checkpoint
from eco_llm.training.checkpoint import Checkpoint, DamagedCheckpoint, discard_partial, listing, load, save, step_of


def save_numbered(folder: Path, step: int, keep: int = 3, value: float | None = None) -> Path:
    """A small checkpoint whose every part tells its step (or `value`)."""
    v = float(step if value is None else value)
    return save(
        folder,
        step,
        model={"w": torch.full((2, 3), v), "half": torch.full((5,), v, dtype=torch.bfloat16)},
        optimizer={"state": {0: {"m": torch.full((2, 3), -v), "step": step}}, "groups": [{"lr": v / 3}]},
        trainer={"loader": {"cursor": v}, "random": {"cpu": torch.get_rng_state()}},
        keep=keep,
    )


def value_of(loaded: Checkpoint) -> float:
    """The one value all parts of a `save_numbered` checkpoint agree on."""
    assert loaded.optimizer is not None
    values = {
        *loaded.model["w"].flatten().tolist(),
        *loaded.model["half"].tolist(),
        *(-loaded.optimizer["state"][0]["m"]).flatten().tolist(),
        loaded.optimizer["groups"][0]["lr"] * 3,
        loaded.trainer["loader"]["cursor"],
    }
    assert len(values) == 1
    return float(values.pop())


def steps_in(folder: Path) -> list[int]:
    return [step_of(p) for p in listing(folder)]


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith("step_")]


# -- what is saved is what is loaded ---------------------------------------------------------------------------


def bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1, dtype=torch.float64))
    weights = {**model.state_dict(), "half": torch.randn(63).to(torch.bfloat16), "none": torch.empty(0, 4)}
    weights["odd"] = torch.tensor([0x7FC00001, 1, -1], dtype=torch.int32).view(torch.float32)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1 + 0.2)
    model[0](torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    trainer = {"random": checkpoint.random_state(), "skipped": 3, "best": float("inf"), "none": None}

    path = save(tmp_path / "c", 12, model=weights, optimizer=optimizer.state_dict(), trainer=trainer, keep=1)
    loaded = load(path)

    assert path.name == "step_00000012"
    assert loaded.step == 12
    assert loaded.model.keys() == weights.keys()
    for name, t in weights.items():
        assert (loaded.model[name].dtype, loaded.model[name].shape) == (t.dtype, t.shape)
        assert torch.equal(bits(loaded.model[name]), bits(t))
    saved = optimizer.state_dict()
    assert loaded.optimizer is not None
    assert loaded.optimizer["param_groups"] == saved["param_groups"]
    assert loaded.optimizer["state"].keys() == {0, 1}
    for i in (0, 1):
        for key, t in saved["state"][i].items():
            assert torch.equal(bits(loaded.optimizer["state"][i][key]), bits(t))
    assert torch.equal(loaded.trainer.pop("random")["cpu"], trainer.pop("random")["cpu"])  # type: ignore[index]
    assert loaded.trainer == trainer


def test_an_empty_optimizer(tmp_path: Path) -> None:
    loaded = load(save(tmp_path, 1, model={"w": torch.ones(1)}, optimizer={}, trainer={}, keep=1))
    assert (loaded.optimizer, loaded.trainer) == ({}, {})


def test_the_model_alone(tmp_path: Path) -> None:
    path = save_numbered(tmp_path, 4)
    (path / "optimizer.safetensors").unlink()  # a user keeps only what generation needs
    loaded = load(path, with_optimizer=False)
    assert loaded.model["w"].tolist() == [[4.0] * 3] * 2
    assert (loaded.step, loaded.optimizer, loaded.trainer) == (4, None, {})


def test_the_random_state_continues_the_draws(tmp_path: Path) -> None:
    path = save_numbered(tmp_path, 1)
    drawn = torch.rand(5)
    torch.rand(7)
    checkpoint.set_random_state(load(path).trainer["random"])
    assert torch.equal(torch.rand(5), drawn)


@pytest.mark.gpu
def test_the_random_state_of_a_gpu_continues_too(tmp_path: Path) -> None:
    torch.cuda.manual_seed(3)
    state = checkpoint.random_state()
    drawn = torch.rand(5, device="cuda")
    path = save(tmp_path, 1, model={}, optimizer={}, trainer=state, keep=1)
    checkpoint.set_random_state(load(path).trainer)
    assert torch.equal(torch.rand(5, device="cuda"), drawn)


def test_a_model_state_that_is_not_flat_is_refused(tmp_path: Path) -> None:
    for model in ({"w": torch.ones(1), "extra": {"t": torch.ones(1)}}, {"w": torch.ones(1), "note": "x"}):
        with pytest.raises(TypeError, match="flat"):
            save(tmp_path, 1, model=model, optimizer={}, trainer={}, keep=1)  # type: ignore[arg-type]
    assert steps_in(tmp_path) == []


# -- which ones there are --------------------------------------------------------------------------------------


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_numbered(tmp_path, step, keep=2)
    assert steps_in(tmp_path) == [15, 20]
    assert left_over(tmp_path) == []
    save_numbered(tmp_path, 25, keep=1)
    assert steps_in(tmp_path) == [25]


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        save_numbered(tmp_path, step, keep=3)
    assert steps_in(tmp_path) == [99_999_999, 100_000_000, 1_000_000_000]


def test_listing_ignores_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert listing(tmp_path / "absent") == []
    save_numbered(tmp_path, 3)
    (tmp_path / "step_00000004").write_text("a file")
    (tmp_path / "step_final").mkdir()
    (tmp_path / ".partial-step_00000009").mkdir()
    assert steps_in(tmp_path) == [3]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_one_just_saved_outlives_a_damaged_newer_one(tmp_path: Path, keep: int) -> None:
    save_numbered(tmp_path, 5, keep=9)
    save_numbered(tmp_path, 10, keep=9)
    save_numbered(tmp_path, 20, keep=9)
    (tmp_path / "step_00000020" / "state.json").unlink()  # passed over on resume, which went on from 10
    path = save_numbered(tmp_path, 15, keep=keep)
    assert value_of(load(path)) == 15
    assert steps_in(tmp_path) == [10, 15][-keep:]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_numbered(tmp_path, 5)
    save_numbered(tmp_path, 6)
    (tmp_path / "step_00000006" / "stray").touch()
    path = save_numbered(tmp_path, 6, value=60)
    assert value_of(load(path)) == 60
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert steps_in(tmp_path) == [5, 6]
    assert left_over(tmp_path) == []


def test_saving_over_what_two_crashes_left(tmp_path: Path) -> None:
    path = save_numbered(tmp_path, 6)
    for name in (".partial-step_00000006", ".partial-replaced-step_00000006"):
        shutil.copytree(path, tmp_path / name)
        (tmp_path / name / "stray").touch()
    save_numbered(tmp_path, 6, value=60)
    assert value_of(load(path)) == 60
    assert not (path / "stray").exists()
    assert left_over(tmp_path) == []


def test_discard_partial_touches_nothing_else(tmp_path: Path) -> None:
    save_numbered(tmp_path, 1)
    (tmp_path / "mine.txt").touch()
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".partial-step_00000002")
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".partial-dropped-step_00000000")
    discard_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "step_00000001"]
    assert value_of(load(tmp_path / "step_00000001")) == 1


# -- a crash at every moment -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process dying at this point: nothing may catch it."""


OPERATIONS: dict[str, tuple[Any, str]] = {
    "save_file": (checkpoint, "save_file"),
    "fsync_file": (checkpoint, "fsync_file"),
    "write_json": (checkpoint, "write_json"),
    "rename": (checkpoint, "rename"),
    "fsync_dir": (checkpoint, "fsync_dir"),
    "rmtree": (shutil, "rmtree"),
}
# (operation, which call of it): all the calls of one `save` that replaces step 10 and drops step 5
MOMENTS = [
    ("save_file", 1), ("save_file", 2), ("fsync_file", 1), ("fsync_file", 2), ("write_json", 1),
    ("rename", 1), ("rename", 2), ("rename", 3), ("fsync_dir", 1), ("rmtree", 1), ("rmtree", 2),
]  # fmt: skip


def interrupt(monkeypatch: pytest.MonkeyPatch, operation: str, call: int, *, after: bool) -> Callable[[], int]:
    """Die at the `call`-th use of an operation, before it acts or after; returns the count of uses."""
    owner, name = OPERATIONS[operation]
    real, count = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if count == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapped)
    return lambda: count


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("operation", "call"), MOMENTS)
def test_death_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: int, after: bool
) -> None:
    save_numbered(tmp_path, 5)
    save_numbered(tmp_path, 10)
    with monkeypatch.context() as patch:
        interrupt(patch, operation, call, after=after)
        with pytest.raises(Killed):
            save_numbered(tmp_path, 10, keep=1, value=11)
    listed = listing(tmp_path)
    assert listed  # with either version of step 10 to come, step 5 is only dropped at the end
    for path in listed:
        assert value_of(load(path)) in ((5.0,) if step_of(path) == 5 else (10.0, 11.0))

    discard_partial(tmp_path)  # what a resuming process does first
    assert left_over(tmp_path) == []
    assert steps_in(tmp_path)[-1] == 10  # neither version lost
    assert value_of(load(listing(tmp_path)[-1])) in (10.0, 11.0)
    assert value_of(load(save_numbered(tmp_path, 12, keep=9))) == 12
    assert steps_in(tmp_path)[-2:] == [10, 12]


def test_the_moments_are_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_numbered(tmp_path, 5)
    save_numbered(tmp_path, 10)
    counts = {name: interrupt(monkeypatch, name, 0, after=False) for name in OPERATIONS}
    save_numbered(tmp_path, 10, keep=1, value=11)
    assert {name: count() for name, count in counts.items()} == {
        name: max(call for operation, call in MOMENTS if operation == name) for name in OPERATIONS
    }


@pytest.mark.parametrize("operation", ["save_file", "fsync_file", "write_json", "rename", "fsync_dir"])
def test_an_error_does_not_stop_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    save_numbered(tmp_path, 5)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*OPERATIONS[operation], full)
        with pytest.raises(OSError, match="No space left"):
            save_numbered(tmp_path, 10)
    assert value_of(load(tmp_path / "step_00000005")) == 5
    assert value_of(load(save_numbered(tmp_path, 10))) == 10
    assert steps_in(tmp_path) == [5, 10]
    assert left_over(tmp_path) == []


def test_what_cannot_be_removed_yet_waits_for_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no file that someone has open, such as a scanner."""
    save_numbered(tmp_path, 5)

    def held(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Access is denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", held)
        save_numbered(tmp_path, 10, keep=1)
        save_numbered(tmp_path, 15, keep=1)
    assert steps_in(tmp_path) == [15]
    assert len(left_over(tmp_path)) == 2
    assert value_of(load(save_numbered(tmp_path, 20, keep=2))) == 20
    assert left_over(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are mapped")
def test_a_loaded_checkpoint_keeps_no_file_open(tmp_path: Path) -> None:
    loaded = load(save_numbered(tmp_path, 5))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert value_of(loaded) == 5


SAVING_LOOP = """
import itertools, pathlib, sys, torch
from eco_llm.training.checkpoint import save
torch.set_num_threads(1)
for step in itertools.count(1):
    t = torch.full((200_000,), float(step))
    save(pathlib.Path(sys.argv[1]), step, model={"w": t}, optimizer={"m": t}, trainer={"step": step}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_sigkill_in_the_middle_of_saving(tmp_path: Path) -> None:
    known = 0
    for delay in (0.0, 0.004):
        with subprocess.Popen([sys.executable, "-c", SAVING_LOOP, str(tmp_path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for line in child.stdout:
                known = int(line)
                if known % 5 == 0:
                    time.sleep(delay)
                    os.kill(child.pid, signal.SIGKILL)
                    break
            known = max([known, *map(int, child.stdout.read().split())])
        newest = load(listing(tmp_path)[-1])
        assert newest.optimizer is not None
        assert newest.step in (known, known + 1)  # the one announced, or one finished but not yet announced
        assert newest.model["w"].unique().tolist() == [newest.step]
        assert newest.optimizer["m"].unique().tolist() == [newest.step]
        assert newest.trainer == {"step": newest.step}
        for path in listing(tmp_path):
            load(path)
        shutil.rmtree(tmp_path)


# -- damage ----------------------------------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        lambda p: p.write_bytes(p.read_bytes() + b"\0"),
        lambda p: p.write_bytes(b"\xff" * p.stat().st_size),
        lambda p: (p.unlink(), p.mkdir()),
    ],
    ids=["missing", "empty", "one byte short", "half", "one byte more", "overwritten", "a folder"],
)
def test_damage_is_noticed_and_named(tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    path = save_numbered(tmp_path, 7)
    if name == "state.json":  # its last byte is a line end, which may go
        (path / name).write_bytes((path / name).read_bytes().rstrip())
        load(path)
    damage(path / name)
    with pytest.raises(DamagedCheckpoint) as caught:
        load(path)
    assert str(path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere(tmp_path: Path, name: str) -> None:
    path = save_numbered(tmp_path, 7)
    file = path / name
    good = file.read_bytes()
    for i in range(0, len(good), 7):
        file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        if name == "state.json" and good[i : i + 1] == b"\n":
            continue  # turns into a vertical tab or a form feed: refused, or, between values, white space like before
        with pytest.raises(DamagedCheckpoint, match=name):
            load(path)
    file.write_bytes(good)
    assert value_of(load(path)) == 7


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", "3", '"x"', "{}", '{"format": 1}', '{"format": 99}', '{"format": [1]}', "\0" * 9]
)
def test_a_garbage_state_file(tmp_path: Path, content: str) -> None:
    path = save_numbered(tmp_path, 7)
    (path / "state.json").write_text(content, encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        load(path)


def test_a_later_format_says_so(tmp_path: Path) -> None:
    path = save_numbered(tmp_path, 7)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps({**state, "format": 2}), encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match="has format 2, this version reads 1"):
        load(path)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    a, b = save_numbered(tmp_path, 7), save_numbered(tmp_path, 8)
    shutil.copy(a / "model.safetensors", b / "model.safetensors")  # same size, whole, but another step's
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors does not match its checksum"):
        load(b)
