"""While thousands of modules are imported nothing is collected, and in our own process they are left alone after."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from eco_llm.imports import importing


def test_training_freezes_what_it_imported_and_refuses_as_ever(tmp_path: Path, corpus: Path) -> None:
    code = (
        "import sys\n"
        "from eco_llm.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "import gc; print('torch' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 10_000); sys.exit(code)\n"
    )
    run = tmp_path / "run"
    flags = ["--device", "cuda:99", "--data", str(corpus), "--data-cache", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--output-dir", str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == ["True True True"]
    assert done.stderr.startswith("eco_train: error: --device cuda:99")
    assert not run.exists()


def test_imports_are_not_interrupted_and_then_left_alone() -> None:
    before = gc.get_freeze_count()
    try:
        with importing("a_package_that_is_not_there", freeze=True):
            assert not gc.isenabled()
            kept = [[i] for i in range(100)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_what_is_garbage_by_then_is_collected_and_not_kept() -> None:
    class Garbage:
        pass

    gone: list[int] = []
    loop = Garbage()
    loop.itself = loop  # type: ignore[attr-defined]
    weakref.finalize(loop, gone.append, 1)
    gc.disable()
    try:
        del loop
        assert gone == []
        with importing("a_package_that_is_not_there", freeze=True):
            assert gone == [1]
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
        gc.unfreeze()


def test_nothing_is_done_for_a_package_that_is_there() -> None:
    before = gc.get_freeze_count()
    with importing("pytest", freeze=True):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_failed_import_leaves_collection_on() -> None:
    try:
        with pytest.raises(ModuleNotFoundError), importing("a_package_that_is_not_there", freeze=True):
            __import__("a_package_that_is_not_there")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_callers_objects_stay_collectable() -> None:
    before = gc.get_freeze_count()
    with importing("a_package_that_is_not_there", freeze=False):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
