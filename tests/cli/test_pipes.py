"""`eco_train … | head`: a reader that leaves early is no error, whichever library was writing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eco_llm.cli.main import main


@pytest.fixture(scope="module")
def prepared(corpus: Path, data_cache: Path) -> Path:
    words = ["--data", str(corpus), "--vocab-size", "300", "--data-cache", str(data_cache)]
    assert main(["data", "prepare", *words]) == 0
    (folder,) = [path for path in data_cache.iterdir() if path.is_dir()]
    return folder


def inspect_json(folder: Path) -> list[str]:
    return ["data", "inspect", "--path", str(folder), "--json"]


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe's other end is closed through POSIX calls")
@pytest.mark.parametrize(
    "words",
    [lambda folder: ["data", "inspect", "--path", str(folder)], inspect_json, lambda folder: ["train", "--help"]],
)
def test_a_reader_that_has_left(words: Callable[[Path], list[str]], prepared: Path) -> None:
    import os

    read, write = os.pipe()
    os.close(read)  # before anything is written, so that the first write already fails
    command = [sys.executable, "-m", "eco_llm", *words(prepared)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
