from __future__ import annotations

import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eco_llm.data import formats
from eco_llm.data.formats import SourceFile, read_documents
from eco_llm.data.skips import MAX_EXAMPLES, Skips
from eco_llm.errors import UserError

TEXTS = ["première\n", "second\r\nline", "trois 🙂"]


def read(path: Path, field: str = "text", strict: bool = True) -> tuple[dict[str, str], Skips]:
    skips = Skips()
    found = {d.id: "".join(d.pieces) for d in read_documents(SourceFile(path, path.name, strict), field, skips)}
    return found, skips


def jsonl(records: list[Any]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


@pytest.mark.parametrize("suffix", formats.TEXT)
def test_a_text_file_is_one_document_kept_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes("".join(TEXTS).encode())
    assert read(path) == ({f"a{suffix}": "".join(TEXTS)}, Skips())


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(tmp_path / "a.txt")[0] == {"a.txt": "abc"}


@pytest.mark.parametrize("suffix", [*formats.JSONL, ".parquet"])
def test_each_record_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    raw = jsonl([{"n": i, "body": t} for i, t in enumerate(TEXTS)])
    if suffix == ".parquet":
        pq.write_table(pa.table({"n": [0, 1, 2], "body": TEXTS}), path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(raw))
    elif suffix == ".jsonl.zst":
        frame = pa.Codec("zstd").compress(raw[:20], asbytes=True)  # frames may follow one another
        path.write_bytes(frame + pa.Codec("zstd").compress(raw[20:], asbytes=True))
    else:
        path.write_bytes(raw)
    found, skips = read(path, "body")
    assert found == {f"a{suffix}:{i}": t for i, t in enumerate(TEXTS, start=1)}
    assert skips.total == 0


def test_what_cannot_be_used_is_counted_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "good"}\r',
        b'{"text": "bad \xff"}',
        b"{not json}",
        b"[1, 2]",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "  \\n"}',
        b'{"text": "\\ud800"}',
        b"",
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    found, skips = read(path)
    assert found == {"a.jsonl:1": "good", "a.jsonl:12": "last"}
    assert skips.counts == {
        "bad UTF-8": 2,
        "bad JSON record": 3,
        "record without the text field": 1,
        "text field is not a string": 2,
        "empty document": 2,
    }
    assert skips.examples["bad UTF-8"][0] == "a.jsonl:2: byte 0xff at offset 14"
    assert "2 bad UTF-8 (a.jsonl:2, a.jsonl:9)" in skips.summary().replace("a.jsonl:2: byte", "a.jsonl:2")
    assert Skips.from_dict(json.loads(json.dumps(skips.to_dict()))) == skips


def test_only_the_first_examples_are_kept() -> None:
    skips = Skips()
    for i in range(100):
        skips.add("r", f"f{i}")
    assert skips.counts == {"r": 100}
    assert skips.examples == {"r": [f"f{i}" for i in range(MAX_EXAMPLES)]}


@pytest.mark.parametrize("content", [b"", b" \n\t", b"abc\xff\xfe"])
@pytest.mark.parametrize("threshold", [4 << 20, 1])  # read whole, streamed
def test_empty_and_bad_text_files_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, threshold: int
) -> None:
    monkeypatch.setattr(formats, "_WHOLE_FILE_BYTES", threshold)
    (tmp_path / "a.txt").write_bytes(content)
    found, skips = read(tmp_path / "a.txt")
    assert found == {}
    assert skips.counts == ({"bad UTF-8": 1} if b"\xff" in content else {"empty document": 1})


def test_a_streamed_file_equals_one_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\ufeff" + "élan 🙂\n\n  indented\n" * 50, encoding="utf-8", newline="\n")
    whole = read(tmp_path / "a.txt")
    monkeypatch.setattr(formats, "_WHOLE_FILE_BYTES", 1)
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 7)  # cuts characters in the middle
    assert read(tmp_path / "a.txt") == whole
    assert whole[1].total == 0


def test_no_record_with_the_field_names_the_flag_and_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"body": "x", "id": 1}, {"body": "y"}]))
    with pytest.raises(UserError, match=r"a\.jsonl.*'text'.*--text-field to one of: body, id"):
        read(tmp_path / "a.jsonl")
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet.*--text-field to one of: body, id"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int64, not text"):
        read(tmp_path / "a.parquet", "id")


def test_parquet_values_that_are_no_text_are_counted(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff", None, b""], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    found, skips = read(tmp_path / "a.parquet")
    assert found == {"a.parquet:1": "ok"}
    assert skips.counts == {"bad UTF-8": 1, "text field is not a string": 1, "empty document": 1}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_container_is_a_clear_error(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    raw = jsonl([{"text": os.urandom(300).hex()} for _ in range(50)])
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [os.urandom(300).hex() for _ in range(50)]}), path)
    else:
        path.write_bytes(gzip.compress(raw) if suffix == ".jsonl.gz" else pa.Codec("zstd").compress(raw, asbytes=True))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"garbage" * 20)
    with pytest.raises(UserError, match=rf"a{suffix}"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "pyarrow" else real(n, *a))
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(UserError, match=r'pip install "eco-llm\[parquet\]"'):
        read(path)


def test_an_unreadable_file_is_an_error_if_named_and_a_skip_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.py"
    path.write_text("x = 1", encoding="utf-8")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"a\.py: cannot be read: Permission denied"):
        read(path)
    found, skips = read(path, strict=False)
    assert found == {}
    assert skips.to_dict() == {"unreadable file": {"count": 1, "examples": ["a.py: Permission denied"]}}


def test_the_data_modules_do_not_import_torch() -> None:
    import subprocess

    names = ["sources", "prepare", "inspect", "order", "progress"]
    code = ";".join(f"import eco_llm.data.{n}" for n in names) + ";import sys;sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
