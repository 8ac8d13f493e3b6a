from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eco_llm.config import DataConfig
from eco_llm.data.inspect import describe
from eco_llm.data.prepare import prepare
from eco_llm.data.shards import PreparedData
from eco_llm.errors import UserError


def test_it_tells_counts_skips_and_the_first_documents(config: DataConfig, corpus: Path) -> None:
    (corpus / "doc000.py").write_bytes(b"\xff")
    (corpus / "doc001.py").write_text("short = 1\n", encoding="utf-8", newline="\n")
    data = prepare(config, 300)
    found = json.loads(json.dumps(describe(data.path)))
    assert found == describe(data.path / "manifest.json")
    train = found["splits"]["train"]
    assert train["documents"] + found["splits"]["val"]["documents"] == 59
    assert train["tokens"] == len(data.tokens("train"))
    assert train["bytes_per_token"] == pytest.approx(train["text_bytes"] / train["tokens"], abs=1e-4)
    assert "short = 1\n<|endoftext|>" in train["first_documents"] + found["splits"]["val"]["first_documents"]
    assert len(train["first_documents"]) == 3
    assert found["skips"] == {"bad UTF-8": {"count": 1, "examples": ["corpus/doc000.py: byte 0xff at offset 0"]}}
    assert found["verified"] is True
    assert found["tokenizer"]["lossless"] is True


def test_it_verifies_checksums_unless_told_not_to(prepared: PreparedData, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(prepared.path, copy)
    raw = bytearray((copy / "val-00000.bin").read_bytes())
    raw[10] ^= 1
    (copy / "val-00000.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"val-00000\.bin: its checksum"):
        describe(copy)
    assert describe(copy, verify=False)["verified"] is False


def test_a_cache_folder_names_what_is_in_it(prepared: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"name one of them: {prepared.path.name}"):
        describe(prepared.path.parent)
    with pytest.raises(UserError, match="not a prepared data set"):
        describe(tmp_path)
    with pytest.raises(UserError, match="not a prepared data set"):
        describe(tmp_path / "absent")
