"""`eco_train plan` as a user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eco_llm.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PROFILE = f"@{ROOT / 'train_sigma_args.txt'}"


def test_a_page_with_flags_that_train_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", PROFILE, "--vram-gib", "8", "--instant-mode", "auto", "--batch-size", "32"]) == 0
    page = capsys.readouterr().out
    for word in ("reserve", "recompute", "largest batch for this model", "largest model for this batch", "eco_train @"):
        assert word in page
    suggestions = [line.split() for line in page.splitlines() if line.startswith("  --")]
    assert len(suggestions) == 2
    for flags in suggestions:
        assert main(["train", PROFILE, *flags, "--print-config"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PROFILE, "--vram-gib", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["instant_mode"] == "none"
    assert found["parameters"] == 171_685_176
    for candidate in found["candidates"]:
        kinds = ("weights", "gradients", "optimizer", "activations", "temporaries")
        assert sum(candidate[kind] for kind in kinds) == candidate["peak"]
        assert candidate["peak"] + candidate["reserve"] == candidate["total"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", "4"], "--vram-gib is needed"),
        (["--vram-gib", "8", "--optimizer", "muon"], "--optimizer muon"),
        (["--vram-gib", "8", "--mamba-head-dim", "32"], "--mamba-head-dim 32"),
        (["--vram-gib", "8", "--instant-mode", "sometimes"], "'sometimes' is not one of"),
        (["--vram-gib", "-1"], "--vram-gib must be between"),
    ],
)
def test_refusals_are_one_line(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_auto_is_resolved_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [PROFILE, "--vram-gib", "24", "--instant-mode", "auto", "--batch-size", "64", "--seq-len", "1024"]
    assert main(["train", *flags, "--print-config"]) == 0
    mode = json.loads(capsys.readouterr().out)["instant"]["instant_mode"]
    assert mode.startswith("recompute*")
    assert mode.count("*") == 2


def test_it_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from eco_llm.cli.main import main; "
        f"code = main(['plan', {PROFILE!r}, '--vram-gib', '8', '--instant-mode', 'auto', '--batch-size', '64']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False, env=_env())
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 15  # 2 to 3 s alone; test workers share two cores


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
