"""eco_llm/frozen.py without a frozen build: which words are an interpreter's, and how its programs run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eco_llm import frozen
from eco_llm.cli.main import COMMANDS
from eco_llm.frozen import Program, interpreter_call

ROOT = Path(frozen.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["-c", "import x", "a", "-m"], Program("-c", "import x", ["a", "-m"], False)),
        (["-u", "-m", "eco_llm", "train", "--steps", "1"], Program("-m", "eco_llm", ["train", "--steps", "1"], True)),
        (["-B", "-S", "-I", "-c", "pass"], Program("-c", "pass", [], False)),
        (["-X", "utf8", "-Wignore", "-Bu", "-m", "this"], Program("-m", "this", [], True)),
    ],
)
def test_an_interpreters_words(words: list[str], program: Program) -> None:
    assert interpreter_call(words) == program


def test_a_file(tmp_path: Path) -> None:
    script = tmp_path / "work er.py"
    script.touch()
    assert interpreter_call([str(script), "--parent=1"]) == Program("file", str(script), ["--parent=1"], False)
    assert interpreter_call([str(tmp_path / "missing.py")]) is None


@pytest.mark.parametrize(
    "words",
    [
        [], ["-c"], ["-m"], ["-h"], ["--help"], ["@train_sigma_args.txt", "--steps", "3"], ["--args-file", "a.txt"],
        ["--steps", "3", "-c", "pass"], *([name, "-m", "json.tool"] for name in COMMANDS),
    ],
)  # fmt: skip
def test_eco_trains_own_words(words: list[str]) -> None:
    assert interpreter_call(words) is None


STAND_IN = "import sys; sys.frozen = True; from eco_llm.frozen import stand_in_for_python as s; s(); print('eco_train')"


def as_executable(*words: str, **environment: str) -> list[str]:
    """What the executable would print for `words`, with this Python in the place of the frozen one."""
    command = [sys.executable, "-c", STAND_IN, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment or None, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_programs_run_as_main_with_their_arguments(tmp_path: Path) -> None:
    show = "import pickle, sys\ndef f(): pass\nprint(__name__, *sys.argv[1:], pickle.loads(pickle.dumps(f)) is f)"
    assert as_executable("-c", show, "a", "-c") == ["__main__ a -c True"]
    (tmp_path / "beside.py").write_text("x = 5", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text("import beside, sys\nprint(__name__, beside.x, sys.argv)", encoding="utf-8")
    assert as_executable(str(script), "--b") == [f"__main__ 5 {[str(script), '--b']}"]
    assert as_executable("-m", "eco_llm", "--version")[0].startswith("eco_train ")
    assert as_executable("--steps", "3") == ["eco_train"]


def test_a_programs_exit_code_is_the_executables() -> None:
    command = [sys.executable, "-c", STAND_IN, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 7


def test_other_programs_get_the_users_library_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYINSTALLER_RESET_ENVIRONMENT", "")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/the/build")
    monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", "/the/users")
    frozen._clean_environment()
    assert frozen.os.environ["LD_LIBRARY_PATH"] == "/the/users"
    assert "LD_LIBRARY_PATH_ORIG" not in frozen.os.environ
    monkeypatch.setenv("LD_LIBRARY_PATH", "/the/build")
    frozen._clean_environment()
    assert "LD_LIBRARY_PATH" not in frozen.os.environ
    assert frozen.os.environ["PYINSTALLER_RESET_ENVIRONMENT"] == "1"
