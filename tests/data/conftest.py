"""A small corpus and its prepared form, shared by the data tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from eco_llm.config import DataConfig
from eco_llm.data.prepare import prepare
from eco_llm.data.shards import PreparedData

VOCAB = 300


def make_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Files of distinct pseudo-code, about 1 kB each."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(documents):
        lines = [f"def f{i}_{rng.randrange(1000)}(x):\n    return x + {rng.randrange(10**6)}\n" for _ in range(24)]
        (folder / f"doc{i:03d}.py").write_text("".join(lines), encoding="utf-8", newline="\n")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(data=(str(corpus),), data_cache=str(tmp_path / "cache"), val_fraction=0.1)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Read-only: tests that change files prepare their own."""
    root = tmp_path_factory.mktemp("prepared")
    corpus = make_corpus(root / "corpus")
    return prepare(DataConfig(data=(str(corpus),), data_cache=str(root / "cache"), val_fraction=0.1), VOCAB)
