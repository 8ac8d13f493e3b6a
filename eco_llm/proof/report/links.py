"""From a source to an address that works where the report lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from eco_llm.proof.report.document import Source

Link = Callable[[Source], str]


def relative_to(folder: Path) -> Link:
    """Addresses relative to the report's folder: they still work when report and runs are moved or sent together."""
    here = folder.resolve()

    def link(source: Source) -> str:
        try:
            path = Path(os.path.relpath(source.path, here)).as_posix()
        except ValueError:  # Windows: on another drive
            return source.path.as_uri() + fragment(source)
        return quote(os.fsencode(path)) + fragment(source)  # bytes: a name need not be UTF-8

    return link


def fragment(source: Source) -> str:
    """`#L12-L40` for lines, `#/key/0` (a JSON Pointer) for JSON, nothing for a whole file."""
    return f"#{quote(source.where, safe='/')}" if source.where else ""
