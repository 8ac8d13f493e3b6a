"""The README's commands work as written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[list[str]]:
    """Lines of every fenced block of a language, in order."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)
    return [block.strip().splitlines() for block in found]


def test_the_two_commands_come_first() -> None:
    assert blocks("sh")[0] == ["make train", "make test"]


def recipe(target: str, **variables: str) -> list[str]:
    """What make would run for a target, once everything is installed."""
    settings = [f"{k}={v}" for k, v in variables.items()]
    stamps = [word for name in (".installed", ".installed-test") for word in ("-o", f".venv/{name}")]
    command = ["make", "--no-print-directory", "-n", *stamps, target, *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip().splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="the plain pip commands are for machines without make")
def test_the_plain_commands_are_those_of_make() -> None:
    (windows,) = blocks("powershell")
    unix = blocks("sh")[1]
    assert unix[2] == recipe("train")[-1].strip()
    assert unix[3] in recipe("test")[-1]
    assert unix[1].removeprefix(".venv/bin/") == windows[1].removeprefix(".venv\\Scripts\\")
    assert windows[2].split()[1:] == ["--args-file", unix[2].split("@")[1]]
    assert windows[3].split()[1:] == unix[3].split()[1:]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-c constraints.txt" in makefile
    assert "-e '.[test]'" in makefile


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert len(targets) > 10
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
    assert missing == []


def test_the_file_tree_is_true() -> None:
    (tree,) = [block for block in blocks("text") if block[0].startswith("eco_llm/")]
    inside = [line.split()[0] for line in tree if line.startswith("  ")]
    assert len(inside) >= 8
    assert [name for name in inside if not (ROOT / "eco_llm" / name).exists()] == []
    present = {p.name + "/" for p in (ROOT / "eco_llm").iterdir() if (p / "__init__.py").exists()}
    assert present <= set(inside)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_train_on_a_clean_copy(tmp_path: Path) -> None:
    """The first command, whole, in a copy of the tracked files; the packages are those of this environment."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    clone = tmp_path / "clone"
    for name in filter(None, listed.decode().split("\0")):
        target = clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(clone)}
    venv = sys.prefix
    command = ["make", f"VENV={venv}", "-o", f"{venv}/.installed", "train"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = clone / "runs" / "quickstart_cpu"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validated = [row["val_loss"] for row in rows if "val_loss" in row]
    assert validated[-1] < validated[0] < rows[0]["loss"]
    assert validated[-1] < 5.5  # ln V is 8.3: it has learned
    assert "sample, from 'def main():'" in done.stdout
    assert list((run / "checkpoints").glob("step_*"))
    asked = ["--run", "runs/quickstart_cpu", "--prompt", "import os", "--tokens", "5"]
    sample = [f"{venv}/bin/eco_train", "sample", *asked]
    spoken = subprocess.run(sample, cwd=clone, env=environment, capture_output=True, text=True, check=True).stdout
    assert spoken.startswith("import os")
