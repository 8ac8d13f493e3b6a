"""One file → its documents, for every known extension. Nothing holds more than one record or one chunk."""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from eco_llm.data import skips as reason
from eco_llm.data.documents import Document, cut
from eco_llm.data.skips import Skips
from eco_llm.errors import UserError
from eco_llm.frozen import installing

TEXT = (".txt", ".md", ".py")
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
EXTENSIONS = TEXT + JSONL + PARQUET

_WHOLE_FILE_BYTES = 4 << 20  # larger text files are validated first, then streamed
_CHUNK_BYTES = 1 << 20
_ROWS = 256  # parquet rows decoded at one time


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus.

    `strict`: the user named it or its folder, so failing to read it is an error; otherwise it is a counted skip.
    `dedupe`: leave it out when a file of the same content was read before.
    """

    path: Path
    id: str
    strict: bool = True
    dedupe: bool = False


def extension(path: Path) -> str | None:
    """The known extension that `path` ends with (`.jsonl.gz` is one), or None."""
    name = path.name.lower()
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(e)), None)


def require_reader(path: Path) -> None:
    """Raise UserError when the package that reads `path` is not installed."""
    if extension(path) in (".parquet", ".jsonl.zst") and importlib.util.find_spec("pyarrow") is None:
        how = installing('pip install "eco-llm[parquet]"')
        raise UserError(f"--data {path} needs pyarrow: {how}")


def read_documents(file: SourceFile, text_field: str, skips: Skips) -> Iterator[Document]:
    """Documents of one file, in order; what cannot be used is counted in `skips`.

    Raises:
        UserError: the file cannot be read, its compression or container is damaged, or none of its records has
            `text_field`.
    """
    require_reader(file.path)
    kind = extension(file.path)
    try:
        if kind in TEXT:
            yield from _read_text(file, skips)
        elif kind in JSONL:
            yield from _read_jsonl(file, text_field, skips)
        elif kind in PARQUET:
            yield from _read_parquet(file, text_field, skips)
        else:
            raise UserError(f"--data {file.path}: not one of {' '.join(EXTENSIONS)}")
    except OSError as error:
        if file.strict:
            raise UserError(f"--data {file.path}: cannot be read: {error.strerror or error}") from error
        skips.add(reason.UNREADABLE, file.id, error.strerror or str(error))


def _read_text(file: SourceFile, skips: Skips) -> Iterator[Document]:
    """The whole file is one document. A byte order mark is dropped; line ends stay as they are."""
    small = file.path.stat().st_size <= _WHOLE_FILE_BYTES
    try:
        if small:
            text = file.path.read_bytes().decode("utf-8-sig")
            blank = not text.strip()
            chunks: Iterator[str] = iter((text,))
        else:
            # A bad byte at the end must leave the whole document out, so look before the first piece leaves.
            blank = True
            for chunk in _decoded_chunks(file.path):
                blank = blank and not chunk.strip()
            chunks = _decoded_chunks(file.path)
    except UnicodeDecodeError as error:
        skips.add(reason.BAD_UTF8, file.id, _byte(error) if small else "")
        return
    if blank:
        skips.add(reason.EMPTY, file.id)
        return
    yield Document(file.id, cut(chunks))


def _decoded_chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)


def _byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start}"


@contextmanager
def _open_lines(path: Path) -> Iterator[IO[bytes]]:
    """Decompressed bytes of a .jsonl[.gz|.zst] file; a damaged stream is a UserError."""
    kind = extension(path)
    try:
        if kind == ".jsonl.gz":
            with io.BufferedReader(gzip.GzipFile(path, "rb"), _CHUNK_BYTES) as unzipped:
                yield unzipped
        elif kind == ".jsonl.zst":
            import pyarrow as pa

            with pa.input_stream(str(path), compression="zstd") as raw, io.BufferedReader(raw, _CHUNK_BYTES) as lines:
                yield lines
        else:
            with path.open("rb") as stream:
                yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"--data {path}: damaged gzip stream: {error}") from error
    except OSError as error:
        if kind == ".jsonl.zst" and error.errno is None:  # how pyarrow reports a bad frame
            raise UserError(f"--data {path}: damaged zstd stream: {error}") from error
        raise


def _read_jsonl(file: SourceFile, field: str, skips: Skips) -> Iterator[Document]:
    records, fields = 0, dict[str, None]()
    found = False
    with _open_lines(file.path) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file.id}:{number}"
            record = _parse(line, where, skips)
            if record is None:
                continue
            records += 1
            if field not in record:
                skips.add(reason.NO_FIELD, where)
                if len(fields) < 20:
                    fields.update(dict.fromkeys(record))
                continue
            found = True
            yield from document_from_value(record[field], where, skips)
    if records and not found:
        raise no_field(file.path, field, list(fields), f"none of its {records} records")


def no_field(path: object, field: str, fields: list[str], subject: str) -> UserError:
    """The error for a file or data set whose records hold no `field`."""
    return UserError(
        f"--data {path}: {subject} has the field {field!r}; set --text-field to one of: {', '.join(fields) or 'none'}"
    )


def _parse(line: bytes, where: str, skips: Skips) -> dict[str, object] | None:
    """One line as a record; None, and counted, when it is none."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skips.add(reason.BAD_UTF8, where, _byte(error))
        return None
    if not text.strip():
        skips.add(reason.EMPTY, where, "blank line")
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        skips.add(reason.BAD_JSON, where, str(error))
        return None
    if not isinstance(record, dict):
        skips.add(reason.BAD_JSON, where, f"a {type(record).__name__}, not an object")
        return None
    return record


def document_from_value(value: object, where: str, skips: Skips) -> Iterator[Document]:
    """A record's text as a document, or a counted skip."""
    if not isinstance(value, str):
        skips.add(reason.NOT_TEXT, where, "null" if value is None else type(value).__name__)
    elif not value.strip():
        skips.add(reason.EMPTY, where)
    elif not _is_unicode(value):
        skips.add(reason.BAD_UTF8, where, "lone surrogate")
    else:
        yield Document(where, cut((value,)))


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell (`"\\ud800"`) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: SourceFile, field: str, skips: Skips) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_parquet(file.path, field)
    try:
        with pq.ParquetFile(str(file.path)) as table:
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for scalar in batch.column(0):
                    row += 1
                    where = f"{file.id}:{row}"
                    try:
                        value = scalar.as_py()
                    except UnicodeDecodeError as error:
                        skips.add(reason.BAD_UTF8, where, _byte(error))
                        continue
                    yield from document_from_value(value, where, skips)
    except pa.ArrowException as error:
        raise UserError(f"--data {file.path}: damaged parquet file: {_first_line(error)}") from error


def check_parquet(path: Path, field: str) -> None:
    """Raise UserError unless `path` is a parquet file whose column `field` holds text; reads only its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(str(path))
    except pa.ArrowException as error:
        raise UserError(f"--data {path}: not a parquet file: {_first_line(error)}") from error
    if field not in schema.names:
        raise no_field(path, field, schema.names, "no column")
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"--data {path}: column {field!r} holds {kind}, not text; set --text-field to another column")


def check_jsonl_head(path: Path, field: str, max_records: int = 1000, max_bytes: int = 1 << 20) -> None:
    """Raise UserError when the first records of a .jsonl file are read and none has `field`.

    A file that starts with a thousand records without the field is refused here, before a long scan, even
    though a later record might have it.
    """
    fields: dict[str, None] = {}
    records = read = 0
    with _open_lines(path) as lines:
        while records < max_records and read < max_bytes and (line := lines.readline(max_bytes)):
            read += len(line)
            record = _parse(line, "", Skips())
            if record is None:
                continue
            if field in record:
                return
            records += 1
            fields.update(dict.fromkeys(list(record)[:20]))
    if records:
        raise no_field(path, field, list(fields)[:20], f"none of its first {records} records")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
