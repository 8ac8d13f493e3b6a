from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eco_llm.config import DataConfig
from eco_llm.data import prepare as module
from eco_llm.data import split
from eco_llm.data.prepare import prepare
from eco_llm.data.shards import Manifest, PreparedData, open_prepared
from eco_llm.data.split import held_out
from eco_llm.data.tokenizer import Tokenizer
from eco_llm.errors import UserError

VOCAB = 300


def texts(data: PreparedData, name: str) -> list[str]:
    """Documents of a split, decoded, without their end-of-text token."""
    array = data.tokens(name)
    starts = [*data.document_starts(name), len(array)]
    found = []
    for start, end in pairwise(starts):
        ids = np.empty(end - start, dtype=np.int64)
        array.read(start, ids)
        assert ids[-1] == data.tokenizer.eot_id
        assert data.tokenizer.eot_id not in ids[:-1]
        found.append(data.tokenizer.decode(ids[:-1].tolist()))
    return found


def test_every_document_is_in_exactly_one_split_unchanged(config: DataConfig, corpus: Path) -> None:
    data = prepare(config, VOCAB)
    train, val = texts(data, "train"), texts(data, "val")
    originals = [p.read_text(encoding="utf-8") for p in sorted(corpus.iterdir())]
    assert sorted(train + val) == sorted(originals)
    assert val == [t for t in originals if held_out(t, config.val_fraction)]
    assert train == [t for t in originals if not held_out(t, config.val_fraction)]
    assert len(val) >= 2  # the fixture would otherwise prove nothing
    for name, documents in (("train", train), ("val", val)):
        info = data.manifest.splits[name]
        assert info.documents == len(documents)
        assert info.text_bytes == sum(len(t.encode()) for t in documents)
        assert info.tokens == len(data.tokens(name))
    assert data.manifest.vocab_size == data.tokenizer.vocab_size == VOCAB


def test_the_result_is_cached_by_content(config: DataConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config, VOCAB)

    def no_work(*_: object) -> PreparedData:
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", no_work)
        assert prepare(config, VOCAB).manifest == first.manifest
        for other in (
            lambda: prepare(config, VOCAB + 1),
            lambda: prepare(dataclasses.replace(config, val_fraction=0.2), VOCAB),
            lambda: prepare(dataclasses.replace(config, text_field="body"), VOCAB),
        ):
            with pytest.raises(AssertionError, match="prepared again"):
                other()
    (corpus / "doc000.py").write_text("x = 1\n", encoding="utf-8")
    assert prepare(config, VOCAB).path != first.path


def test_preparing_twice_gives_the_same_bytes(config: DataConfig, tmp_path: Path) -> None:
    a = prepare(config, VOCAB)
    b = prepare(dataclasses.replace(config, data_cache=str(tmp_path / "other")), VOCAB)
    files = sorted(p.name for p in a.path.iterdir())
    assert files == [
        "manifest.json",
        "tokenizer.json",
        *(f"{s}-00000.{e}" for s in ("train", "val") for e in ("bin", "idx")),
    ]
    assert all((a.path / f).read_bytes() == (b.path / f).read_bytes() for f in files)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", p.name) for p in (a.path, *a.path.iterdir()))  # also on Windows


def test_small_batches_and_pieces_give_the_same_documents(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepare(config, VOCAB)
    monkeypatch.setattr(module, "_BATCH_BYTES", 100)
    again = prepare(dataclasses.replace(config, data_cache=config.data_cache + "2"), VOCAB)
    assert again.manifest == expected.manifest


def test_a_given_tokenizer_is_used_with_its_own_size(config: DataConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" * 50], 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    data = prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json")), 32_768)
    assert data.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert data.manifest.vocab_size == tokenizer.vocab_size < 300


def test_skips_are_in_the_manifest_once_though_the_corpus_is_read_twice(config: DataConfig, corpus: Path) -> None:
    (corpus / "bad.py").write_bytes(b"\xff")
    (corpus / "empty.py").touch()
    skips = prepare(config, VOCAB).manifest.skips
    assert skips.counts == {"bad UTF-8": 1, "empty document": 1}
    assert skips.examples["empty document"] == ["corpus/empty.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are no UTF-8")
def test_a_file_name_that_is_no_utf8_is_kept_in_the_manifest(config: DataConfig, corpus: Path) -> None:
    (corpus / os.fsdecode(b"caf\xe9.bin")).touch()
    manifest = prepare(config, VOCAB).manifest  # written and read back
    assert manifest.skips.examples["file of another type"] == ["corpus/caf\udce9.bin"]
    assert (prepare(config, VOCAB).path / "manifest.json").read_bytes().count(b"caf\\udce9.bin") == 1


def test_one_document_holds_out_its_tail(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the only document\n" for i in range(2000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="\n")
    data = prepare(DataConfig(data=(str(tmp_path / "a.txt"),), data_cache=str(tmp_path / "cache")), VOCAB)
    (train,), (val,) = texts(data, "train"), texts(data, "val")
    assert train + val == text
    assert val.startswith("line ")
    assert data.manifest.split_plan.mode == "tail"
    assert 0.05 < len(val) / len(text) < 0.08  # 4096 bytes of 58 kB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", r"no text in it \(skipped: 1 bad UTF-8 \(a\.txt\)\)"),
        (b"  \n", r"no text in it \(skipped: 1 empty document"),
        (b"x", r"1 bytes of text leave nothing to put in the \w+ split; give more text"),
    ],
)
def test_a_corpus_without_enough_text_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    config = DataConfig(data=(str(tmp_path / "a.txt"),), data_cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        prepare(config, VOCAB)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_between_the_passes_is_noticed(
    config: DataConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Tokenizer.train

    def meddle(sample: list[str], size: int) -> Tokenizer:
        (corpus / "doc030.py").write_text("changed = True\n", encoding="utf-8")
        return train(sample, size)

    monkeypatch.setattr(module.Tokenizer, "train", meddle)
    with pytest.raises(UserError, match="the files changed while they were read; run it again"):
        prepare(config, VOCAB)
    assert not Path(config.data_cache).exists()


KILLED = """
import os, sys
from eco_llm.config import DataConfig
from eco_llm.data.prepare import prepare
from eco_llm.data.progress import NoProgress
class Killer(NoProgress):
    encoding = False
    def start(self, label, total): self.encoding = label == "encoding"
    def advance(self, amount):
        if self.encoding: os._exit(7)
prepare(DataConfig(data=(sys.argv[1],), data_cache=sys.argv[2], val_fraction=0.1), 300, progress=Killer())
"""


def test_a_killed_writer_leaves_nothing_that_is_trusted(config: DataConfig, corpus: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(corpus), config.data_cache], check=False)
    assert killed.returncode == 7
    cache = Path(config.data_cache)
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".tmp-")
    data = prepare(config, VOCAB)
    assert open_prepared(data.path, verify=True).manifest.splits["train"].documents > 40
    assert leftover.exists()  # young: it might belong to a living process
    old = time.time() - 2 * 86_400
    for path in (leftover, *leftover.iterdir()):
        os.utime(path, (old, old))
    prepare(dataclasses.replace(config, val_fraction=0.2), VOCAB)
    assert not leftover.exists()


def test_two_at_once_both_get_a_whole_set(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    both_encoded = threading.Barrier(2)
    encode = module._encode

    def meet(*args: Any) -> Manifest:
        manifest = encode(*args)
        both_encoded.wait(30)
        return manifest

    monkeypatch.setattr(module, "_encode", meet)
    results: list[PreparedData] = []
    threads = [threading.Thread(target=lambda: results.append(prepare(config, VOCAB))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert results[0].manifest == results[1].manifest
    assert [p.name for p in Path(config.data_cache).iterdir()] == [results[0].path.name]
    open_prepared(results[0].path, verify=True)


def test_repair_makes_a_damaged_set_again(config: DataConfig) -> None:
    data = prepare(config, VOCAB)
    shard = data.path / "train-00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(UserError, match="eco_train data prepare"):
        prepare(config, VOCAB)
    assert prepare(config, VOCAB, repair=True).manifest == data.manifest
    shard.write_bytes(good[:-2] + b"\xff\xff")  # the right size, the wrong content
    assert prepare(config, VOCAB, repair=True).manifest == data.manifest
    assert shard.read_bytes() == good


def test_files_that_change_before_they_are_read_are_not_stored_as_what_they_were(
    config: DataConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set's name is a hash of what was there at first; put back, that text would find another's tokens."""
    changed = next(p for p in sorted(corpus.rglob("*.py")) if p.stat().st_size > 100)
    plain = module._make

    def change_first(*args: Any) -> PreparedData:
        before = changed.read_bytes()
        changed.write_bytes(before + b"# another text\n")
        try:
            return plain(*args)
        finally:
            changed.write_bytes(before)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", change_first)
        with pytest.raises(UserError, match="the files changed while they were read; run it again"):
            prepare(config, VOCAB)
    assert not any(Path(config.data_cache).glob("*"))
    assert "another text" not in "".join(texts(prepare(config, VOCAB), "train"))


def test_a_full_disk_is_the_users_to_fix(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_encode", full)
    with pytest.raises(UserError, match=r"--data-cache .*: cannot be written: No space left"):
        prepare(config, VOCAB)
    assert not Path(config.data_cache).exists()


def test_the_sample_is_bounded_and_does_not_depend_on_arrival() -> None:
    pieces = [f"piece {i} " * 5 for i in range(500)]
    taken = []
    for order in (pieces, pieces[::-1]):
        sample = module._Sample(4000)
        for piece in order:
            sample.add(piece, piece.encode())
        taken.append(set(sample.texts()))
        assert 3800 < sum(len(t) for t in sample.texts()) <= 4000
    assert len(taken[0] & taken[1]) >= len(taken[0]) - 2  # only the last to fit may differ, sizes being unequal


def test_splits_are_fixed_for_ever() -> None:
    """The rule is part of the format: a change of it would move documents between splits."""
    assert [i for i in range(60) if split.held_out(f"document {i}", 0.1)] == [17, 18, 20, 24, 40, 44, 54]


@pytest.mark.slow
def test_the_standard_library(tmp_path: Path) -> None:
    data = prepare(DataConfig(data_cache=str(tmp_path)), 4096)
    train, val = data.manifest.splits["train"], data.manifest.splits["val"]
    assert 20e6 < train.text_bytes + val.text_bytes < 60e6
    assert train.documents + val.documents > 1000
    assert 0.0025 < val.text_bytes / train.text_bytes < 0.04
    assert train.bytes_per_token > 3.3
    assert data.manifest.tokenizer_lossless
