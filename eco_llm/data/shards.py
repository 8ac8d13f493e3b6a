"""Tokens on disk: memory-mapped shards, their checksums, and a manifest that is the last word on both.

    <folder>/manifest.json       what is here; carries its own hash
             tokenizer.json
             train-00000.bin     tokens, little-endian uint16 or uint32, documents one after another
             train-00000.idx     little-endian uint64: where in this .bin each document that starts here starts
             val-00000.bin, …

A document may run on into the next shard. Each ends with one end-of-text token.

A set is written under a temporary name beside its place, synced, then renamed: a folder under its final name is whole.
Opening checks the manifest's hash and every file's size; `verify=True` reads every byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from eco_llm.data.skips import Skips
from eco_llm.data.split import SPLITS, SplitPlan
from eco_llm.data.tokenizer import Tokenizer
from eco_llm.errors import UserError
from eco_llm.files import fsync_file, replacing

FORMAT_VERSION = 1
SHARD_TOKENS = 64 << 20
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_INDEX = np.dtype("<u8")
_REPAIR = "delete that folder, or run `eco_train data prepare` with the same --data to make it again"


def token_dtype(vocab_size: int) -> str:
    """Narrowest stored type for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: `name`.bin and `name`.idx, their lengths and BLAKE2b-256 checksums."""

    name: str
    tokens: int
    documents: int
    bin_blake2b: str
    idx_blake2b: str


@dataclass(frozen=True)
class SplitInfo:
    """One split: what it holds. `text_bytes` is UTF-8 text, without end-of-text tokens."""

    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token, end-of-text tokens included: bits per byte = nats per token / ln 2 / this."""
        return self.text_bytes / self.tokens


@dataclass(frozen=True)
class Manifest:
    """Everything about a prepared data set but the tokens. The same corpus and settings give the same manifest."""

    key: str
    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    tokenizer_lossless: bool
    eot_id: int
    sources: tuple[str, ...]
    text_field: str
    split_plan: SplitPlan
    splits: dict[str, SplitInfo]
    skips: Skips

    def fingerprint(self) -> str:
        """Hash of the tokens themselves, 32 hex digits: equal exactly when training would read the same stream."""
        parts = [self.dtype, self.tokenizer_fingerprint]
        for name in SPLITS:
            parts += [name, *(shard.bin_blake2b for shard in self.splits[name].shards)]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The manifest file, its own hash included."""
        body = dataclasses.asdict(self) | {"skips": self.skips.to_dict(), "format_version": FORMAT_VERSION}
        return json.dumps(body | {"manifest_blake2b": _hash_of(body)}, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the manifest file, whole or not at all."""
        with replacing(path) as temporary:
            # A file name that was no UTF-8 holds lone surrogates; backslashreplace writes the JSON escape.
            temporary.write_text(self.to_json(), encoding="utf-8", errors="backslashreplace", newline="\n")

    @classmethod
    def from_json(cls, raw: str) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            ValueError: not such a file, changed after it was written, or of another format version.
        """
        body = json.loads(raw)
        if not isinstance(body, dict):
            raise ValueError("not a manifest")
        if body.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {body.get('format_version')}, this program reads {FORMAT_VERSION}")
        if body.pop("manifest_blake2b", None) != _hash_of(body):
            raise ValueError("its hash does not match its content")
        del body["format_version"]
        splits = {
            name: SplitInfo(**info | {"shards": tuple(ShardInfo(**s) for s in info["shards"])})
            for name, info in body.pop("splits").items()
        }
        return cls(
            sources=tuple(body.pop("sources")),
            split_plan=SplitPlan(**body.pop("split_plan")),
            skips=Skips.from_dict(body.pop("skips")),
            splits=splits,
            **body,
        )


def _hash_of(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


# --------------------------------------------------------------------------------------------------- write


class SplitWriter:
    """Writes one split's shards into a folder, one document after another.

    Call `add` with a document's tokens, in as many parts as you like, then `end_document`; `close` once, at the end.
    """

    def __init__(self, folder: Path, split: str, dtype: str, eot_id: int, *, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._dtype = folder, split, _DTYPES[dtype]
        self._eot = np.array([eot_id])
        self._limit = shard_tokens
        self._shards: list[ShardInfo] = []
        self._inside = False  # between the first `add` of a document and its end
        self._text_bytes = 0
        self._file: BinaryIO | None = None
        self._tokens = 0  # in the open shard

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append the next tokens of the current document (int [n]); `text_bytes` is the UTF-8 length they encode."""
        if not self._inside:
            self._inside = True
            self._open_shard_if_needed()
            self._starts.append(self._tokens)
        self._text_bytes += text_bytes
        self._write(tokens)

    def end_document(self) -> None:
        """Close the current document with an end-of-text token; nothing happens if it has no tokens."""
        if self._inside:
            self._write(self._eot)
            self._inside = False

    def close(self) -> SplitInfo:
        """Finish the last shard and describe the split."""
        self._finish_shard()
        return SplitInfo(
            tokens=sum(s.tokens for s in self._shards),
            documents=sum(s.documents for s in self._shards),
            text_bytes=self._text_bytes,
            shards=tuple(self._shards),
        )

    def abort(self) -> None:
        """Let go of the open file, after an error."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, tokens: np.ndarray) -> None:
        done = 0
        while done < len(tokens):
            self._open_shard_if_needed()
            part = tokens[done : done + self._limit - self._tokens].astype(self._dtype)
            assert self._file is not None
            self._file.write(part.data)
            self._hash.update(part.data)
            self._tokens += len(part)
            done += len(part)

    def _open_shard_if_needed(self) -> None:
        if self._file is not None and self._tokens == self._limit:
            self._finish_shard()
        if self._file is None:
            self._name = f"{self._split}-{len(self._shards):05d}"
            self._file = (self._folder / f"{self._name}.bin").open("wb")
            self._hash = hashlib.blake2b(digest_size=32)
            self._tokens = 0
            self._starts: list[int] = []

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        index = np.array(self._starts, dtype=_INDEX).tobytes()
        (self._folder / f"{self._name}.idx").write_bytes(index)
        for suffix in ("bin", "idx"):
            fsync_file(self._folder / f"{self._name}.{suffix}")
        self._shards.append(
            ShardInfo(
                name=self._name,
                tokens=self._tokens,
                documents=len(self._starts),
                bin_blake2b=self._hash.hexdigest(),
                idx_blake2b=hashlib.blake2b(index, digest_size=32).hexdigest(),
            )
        )


# ---------------------------------------------------------------------------------------------------- read


class TokenArray:
    """One split's tokens as one array over memory-mapped shards."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(p) for p in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens start … start + len(out) - 1 into `out` (int64 [n], contiguous).

        Raises:
            IndexError: the range leaves the array.
        """
        if start < 0 or start + len(out) > len(self):
            raise IndexError(f"tokens {start}…{start + len(out)} of {len(self)}")
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(out):
            part = self._parts[shard]
            at = start + done - (int(self._ends[shard]) - len(part))
            n = min(len(out) - done, len(part) - at)
            out[done : done + n] = part[at : at + n]
            done += n
            shard += 1


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set: its folder, its tokenizer, its manifest."""

    path: Path
    tokenizer: Tokenizer
    manifest: Manifest

    def tokens(self, split: str) -> TokenArray:
        """Memory-mapped tokens of `train` or `val`."""
        dtype = _DTYPES[self.manifest.dtype]
        shards = self.manifest.splits[split].shards
        return TokenArray([np.memmap(self.path / f"{s.name}.bin", dtype=dtype, mode="r") for s in shards])

    def document_starts(self, split: str) -> Iterator[int]:
        """Position in `tokens(split)` of each document's first token, in order."""
        base = 0
        for shard in self.manifest.splits[split].shards:
            index = np.fromfile(self.path / f"{shard.name}.idx", dtype=_INDEX)
            yield from (base + int(start) for start in index)
            base += shard.tokens


def open_prepared(path: Path, *, verify: bool = False) -> PreparedData:
    """Open a prepared data set; with `verify` compare every checksum (reads everything, about 1 GB/s).

    Raises:
        UserError: it is not one, or a file of it is missing, truncated or changed; says which and how to repair.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no {MANIFEST} there, so it is not a prepared data set") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest_path}: not usable ({error}); {_REPAIR}") from error
    except OSError as error:
        raise UserError(f"{manifest_path}: cannot be read: {error.strerror}") from error
    item = _DTYPES[manifest.dtype].itemsize
    for name in SPLITS:
        for shard in manifest.splits[name].shards:
            _check(path / f"{shard.name}.bin", shard.tokens * item, shard.bin_blake2b, verify)
            _check(path / f"{shard.name}.idx", shard.documents * _INDEX.itemsize, shard.idx_blake2b, verify)
    tokenizer_path = path / TOKENIZER
    try:
        tokenizer = Tokenizer.load(tokenizer_path)
    except UserError as error:
        raise UserError(f"{tokenizer_path}: damaged or missing; {_REPAIR}") from error
    if tokenizer.fingerprint() != manifest.tokenizer_fingerprint:
        raise UserError(f"{tokenizer_path}: not the tokenizer the shards were made with; {_REPAIR}")
    return PreparedData(path, tokenizer, manifest)


def _check(path: Path, size: int, digest: str, verify: bool) -> None:
    try:
        actual = path.stat().st_size
        if actual != size:
            raise UserError(f"{path}: {actual} bytes where the manifest says {size} (truncated?); {_REPAIR}")
        if verify:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
            if found != digest:
                raise UserError(f"{path}: its checksum does not match the manifest; {_REPAIR}")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {_REPAIR}") from None
