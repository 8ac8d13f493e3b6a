from __future__ import annotations

import dataclasses
import json
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from eco_llm.config import DataConfig
from eco_llm.data import sources as module
from eco_llm.data.skips import Skips
from eco_llm.data.sources import check_sources, documents, fingerprint, parse_hf, sources
from eco_llm.data.tokenizer import Tokenizer
from eco_llm.errors import UserError


def config(*data: str | Path, **other: Any) -> DataConfig:
    return DataConfig(data=tuple(str(d) for d in data), **other)


def ids(cfg: DataConfig, skips: Skips | None = None) -> list[str]:
    return [d.id for d in documents(cfg, Skips() if skips is None else skips) if list(d.pieces)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("b.txt", "a/z.md", "a/b.py", "a-b.txt", "a.py", ".git/x.py", "a/__pycache__/y.py", "img.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}", encoding="utf-8")
    return root


def test_a_folder_gives_its_known_files_in_path_order_and_counts_the_rest(tree: Path) -> None:
    skips = Skips()
    found = ids(config(tree), skips)
    assert found == ["tree/a-b.txt", "tree/a.py", "tree/a/b.py", "tree/a/z.md", "tree/b.txt"]
    assert found == sorted(found)
    assert skips.counts == {"hidden folder": 2, "file of another type": 1}
    assert skips.examples["file of another type"] == ["tree/img.png"]


def test_globs_are_expanded_here_and_a_file_is_read_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(config(tree / "**" / "*.py")) == ["a.py", "a/b.py"]
    assert ids(config(tree / "a*")) == ["a-b.txt", "a.py", "a/b.py", "a/z.md"]
    assert ids(config(tree / "**")) == ["a-b.txt", "a.py", "a/b.py", "a/z.md", "b.txt"]
    assert ids(config(tree / "b.txt", tree / "*.txt", tree / "b.txt")) == ["b.txt", "a-b.txt"]
    monkeypatch.chdir(tree)
    assert ids(config("*.txt")) == ["a-b.txt", "b.txt"]
    (tree / "a[1].txt").write_text("literal", encoding="utf-8")
    assert ids(config("a[1].txt")) == ["a[1].txt"]


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs the right to make links")
def test_links_are_followed_and_loops_end(tree: Path) -> None:
    (tree / "a" / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "c").symlink_to(tree / "a", target_is_directory=True)
    assert ids(config(tree)) == ["tree/a-b.txt", "tree/a.py", "tree/a/b.py", "tree/a/z.md", "tree/b.txt"]


def test_stdlib_is_this_interpreters_and_nothing_installed() -> None:
    found = [s for s in sources(config("stdlib"), Skips()) if isinstance(s, module.SourceFile)]
    names = [s.id for s in found]
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not any("site-packages" in n or "dist-packages" in n for n in names)
    root = Path(sysconfig.get_path("stdlib"))
    assert all(s.path.suffix == ".py" and s.path.is_relative_to(root) for s in found)


def test_python_env_adds_installed_packages_and_drops_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    for name, text in {"p/a.py": "A = 1\n", "p/copy.py": "A = 1\n", "p/b.py": "B = 2\n", "p/data.txt": "no"}.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text, encoding="utf-8")
    lib = tmp_path / "lib"
    lib.mkdir()
    (lib / "os.py").write_text("B = 2\n", encoding="utf-8")
    paths = {"stdlib": lib, "purelib": packages, "platlib": packages}
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(paths[name]))
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [str(packages / ".." / "site-packages")])
    skips = Skips()
    assert ids(config("python-env"), skips) == ["stdlib/os.py", "site-packages/p/a.py"]
    assert skips.counts == {"duplicate content": 2}
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"stdlib: this Python carries no \.py sources"):
        check_sources(config("stdlib"))


def test_bad_bytes_in_the_standard_library_are_skips_not_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (tmp_path / "ok.py").write_bytes(b"x = 1\n")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    skips = Skips()
    assert ids(config("stdlib"), skips) == ["stdlib/ok.py"]
    assert skips.counts == {"bad UTF-8": 1}


MISTAKES = {
    "nowhere": r"nowhere: no such file or folder$",
    "stdlb": r"no such file or folder; perhaps you meant stdlib",
    "pic.png": r"pic\.png: unknown extension; known: \.txt \.md",
    "*.nothing": r"\*\.nothing: nothing matches with a name that ends in",
    "*.png": r"\*\.png: nothing matches with a name that ends in",
    "void": r"void: the folder holds no file that ends in",
    "zero.txt": r"zero\.txt: every file is empty",
    "other.jsonl": r"other\.jsonl: none of its first 2 records has the field 'text'; set --text-field to one of: body",
    "no.parquet": r"no\.parquet: not a parquet file",
    "bad.jsonl.gz": r"bad\.jsonl\.gz",
    "hf:": r"hf:: expected hf:NAME",
    "hf:./nothere": r"no such folder \./nothere",
}


@pytest.mark.parametrize("entry", MISTAKES)
def test_mistakes_are_found_quickly_before_the_corpus_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pic.png").write_bytes(b"x")
    (tmp_path / "void").mkdir()
    (tmp_path / "zero.txt").touch()
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n' * 2, encoding="utf-8")
    (tmp_path / "no.parquet").write_bytes(b"x" * 100)
    (tmp_path / "bad.jsonl.gz").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=MISTAKES[entry]) as caught:
        check_sources(config(entry))
    assert "\n" not in str(caught.value)


def test_settings_beside_the_corpus_are_checked_too(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a" * 100, encoding="utf-8")
    check_sources(config(text), seq_len=100)
    with pytest.raises(UserError, match=r"--seq-len 512 is longer than the data"):
        check_sources(config(text), seq_len=512)
    with pytest.raises(UserError, match=r"--data-cache .*a\.txt is a file"):
        check_sources(config(text, data_cache=str(text / "cache")))
    with pytest.raises(UserError, match=r"--tokenizer .*absent\.json: no such file"):
        check_sources(config(text, tokenizer=str(tmp_path / "absent.json")))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_checking_the_default_corpus_takes_no_time() -> None:
    started = time.perf_counter()
    check_sources(DataConfig(), seq_len=512)
    assert time.perf_counter() - started < 1


def test_the_fingerprint_follows_content_names_and_order(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(config(tree))
    os.utime(tree / "b.txt", (1, 1))
    assert fingerprint(config(tree)) == first  # content, not dates
    moved = tree.parent / "elsewhere" / "tree"
    moved.parent.mkdir()
    tree.rename(moved)
    assert fingerprint(config(moved)) == first  # nor the place
    (moved / "b.txt").write_text("text of c.txt", encoding="utf-8")  # same length
    changed = fingerprint(config(moved))
    assert changed != first
    assert fingerprint(config(moved / "b.txt", moved / "a.py")) != fingerprint(config(moved / "a.py", moved / "b.txt"))
    monkeypatch.setattr(module, "CONTENT_HASH_BYTES", 10)  # a corpus too large to hash: dates count instead
    by_date = fingerprint(config(moved))
    os.utime(moved / "b.txt", (1, 1))
    assert by_date not in (changed, fingerprint(config(moved)))


# ------------------------------------------------------------------------------------------- hf: data sets


@pytest.mark.parametrize(
    ("entry", "name", "split"),
    [
        ("hf:org/name", "org/name", None),
        ("hf:org/name:validation", "org/name", "validation"),
        ("hf:org/name:train[:10%]", "org/name", "train[:10%]"),
        ("hf:./folder", "./folder", None),
        (r"hf:C:\sets\one", r"C:\sets\one", None),
        (r"hf:C:\sets\one:test", r"C:\sets\one", "test"),
    ],
)
def test_hf_entries_are_parsed(entry: str, name: str, split: str | None) -> None:
    assert parse_hf(entry)[1:] == (name, split)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "eco-llm\[hf\]"'):
        check_sources(config("hf:org/name"))


def test_a_local_data_set_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"text": ["one", "", "three", None], "n": [1, 2, 3, 4]}
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict({"text": ["held"]})}
    )
    saved = tmp_path / "saved"
    both.save_to_disk(str(saved))
    skips = Skips()
    assert ids(config(f"hf:{saved}"), skips) == [f"hf:{saved}:1", f"hf:{saved}:3"]
    assert skips.counts == {"empty document": 1, "text field is not a string": 1}
    assert ids(config(f"hf:{saved}:test")) == [f"hf:{saved}:test:1"]
    assert fingerprint(config(f"hf:{saved}")) != fingerprint(config(f"hf:{saved}:test"))
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test"):
        ids(config(f"hf:{saved}:dev"))
    with pytest.raises(UserError, match=r"--text-field to one of: text, n"):
        ids(config(f"hf:{saved}", text_field="body"))
    # One split saved alone, and a plain folder of files as `load_dataset` takes it.
    both["test"].save_to_disk(str(tmp_path / "single"))
    assert len(ids(config(f"hf:{tmp_path / 'single'}"))) == 1
    files = tmp_path / "files"
    files.mkdir()
    (files / "train.jsonl").write_text(json.dumps({"text": "plain"}) + "\n", encoding="utf-8")
    assert ids(config(f"hf:{files}")) == [f"hf:{files}:1"]


def test_the_same_call_gives_the_same_stream(tree: Path) -> None:
    cfg = config(tree, "stdlib")
    stream = documents(cfg, Skips())
    again = documents(dataclasses.replace(cfg), Skips())
    for _ in range(50):
        a, b = next(stream), next(again)
        assert (a.id, list(a.pieces)) == (b.id, list(b.pieces))


def test_a_tokenizer_without_an_end_of_text_token_is_refused_early(tmp_path: Path) -> None:
    raw = json.loads(Tokenizer.train(["abc"], 300).to_json())
    raw["added_tokens"] = []
    del raw["model"]["vocab"]["<|endoftext|>"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match=r"--tokenizer .*no end-of-text token; it needs one of <\|endoftext\|>"):
        check_sources(config(tmp_path / "a.txt", tokenizer=str(path)))
