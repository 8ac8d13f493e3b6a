"""Durable writes: a file or folder is either whole under its final name, or not there."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PAUSES_S = (0.01, 0.03, 0.1, 0.3, 0.6)


def fsync_file(path: Path) -> None:
    """Force a written file to the disk."""
    with path.open("rb+") as f:  # Windows refuses to flush a read-only handle
        os.fsync(f.fileno())


def fsync_dir(path: Path) -> None:
    """Force a folder's entries (new names, renames) to the disk; Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, fsync it and rename it to `path`.

    The temporary name keeps every suffix of `path` (writers that choose a format by suffix still do), and is
    removed when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        fsync_file(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder the name `target`, in place of a file that has it.

    On Windows wait up to a second for whoever reads either just now (`eco_train watch`, a scanner).
    """
    for pause in _PAUSES_S if sys.platform == "win32" else ():
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(pause)
    source.replace(target)


def write_json(path: Path, payload: Any) -> None:
    """Write strict, indented JSON (UTF-8) to `path`, atomically.

    Raises:
        ValueError: a float is NaN or infinite, which JSON cannot hold; see `strict`.
    """
    text = json.dumps(payload, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        # An argument or file name that was no UTF-8 holds lone surrogates; backslashreplace writes the JSON escape.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def strict(value: Any, *, fallback: Callable[[Any], str] | None = None) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities, at any depth, become "nan", "inf" and "-inf".

    Args:
        fallback: makes a string of what is no plain data (and of its dictionary keys); without it such values are
            left for the JSON writer to refuse.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {k if fallback is None else str(k): strict(v, fallback=fallback) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v, fallback=fallback) for v in value]
    if fallback is None or value is None or isinstance(value, (bool, int, float, str)):
        return value
    return fallback(value)
