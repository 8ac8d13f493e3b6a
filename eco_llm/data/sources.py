"""`--data` entries → an ordered, deterministic stream of documents; and every mistake in them that shows early.

An entry is the keyword `stdlib` or `python-env`, `hf:NAME[:SPLIT]`, a file, a folder or a glob. Entries keep the
user's order; inside an entry files are sorted by their relative path. A file reached twice is read once.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import site
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eco_llm.config import DataConfig
from eco_llm.data import skips as reason
from eco_llm.data.documents import Document
from eco_llm.data.formats import (
    EXTENSIONS,
    JSONL,
    PARQUET,
    TEXT,
    SourceFile,
    check_jsonl_head,
    check_parquet,
    document_from_value,
    extension,
    no_field,
    read_documents,
    require_reader,
)
from eco_llm.data.skips import Skips
from eco_llm.data.tokenizer import TRAIN, Tokenizer
from eco_llm.errors import UserError
from eco_llm.frozen import installing, is_frozen

KEYWORDS = ("stdlib", "python-env")
_CACHES = frozenset({"__pycache__"})
_NOT_STDLIB = _CACHES | {"site-packages", "dist-packages"}

# Up to this much, the cache key hashes every byte (about 1 GB/s); beyond it, path, size and mtime stand in.
CONTENT_HASH_BYTES = 1 << 30
_FILES_CHECKED = 256  # files per entry that `check_sources` looks at,
_HEADS_CHECKED = 16  # and record files among them whose first records it reads


class HfSource(NamedTuple):
    """A parsed `hf:NAME[:SPLIT]`; `name` is a hub name or a local path."""

    entry: str
    name: str
    split: str | None


def documents(config: DataConfig, skips: Skips) -> Iterator[Document]:
    """Every document of the corpus, in order; the same order on every call while the sources are unchanged.

    Raises:
        UserError: an entry names nothing that can be read, or a record file lacks `text_field` throughout.
    """
    contents: set[bytes] = set()
    for source in sources(config, skips):
        if isinstance(source, HfSource):
            yield from _hf_documents(source, config.text_field, skips)
            continue
        if source.dedupe and (digest := _digest(source.path)) is not None:
            if digest in contents:
                skips.add(reason.DUPLICATE, source.id)
                continue
            contents.add(digest)
        yield from read_documents(source, config.text_field, skips)


def sources(config: DataConfig, skips: Skips) -> Iterator[SourceFile | HfSource]:
    """Files and data sets that the entries stand for, each once, in reading order.

    Raises:
        UserError: a missing path, an unknown extension, or an entry without a single known file.
    """
    seen: set[str] = set()
    for entry in config.data:
        if entry.startswith("hf:"):
            yield parse_hf(entry)
            continue
        for file in _expand(entry, skips):
            real = os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                yield file


def fingerprint(config: DataConfig) -> str:
    """Hash (64 hex digits) that changes when the corpus does: names, order and content of its sources.

    Content is hashed byte for byte while the files total at most CONTENT_HASH_BYTES. For a larger corpus, size
    and modification time stand in for content: quick, and wrong only if a file is rewritten with both unchanged.
    A data set of `datasets` brings its own fingerprint.
    """
    found = list(sources(config, Skips()))
    stats = {f: f.path.stat() for f in found if isinstance(f, SourceFile)}
    by_content = sum(s.st_size for s in stats.values()) <= CONTENT_HASH_BYTES
    key = hashlib.blake2b(digest_size=32)
    for source in found:
        if isinstance(source, HfSource):
            data = load_hf(source)
            item = ["hf", source.split, len(data), data._fingerprint]
        elif by_content:
            digest = _digest(source.path)
            item = ["file", source.id, digest.hex() if digest else None]
        else:
            item = ["stat", source.id, stats[source].st_size, stats[source].st_mtime_ns]
        key.update(json.dumps(item).encode())
    return key.hexdigest()


def check_sources(config: DataConfig, seq_len: int | None = None) -> None:
    """Find, in well under a second and without reading the corpus, what is wrong with the data settings.

    Covers paths, extensions, globs, missing packages, the text field of the first records of record files,
    `--tokenizer`, `--data-cache`, and (with `seq_len`) plain files too small for one window. What only a full read
    can show is raised by `prepare`.

    Raises:
        UserError: the first mistake found.
    """
    most_tokens: int | None = 0  # upper bound, known only while every entry is a few plain files
    for entry in config.data:
        if entry.startswith("hf:"):
            _check_hf(parse_hf(entry))
            most_tokens = None
            continue
        first = list(itertools.islice(_expand(entry, Skips()), 1 if entry in KEYWORDS else _FILES_CHECKED + 1))
        heads = 0
        for file in first[:_FILES_CHECKED]:
            is_records = extension(file.path) not in TEXT
            heads += is_records
            if not is_records or heads <= _HEADS_CHECKED:
                _check_file(file, config.text_field)
            if is_records or entry in KEYWORDS:
                most_tokens = None
            elif most_tokens is not None and (size := file.path.stat().st_size):
                most_tokens += size + 2  # a token stands for a byte at least; a prefix and an end-of-text token
        if len(first) > _FILES_CHECKED:
            most_tokens = None
    if most_tokens == 0:
        raise UserError(f"--data {' '.join(config.data)}: every file is empty")
    if seq_len is not None and most_tokens is not None and most_tokens <= seq_len:
        raise UserError(
            f"--seq-len {seq_len} is longer than the data: --data {' '.join(config.data)} has at most"
            f" {most_tokens} tokens"
        )
    if config.tokenizer != TRAIN:
        Tokenizer.load(Path(config.tokenizer))
    _check_cache_folder(Path(config.data_cache))


def _check_file(file: SourceFile, field: str) -> None:
    require_reader(file.path)
    try:
        if extension(file.path) in PARQUET:
            check_parquet(file.path, field)
        elif extension(file.path) in JSONL:
            check_jsonl_head(file.path, field)
        else:
            with file.path.open("rb"):
                pass
    except OSError as error:
        raise UserError(f"--data {file.path}: cannot be read: {error.strerror or error}") from error


def _check_cache_folder(folder: Path) -> None:
    """Refuse a --data-cache that cannot be created or written, without creating it."""
    for ancestor in (folder, *folder.absolute().parents):
        if ancestor.exists():
            if not ancestor.is_dir():
                raise UserError(f"--data-cache {folder}: {ancestor} is a file, not a folder")
            if not os.access(ancestor, os.W_OK | os.X_OK):
                raise UserError(f"--data-cache {folder}: no permission to write in {ancestor}")
            return


# ------------------------------------------------------------------------------------------------ files


def _expand(entry: str, skips: Skips) -> Iterator[SourceFile]:
    """Files of one entry, sorted; raises when there is none."""
    if entry in KEYWORDS:
        yield from _python_files(entry, skips)
        return
    path = Path(entry).expanduser()
    if path.is_file():
        if extension(path) is None:
            raise UserError(f"--data {entry}: unknown extension; known: {' '.join(EXTENSIONS)}")
        yield SourceFile(path, path.name)
    elif path.is_dir():
        yield from _some(_folder_files(path, path.absolute().name, skips), entry, "the folder holds no file")
    elif glob.has_magic(entry):
        yield from _some(_glob_files(path, skips), entry, "nothing matches with a name")
    else:
        near = difflib.get_close_matches(entry, KEYWORDS, n=1)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        raise UserError(f"--data {entry}: no such file or folder{hint}")


def _some(files: Iterator[SourceFile], entry: str, complaint: str) -> Iterator[SourceFile]:
    """The same files; UserError when there is none."""
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise UserError(f"--data {entry}: {complaint} that ends in {' '.join(EXTENSIONS)}")


def _folder_files(root: Path, name: str, skips: Skips) -> Iterator[SourceFile]:
    """Known files below `root`; links are followed, hidden folders and other types counted as skips."""

    def keep(folder: str) -> bool:
        if folder.startswith(".") or folder == "__pycache__":
            skips.add(reason.HIDDEN, f"{name}: {folder}")
            return False
        return True

    for path in _walk(root, keep, strict=True):
        relative = f"{name}/{path.relative_to(root).as_posix()}"
        if extension(path) is None:
            skips.add(reason.OTHER_TYPE, relative)
        else:
            yield SourceFile(path, relative)


def _glob_files(pattern: Path, skips: Skips) -> Iterator[SourceFile]:
    """Known files that match; a folder that matches stands for all files in it, as a shell's would."""
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    recursive = "**" in pattern.parts  # then the files below a matching folder match by themselves
    # Path.glob takes no absolute pattern and does not pass hidden files over.
    matches = glob.glob(str(pattern), recursive=True)  # noqa: PTH207
    for path in sorted(map(Path, matches), key=lambda p: p.as_posix() + "/" * p.is_dir()):
        name = path.relative_to(fixed).as_posix() if fixed.parts else path.as_posix()
        if path.is_dir():
            if not recursive:
                yield from _folder_files(path, name, skips)
        elif "__pycache__" in path.parts:
            skips.add(reason.HIDDEN, name)
        elif extension(path) is None:
            skips.add(reason.OTHER_TYPE, name)
        else:
            yield SourceFile(path, name)


def _walk(root: Path, keep: Callable[[str], bool], *, strict: bool) -> Iterator[Path]:
    """Files below `root` in the order of their relative paths; no folder is entered twice, whatever the links."""
    visited: set[str] = set()

    def visit(folder: Path) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in visited:
            return
        visited.add(real)
        try:
            with os.scandir(folder) as scan:
                found = list(scan)
        except OSError as error:
            if strict:
                raise UserError(f"--data {folder}: cannot be read: {error.strerror}") from error
            return
        # A folder sorts as `name/`, which makes this depth-first order the order of the whole relative paths.
        for item in sorted(found, key=lambda e: e.name + "/" * e.is_dir()):
            if item.is_dir():
                if keep(item.name):
                    yield from visit(folder / item.name)
            elif item.is_file():
                yield folder / item.name

    return visit(root)


def _python_files(keyword: str, skips: Skips) -> Iterator[SourceFile]:
    """.py files of this interpreter. One that cannot be read is skipped: nobody named it."""
    everything = keyword == "python-env"
    if everything and is_frozen():
        raise UserError(
            "--data python-env: the executable carries no installed packages' sources; use stdlib, or a folder"
        )
    roots = [("stdlib", Path(sysconfig.get_path("stdlib")))]
    if everything:
        roots += [("site-packages", root) for root in _site_packages()]
    found = False
    for name, root in roots:
        left_out = _NOT_STDLIB if name == "stdlib" else _CACHES
        for path in _walk(root, _all_but(left_out), strict=False):
            if path.name.endswith(".py"):
                found = True
                portable = f"{name}/{path.relative_to(root).as_posix()}"
                yield SourceFile(path, portable, strict=False, dedupe=everything)
    if not found:
        raise UserError(f"--data {keyword}: this Python carries no .py sources ({roots[0][1]}); give files or a folder")


def _all_but(left_out: frozenset[str]) -> Callable[[str], bool]:
    return lambda folder: folder not in left_out


def _site_packages() -> list[Path]:
    """Package folders of this interpreter, each once, in the interpreter's order."""
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    named += getattr(site, "getsitepackages", list)()  # virtualenv's old site.py has none
    return [Path(p) for p in dict.fromkeys(os.path.realpath(n) for n in named) if Path(p).is_dir()]


def _digest(path: Path) -> bytes | None:
    """Content hash of a file, or None when it cannot be read (reading it reports why)."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None


# ------------------------------------------------------------------------------------------- hf: data sets


def parse_hf(entry: str) -> HfSource:
    """Parse `hf:NAME[:SPLIT]`; the colon of a Windows drive belongs to the name."""
    match = re.fullmatch(r"hf:((?:[A-Za-z]:[\\/])?[^:]+)(?::(.+))?", entry)
    if match is None:
        raise UserError(f"--data {entry}: expected hf:NAME or hf:NAME:SPLIT")
    return HfSource(entry, match[1], match[2])


def _check_hf(source: HfSource) -> None:
    if importlib.util.find_spec("datasets") is None:
        how = installing('pip install "eco-llm[hf]"')
        raise UserError(f"--data {source.entry} needs the datasets package: {how}")
    looks_local = source.name.startswith((".", "/", "~", "\\")) or Path(source.name).is_absolute()
    if looks_local and not Path(source.name).expanduser().exists():
        raise UserError(f"--data {source.entry}: no such folder {source.name}")


def load_hf(source: HfSource) -> Any:
    """The `datasets.Dataset` an entry names: a folder that `save_to_disk` wrote, or whatever `load_dataset` takes.

    Raises:
        UserError: the package is missing, or the data set or split is not found.
    """
    _check_hf(source)
    import datasets

    path = Path(source.name).expanduser()
    saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            name = str(path) if path.exists() else source.name
            return datasets.load_dataset(name, split=source.split or "train")
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the package and its hub client raise many kinds; all mean "not this data set"
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"--data {source.entry}: {first}") from error
    if isinstance(data, datasets.DatasetDict):
        split = source.split or "train"
        if split not in data:
            raise UserError(f"--data {source.entry}: no split {split!r}; it has {', '.join(data)}")
        return data[split]
    if source.split not in (None, str(data.split)):
        raise UserError(f"--data {source.entry}: the saved data set is one split, {data.split or 'unnamed'}")
    return data


def _hf_documents(source: HfSource, field: str, skips: Skips) -> Iterator[Document]:
    data = load_hf(source)
    if field not in data.column_names:
        raise no_field(source.entry, field, data.column_names, "no column")
    row = 0
    for batch in data.select_columns([field]).iter(batch_size=256):
        for value in batch[field]:
            row += 1
            yield from document_from_value(value, f"{source.entry}:{row}", skips)
