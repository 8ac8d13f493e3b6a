"""Corpus → prepared data set, once: later calls with the same corpus and settings open the cached one.

Three passes over the sources: a fingerprint (the cache key), a scan (sizes, split, tokenizer sample, skips), the
encoding. None holds the corpus in memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import itertools
import json
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eco_llm.config import DataConfig
from eco_llm.data.progress import NoProgress, Progress
from eco_llm.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    Manifest,
    PreparedData,
    SplitWriter,
    open_prepared,
    token_dtype,
)
from eco_llm.data.skips import Skips
from eco_llm.data.sources import check_sources, documents, fingerprint
from eco_llm.data.split import SPLITS, SplitName, SplitPlan, divide, held_out, plan_split
from eco_llm.data.tokenizer import TRAIN, Tokenizer
from eco_llm.errors import UserError
from eco_llm.files import fsync_dir, rename, replacing

# Text the tokenizer is trained on. More is slower and hardly better: on the 31 MB of the standard library (4 s on two
# cores), training on half costs 0.5% bytes per token at V=4096 and 1.1% at V=32768.
SAMPLE_BYTES = 32 << 20
_BATCH_BYTES = 2 << 20  # text encoded at one time
_STALE_SECONDS = 86_400  # a temporary folder this old was left by a killed process


def prepare(
    config: DataConfig,
    vocab_size: int,
    *,
    progress: Progress | None = None,
    repair: bool = False,
    accept: Callable[[Manifest], None] = lambda manifest: None,
) -> PreparedData:
    """The prepared data set of a corpus, made now or found in `config.data_cache`.

    Several processes may prepare the same corpus at once: each works in a folder of its own, the first to finish
    wins and the others use its result.

    Args:
        vocab_size: size of a tokenizer trained here; a `--tokenizer` file brings its own.
        progress: where to show progress; None is nowhere.
        accept: raises what is to be raised if the set does not suit the caller; a set just made is then not kept.
        repair: read and verify a cached set, and make it again if it is damaged, instead of raising.

    Raises:
        UserError: the corpus, the tokenizer or the cache cannot be used; for a damaged cache, how to repair it.
    """
    check_sources(config)
    given = None if config.tokenizer == TRAIN else Tokenizer.load(Path(config.tokenizer))
    key = cache_key(config, vocab_size, given)
    cache = Path(config.data_cache)
    target = cache / key
    if target.exists():
        try:
            data = open_prepared(target, verify=repair)
        except UserError:
            if not repair:
                raise
            _set_aside(target)
        else:
            accept(data.manifest)
            return data
    shown = progress or NoProgress()
    try:
        return _make(config, vocab_size, given, key, target, shown, accept)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"--data-cache {cache}: cannot be written: {error.strerror}") from error
        raise
    finally:
        shown.close()


def cache_key(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None) -> str:
    """Name of the prepared set, 20 hex digits: a hash of the corpus and of every setting that shapes the tokens."""
    parts = {
        "format": FORMAT_VERSION,
        "corpus": fingerprint(config),
        "text_field": config.text_field,
        "val_fraction": config.val_fraction,
        "tokenizer": tokenizer.fingerprint() if tokenizer else ["train", vocab_size, SAMPLE_BYTES],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def _make(
    config: DataConfig,
    vocab_size: int,
    given: Tokenizer | None,
    key: str,
    target: Path,
    progress: Progress,
    accept: Callable[[Manifest], None],
) -> PreparedData:
    """Scan, train the tokenizer, encode into a temporary folder, and rename it into place."""
    progress.start("reading the corpus", None)
    scan = _scan(config, progress, sample_bytes=0 if given else SAMPLE_BYTES)
    if given is None:
        progress.start(f"training a tokenizer of {vocab_size}", None)
        tokenizer = Tokenizer.train(scan.sample, vocab_size)
        scan.sample.clear()
    else:
        tokenizer = given
    new_folders = [f for f in (target.parent, *target.parent.parents) if not f.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    temporary = target.parent / f".tmp-{key}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        progress.start("encoding", scan.total_bytes)
        accept(_encode(config, tokenizer, scan, key, temporary, progress))
        if cache_key(config, vocab_size, given) != key:  # it would be found as what it is not, once files are put back
            raise _changed(config)
        fsync_dir(temporary)
        try:
            rename(temporary, target)
        except OSError:
            if not (target / MANIFEST).is_file():
                raise
            # Another process finished first, with the same content: use it.
        fsync_dir(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in new_folders:  # a refusal leaves no trace; folders in use by now stay
            with contextlib.suppress(OSError):
                folder.rmdir()
    return open_prepared(target)


def _changed(config: DataConfig) -> UserError:
    return UserError(f"--data {' '.join(config.data)}: the files changed while they were read; run it again")


def _set_aside(target: Path) -> None:
    """Take a damaged set out of the way in one step, then delete it; another process may be doing the same."""
    aside = target.with_name(f".tmp-damaged-{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        rename(target, aside)
        shutil.rmtree(aside)


def _remove_stale(cache: Path) -> None:
    """Delete temporary folders that nothing has written to for a day."""
    for folder in cache.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may be deleting it too
            newest = max((f.stat().st_mtime for f in (folder, *folder.iterdir())), default=0.0)
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- scan


@dataclass
class _Scan:
    """What the first full pass learns."""

    sizes: array[int]  # UTF-8 bytes of each document, in order
    total_bytes: int
    plan: SplitPlan
    sample: list[str]
    skips: Skips


def _scan(config: DataConfig, progress: Progress, sample_bytes: int) -> _Scan:
    skips, sample = Skips(), _Sample(sample_bytes)
    sizes = array("Q")
    held_out_bytes = 0
    for document in documents(config, skips):
        size = 0
        held = None
        for piece in document.pieces:
            if held is None:
                held = held_out(piece, config.val_fraction)
            raw = piece.encode("utf-8")
            size += len(raw)
            sample.add(piece, raw)
            progress.advance(len(raw))
        sizes.append(size)
        held_out_bytes += size if held else 0
    if not sizes:
        left_out = f" (skipped: {skips.summary()})" if skips.total else ""
        raise UserError(f"--data {' '.join(config.data)}: no text in it{left_out}")
    total = sum(sizes)
    return _Scan(sizes, total, plan_split(config.val_fraction, total, held_out_bytes), sample.texts(), skips)


class _Sample:
    """A bounded sample of pieces: those with the smallest hashes, hence the same for any order of the same pieces."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._heap: list[tuple[int, int, str, int]] = []  # (-hash, arrival, text, bytes): the largest hash on top
        self._bar: int | None = None  # hashes from here on no longer fit
        self._arrivals = itertools.count()

    def add(self, text: str, raw: bytes) -> None:
        """Offer one piece; `raw` is its UTF-8 form."""
        if not self._limit:
            return
        order = int.from_bytes(hashlib.blake2b(raw, digest_size=8, person=b"sample").digest(), "little")
        if self._bar is not None and order >= self._bar:
            return
        heapq.heappush(self._heap, (-order, next(self._arrivals), text, len(raw)))
        self._bytes += len(raw)
        while self._bytes > self._limit and len(self._heap) > 1:
            top, _, _, size = heapq.heappop(self._heap)
            self._bytes -= size
            self._bar = -top

    def texts(self) -> list[str]:
        """The sample, in the order of the corpus."""
        return [text for _, _, text, _ in sorted(self._heap, key=lambda item: item[1])]


# -------------------------------------------------------------------------------------------------- encode


class _Part(NamedTuple):
    """A piece on its way to a split; `text` None ends the split's current document."""

    split: SplitName
    text: str | None


def _encode(
    config: DataConfig, tokenizer: Tokenizer, scan: _Scan, key: str, folder: Path, progress: Progress
) -> Manifest:
    """Write tokenizer, shards and, last, the manifest; return it."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {name: SplitWriter(folder, name, dtype, tokenizer.eot_id) for name in SPLITS}
    try:
        for batch in _batches(_parts(config, scan)):
            tokens = iter(tokenizer.encode_batch([part.text for part in batch if part.text is not None]))
            for part in batch:
                if part.text is None:
                    writers[part.split].end_document()
                else:
                    size = len(part.text.encode("utf-8"))
                    writers[part.split].add(next(tokens), size)
                    progress.advance(size)
        splits = {name: writer.close() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    for name, info in splits.items():
        if info.tokens < 2:
            raise UserError(
                f"--data {' '.join(config.data)}: {scan.total_bytes} bytes of text leave nothing to put in the {name}"
                " split; give more text"
            )
    with replacing(folder / TOKENIZER) as temporary:
        tokenizer.save(temporary)
    manifest = Manifest(
        key=key,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        tokenizer_lossless=tokenizer.lossless(),
        eot_id=tokenizer.eot_id,
        sources=config.data,
        text_field=config.text_field,
        split_plan=scan.plan,
        splits=splits,
        skips=scan.skips,
    )
    manifest.save(folder / MANIFEST)
    return manifest


def _parts(config: DataConfig, scan: _Scan) -> Iterator[_Part]:
    """The corpus again, each piece with its split.

    Raises:
        UserError: it is not the corpus that was scanned.
    """
    changed = _changed(config)
    count = 0
    for document in documents(config, Skips()):
        if count == len(scan.sizes):
            raise changed
        expected, size = scan.sizes[count], 0
        used: dict[SplitName, None] = {}
        for split, text in divide(document.pieces, expected, scan.plan):
            size += len(text.encode("utf-8"))
            used[split] = None
            yield _Part(split, text)
        if size != expected:
            raise changed
        for split in used:
            yield _Part(split, None)
        count += 1
    if count != len(scan.sizes):
        raise changed


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    """Groups of about _BATCH_BYTES characters: enough to keep every encoding thread busy, small in memory."""
    batch: list[_Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text or "")
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
