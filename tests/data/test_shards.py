from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eco_llm.data.shards import (
    Manifest,
    PreparedData,
    SplitWriter,
    TokenArray,
    open_prepared,
    token_dtype,
)
from eco_llm.errors import UserError


@pytest.fixture
def copy(prepared: PreparedData, tmp_path: Path) -> Path:
    """A prepared set that a test may damage."""
    return Path(shutil.copytree(prepared.path, tmp_path / "set"))


def test_documents_run_over_shards_and_their_starts_are_kept(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", "uint16", eot_id=9, shard_tokens=4)
    for document in ([1, 2], [3, 4, 5, 6, 7, 8], [], [1], [2, 3, 4]):
        for part in np.array_split(np.array(document, dtype=np.int64), 2):
            if len(part):
                writer.add(part, text_bytes=len(part) * 10)
        writer.end_document()
    info = writer.close()
    assert (info.tokens, info.documents, info.text_bytes) == (16, 4, 120)
    assert [(s.name, s.tokens, s.documents) for s in info.shards] == [
        ("train-00000", 4, 2), ("train-00001", 4, 0), ("train-00002", 4, 1), ("train-00003", 4, 1),
    ]  # fmt: skip
    stream = np.concatenate([np.fromfile(tmp_path / f"{s.name}.bin", dtype="<u2") for s in info.shards])
    assert stream.tolist() == [1, 2, 9, 3, 4, 5, 6, 7, 8, 9, 1, 9, 2, 3, 4, 9]
    starts = [np.fromfile(tmp_path / f"{s.name}.idx", dtype="<u8").tolist() for s in info.shards]
    assert starts == [[0, 3], [], [2], [0]]
    assert info.bytes_per_token == 120 / 16


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_a_read_over_shards_equals_the_joined_array(sizes: list[int], data: st.DataObject) -> None:
    joined = np.arange(sum(sizes), dtype=np.uint16)
    array = TokenArray(np.split(joined, np.cumsum(sizes)[:-1]))
    assert len(array) == len(joined)
    start = data.draw(st.integers(0, len(joined)))
    out = np.full(data.draw(st.integers(0, len(joined) - start)), -7, dtype=np.int64)
    array.read(start, out)
    assert out.tolist() == joined[start : start + len(out)].tolist()
    with pytest.raises(IndexError):
        array.read(start, np.empty(len(joined) - start + 1, dtype=np.int64))


def test_the_stored_type_is_the_narrowest_that_fits() -> None:
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_highest_id_is_stored_exactly(tmp_path: Path, dtype: str) -> None:
    top = np.iinfo(dtype).max
    writer = SplitWriter(tmp_path, "val", dtype, eot_id=int(top))
    writer.add(np.array([0, top - 1]), 1)
    writer.end_document()
    writer.close()
    assert np.fromfile(tmp_path / "val-00000.bin", dtype=np.dtype(dtype).newbyteorder("<")).tolist() == [
        0,
        top - 1,
        top,
    ]


def test_the_manifest_survives_json(prepared: PreparedData) -> None:
    assert Manifest.from_json(prepared.manifest.to_json()) == prepared.manifest
    assert open_prepared(prepared.path, verify=True).manifest == prepared.manifest


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "train-00000.idx"])
def test_a_flipped_bit_is_found_by_verify(copy: Path, name: str) -> None:
    open_prepared(copy, verify=True)
    flip(copy / name)
    with pytest.raises(UserError, match=rf"{name}: its checksum does not match.*delete that folder.*eco_train data"):
        open_prepared(copy, verify=True)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated bin": (
        lambda p: (p / "train-00000.bin").write_bytes(b"12"),
        r"train-00000\.bin: 2 bytes where the manifest says \d+ \(truncated\?\); delete that folder",
    ),
    "longer idx": (
        lambda p: (p / "val-00000.idx").write_bytes((p / "val-00000.idx").read_bytes() + b"x"),
        r"val-00000\.idx: \d+ bytes where",
    ),
    "lost shard": (lambda p: (p / "val-00000.bin").unlink(), r"val-00000\.bin: missing; delete that folder"),
    "flipped manifest": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text(encoding="utf-8").replace('"documents": ', '"documents": 1'),
            encoding="utf-8",
        ),
        r"manifest\.json: not usable \(its hash does not match its content\); delete",
    ),
    "half a manifest": (
        lambda p: (p / "manifest.json").write_bytes((p / "manifest.json").read_bytes()[:100]),
        r"manifest\.json: not usable \(",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"no manifest\.json there, so it is not a prepared"),
    "other tokenizer": (
        lambda p: (p / "tokenizer.json").write_text(
            (p / "tokenizer.json").read_text(encoding="utf-8").replace('"<|endoftext|>"', '"</s>"'), encoding="utf-8"
        ),
        r"tokenizer\.json: not the tokenizer the shards were made with; delete",
    ),
    "lost tokenizer": (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json: damaged or missing; delete"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_on_open(copy: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(copy)
    with pytest.raises(UserError, match=message) as caught:
        open_prepared(copy)
    assert "\n" not in str(caught.value)


def test_another_format_version_says_so(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"format_version": 99}), encoding="utf-8")
    with pytest.raises(UserError, match="format version 99, this program reads 1"):
        open_prepared(copy)
