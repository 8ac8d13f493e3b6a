"""What `make exe-test` leaves behind: only a complete and successful run is evidence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eco_llm.perf.environment import source_digest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest, time
def test_works(): time.sleep(0.05)
@pytest.mark.skip(reason="no compiler")
def test_cannot_run_here(): pass
"""
FAILING = "def test_does_not_work(): assert False\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like this repository, with the same conftest and other tests, and a build of two files."""
    root = tmp_path / "checkout"
    (root / "tests" / "packaging").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), root / "tests" / "packaging")
    (root / "tests" / "packaging" / "test_it.py").write_text(TESTS, encoding="utf-8")
    (root / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "common.py", root / "benchmarks")
    build = root / "dist" / "eco_train"
    build.mkdir(parents=True)
    (build / "eco_train").write_bytes(b"x" * 2**20)
    (build / "library").write_bytes(b"x" * 2**19)
    (root / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return root


def run(root: Path, *words: str, build: bool = True) -> tuple[int, list[Path]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("ECO_TRAIN_EXE", None)
    if build:
        environment["ECO_TRAIN_EXE"] = "dist/eco_train"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    return done.returncode, sorted((root / "benchmarks").glob("results/*/*.json"))


def test_a_complete_run_is_evidence(checkout: Path) -> None:
    code, files = run(checkout, "tests/packaging")
    assert (code, [path.name for path in files]) == (0, ["executable_tests.json"])
    content = json.loads(files[0].read_text(encoding="utf-8"))
    summary = content["summary"]
    assert {k: summary[k] for k in ("tests", "passed", "skipped", "failed", "size_mib", "files")} == {
        "tests": 2, "passed": 1, "skipped": 1, "failed": 0, "size_mib": 1.5, "files": 2
    }  # fmt: skip
    assert content["environment"]["source_sha256"] == source_digest()
    works, skipped = content["samples"]
    assert (works["test"], works["outcome"]) == ("test_it.py::test_works", "passed")
    assert 0.05 <= works["seconds"] <= summary["seconds"]
    assert (skipped["outcome"], skipped["reason"]) == ("skipped", "no compiler")
    assert content["platform"]
    assert content["table"]["rows"][0][1:4] == ["1", "1", "0"]


@pytest.mark.parametrize(
    ("words", "build", "fails"),
    [
        (["tests/packaging"], True, True),
        (["tests/packaging", "-k", "works"], True, False),
        (["tests/packaging/test_it.py::test_works"], True, False),
        (["tests/packaging"], False, False),
    ],
    ids=["a failure", "a selection", "one test", "no build"],
)
def test_anything_less_is_not(checkout: Path, words: list[str], build: bool, fails: bool) -> None:
    if fails:
        (checkout / "tests" / "packaging" / "test_more.py").write_text(FAILING, encoding="utf-8")
    assert run(checkout, *words, build=build) == (int(fails), [])
