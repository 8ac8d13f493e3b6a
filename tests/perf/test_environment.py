"""The environment block: complete, honest without git, GPU or torch, and silent about the user's folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eco_llm.perf import environment


def test_collects_without_importing_torch() -> None:
    code = (
        "import json, sys; from eco_llm.perf import environment as e; env = e.collect();"
        "assert 'torch' not in sys.modules; print(json.dumps(env, allow_nan=False))"
    )
    root = Path(environment.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, encoding="utf-8", cwd=root)
    env = json.loads(done.stdout)
    assert env["versions"]["torch"][0].isdigit()
    assert env["cpu"]["logical_cores"] >= 1
    assert env["cpu"]["memory_gib"] > 0
    assert env["gpu"] is None
    assert len(env["source_sha256"]) == 64


def test_imported_torch_gives_its_own_version() -> None:
    import torch

    assert environment.collect()["versions"]["torch"] == str(torch.__version__)


def test_command_hides_home_and_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home" / "ada", tmp_path / "home" / "ada" / "project"
    here.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.chdir(here)
    argv = [f"{home}/bin/eco_train", f"@{here}/args.txt", f"--data={home}/text", f"{home}xyz", str(here), "a b"]
    line = environment.command_line(argv)
    assert line == f"eco_train @./args.txt '--data=~/text' {home}xyz . 'a b'"


def test_commit_is_of_this_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECO_LLM_COMMIT", raising=False)
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path / "project" / "eco_llm")
    assert environment._commit() == (None, None)  # no .git
    package = tmp_path / "project" / "eco_llm"
    package.mkdir(parents=True)
    source = package / "a.py"
    source.write_text("a = 1\n", encoding="utf-8")

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(package.parent), *who, *arguments], check=True, capture_output=True)

    git("init")
    assert environment._commit() == (None, None)  # no commit yet
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = environment._commit()
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    (package.parent / "benchmarks" / "results").mkdir(parents=True)
    (package.parent / "benchmarks" / "results" / "x.json").write_text("{}", encoding="utf-8")
    assert environment._commit() == (commit, False)  # evidence does not change the code that made it
    source.write_text("a = 2\n", encoding="utf-8")
    assert environment._commit() == (commit, True)
    monkeypatch.setenv("ECO_LLM_COMMIT", "abc")
    assert environment._commit() == ("abc", None)
    monkeypatch.delenv("ECO_LLM_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert environment._commit() == (None, None)  # no git


def test_source_digest_sees_content_and_not_line_endings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    first = environment.source_digest(tmp_path)
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n")
    assert environment.source_digest(tmp_path) == first
    (tmp_path / "a.py").write_bytes(b"x = 2\n")
    assert environment.source_digest(tmp_path) != first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    (tmp_path / "b.py").write_bytes(b"x = 1\n")
    assert environment.source_digest(tmp_path) != first


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    import torch

    torch.zeros(1, device="cuda")
    gpu = environment.collect("cuda")["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name()
    assert gpu["driver"]
    assert gpu["compute_capability"] == "{}.{}".format(*torch.cuda.get_device_capability())


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was started with a bare user number."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert environment.command_line(["/bin/eco_train", "--steps", "3"]) == "eco_train --steps 3"
