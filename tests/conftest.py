"""Shared fixtures: one small real corpus, and a run so small that a test can train it many times."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell that was told `nohup` or `&` hands down ignored signals, which a run rightly leaves ignored; tests that send
# signals must not depend on how pytest was started.
_DEFAULTS = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
for _name, _default in _DEFAULTS.items():
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _default)

# Before torch is imported anywhere: test workers share two cores, and one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

TINY = (
    "--d-model 32 --n-layers 3 --mamba-ratio 2 --attention-ratio 1 --n-heads 2 --kv-latent-dim 16 --rope-head-dim 8"
    " --mamba-head-dim 64 --mamba-state-dim 16 --vocab-size 300 --batch-size 2 --seq-len 24 --warmup-steps 2"
    " --eval-batches 2 --sample-tokens 0 --device cpu --no-torch-compile --log-interval 1"
)
"""Flags of a model of some 30,000 parameters; every part of the real one is in it."""


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """TINY as words."""
    return TINY.split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dozen real Python files, some 200 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in (
        "ast",
        "bisect",
        "calendar",
        "cmd",
        "copy",
        "csv",
        "glob",
        "heapq",
        "json/decoder",
        "json/encoder",
        "shlex",
    ):
        target = folder / f"{name.replace('/', '_')}.py"
        target.write_text((stdlib / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def matrix_products_as_they_were() -> Iterator[None]:
    """Training in bf16 lets what is left in float32 multiply in TF32, for the whole process: not for the next test."""
    yield
    if torch := sys.modules.get("torch"):
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prepared copy of the corpus for every test of a session."""
    return tmp_path_factory.mktemp("cache") / "data"


@pytest.fixture
def tiny_flags(tiny: list[str], corpus: Path, data_cache: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`tiny_flags("--steps 4", run="name")`: the flags of a tiny run in this test's folder."""

    def flags(more: str = "", run: str = "run") -> list[str]:
        places = ["--data", str(corpus), "--data-cache", str(data_cache), "--output-dir", str(tmp_path / run)]
        return [*tiny, *places, *more.split()]

    return flags


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of benchmarks/, a folder of scripts that import each other by name, for this test alone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)
