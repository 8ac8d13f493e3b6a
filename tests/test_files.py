"""Durable writes: whole or absent, strict JSON, nothing left behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from eco_llm import files
from eco_llm.files import fsync_dir, fsync_file, strict, write_json


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    payload = {"é→": [1, 2.5, None, True, "line\nbreak\u2028"], "tiny": 5e-324, "big": 2**127, "minus zero": -0.0}
    write_json(tmp_path / "a.json", payload)
    text = (tmp_path / "a.json").read_bytes()
    assert json.loads(text.decode("utf-8"), parse_constant=refuse) == payload
    assert "é→".encode() in text
    assert text.endswith(b"}\n")
    assert b"\r" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_name_that_was_no_utf8_survives(tmp_path: Path) -> None:
    name = os.fsdecode(b"run-\xff")  # what sys.argv holds for such a file on Linux
    write_json(tmp_path / "a.json", {name: name})
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {name: name}


@pytest.mark.parametrize(("bad", "error"), [(math.nan, ValueError), (math.inf, ValueError), (object(), TypeError)])
def test_what_json_cannot_hold_leaves_the_old_file_alone(tmp_path: Path, bad: object, error: type[Exception]) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(error):
        write_json(tmp_path / "a.json", {"x": [2, bad]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failing_disk_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"x": 1})

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_reader_on_windows_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows lets nobody replace a file that is open; `eco_train watch` opens what a run is writing."""
    rename, refusals = Path.replace, iter([True, True, False])

    def busy(self: Path, target: Path) -> Path:
        if next(refusals, False):
            raise PermissionError(13, "Access is denied")
        return rename(self, target)

    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(Path, "replace", busy)
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": 1}
    refusals = iter([True] * 100)
    monkeypatch.setattr(files, "_PAUSES_S", (0.0, 0.0))
    with pytest.raises(PermissionError):
        write_json(tmp_path / "a.json", {"x": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(fd: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")  # noqa: PTH112
        fsync(fd)

    def spy_replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell a folder's descriptor from a file's")
    monkeypatch.setattr(files.os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_json(tmp_path / "a.json", {})
    assert order == ["file", "rename", "folder"]


def test_flushing_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    fsync_file(tmp_path / "a")
    fsync_dir(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"abc"
    with pytest.raises(FileNotFoundError):
        fsync_file(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_strict_names_what_is_not_finite_at_any_depth() -> None:
    nan = float("nan")
    value = {"a": nan, "b": [1.5, {"c": (math.inf, -math.inf)}], 3: True, "d": None, "e": "nan"}
    assert strict(value) == {"a": "nan", "b": [1.5, {"c": ["inf", "-inf"]}], 3: True, "d": None, "e": "nan"}
    assert value["a"] is nan  # the argument is untouched


def test_strict_leaves_foreign_objects_to_the_writer_unless_told() -> None:
    thing = Path("x")
    assert strict({"a": thing})["a"] is thing
    assert strict({("k", 1): [thing]}, fallback=repr) == {"('k', 1)": [repr(thing)]}
