"""A document: one text with a name, read in bounded pieces so that a 10 GB file is still one document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Large enough that a cut is rare, small enough that a batch of pieces keeps every encoding thread busy.
PIECE_CHARS = 1 << 17


class Document(NamedTuple):
    """One document of a corpus.

    `id` is a portable name (`corpus/part.jsonl:17`), never an absolute path. `pieces` joins to the text, holds
    no empty string, and may be a one-shot iterator: read it before asking for the next document.
    """

    id: str
    pieces: Iterable[str]


def cut(chunks: Iterable[str], limit: int = PIECE_CHARS) -> Iterator[str]:
    """Regroup a text, given in chunks of any size, into pieces of at most `limit` characters.

    The pieces depend only on the text, not on how it was chunked. A piece ends at a newline that is followed by
    a character other than white space (the tokenizer trained here always starts a new word there, so cutting
    changes no token); failing that, at any newline; failing that, at `limit`.
    """
    buffer, start = "", 0
    for chunk in chunks:
        buffer, start = buffer[start:] + chunk, 0
        while len(buffer) - start > limit:
            end = _cut_point(buffer, start, limit)
            yield buffer[start:end]
            start = end
    if start < len(buffer):
        yield buffer[start:]


def _cut_point(text: str, start: int, limit: int) -> int:
    """End of the piece that begins at `start`; `text` reaches beyond start + limit."""
    stop = start + limit
    newline = last = text.rfind("\n", start, stop)
    while newline >= 0 and text[newline + 1].isspace():
        newline = text.rfind("\n", start, newline)
    if newline >= 0:
        return newline + 1
    return last + 1 if last >= 0 else stop
