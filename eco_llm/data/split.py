"""Which part of a corpus is held out for validation.

By document: a document belongs to validation when the hash of its first piece falls under `val_fraction`. That
depends on nothing else, so a document stays in its split when the corpus grows, and copies of it never sit on both
sides.

A corpus of few documents, or of one huge one, has no fair split by document. Then the last part of every document is
held out instead, cut at a line where possible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

SPLITS = ("train", "val")
SplitName = Literal["train", "val"]

_MIN_VAL_BYTES = 4096  # a tiny corpus holds out this much, but never more than a tenth of itself
_MAX_TINY_FRACTION = 0.1


def held_out(first_piece: str, fraction: float) -> bool:
    """Whether the document that starts with this piece belongs to validation."""
    digest = hashlib.blake2b(first_piece.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


@dataclass(frozen=True)
class SplitPlan:
    """How documents are divided; `fraction` is the share of bytes that `tail` holds out of each document."""

    mode: Literal["document", "tail"]
    fraction: float


def plan_split(val_fraction: float, total_bytes: int, held_out_bytes: int) -> SplitPlan:
    """Choose the split from what splitting by document would hold out (`held_out_bytes` of `total_bytes`).

    By document unless that misses the asked share by more than a factor of four, or leaves training less than half of
    its own share.
    """
    tiny = min(_MAX_TINY_FRACTION, _MIN_VAL_BYTES / total_bytes)
    share = max(val_fraction, tiny)
    actual = held_out_bytes / total_bytes
    if share / 4 <= actual <= min(4 * share, (1 + share) / 2):
        return SplitPlan("document", val_fraction)
    return SplitPlan("tail", share)


def divide(pieces: Iterable[str], document_bytes: int, plan: SplitPlan) -> Iterator[tuple[SplitName, str]]:
    """The pieces of one document, each with its split; in `tail` mode a piece may be cut in two.

    `document_bytes` is the whole document's length in UTF-8 (used by `tail`).
    """
    if plan.mode == "document":
        split: SplitName | None = None
        for piece in pieces:
            if split is None:
                split = "val" if held_out(piece, plan.fraction) else "train"
            yield split, piece
        return
    kept = document_bytes - round(document_bytes * plan.fraction)
    seen = 0
    for piece in pieces:
        raw = piece.encode("utf-8")
        if seen + len(raw) <= kept:
            yield "train", piece
        elif seen >= kept:
            yield "val", piece
        else:
            at = _line_cut(raw, kept - seen)
            if at:
                yield "train", raw[:at].decode("utf-8")
            yield "val", raw[at:].decode("utf-8")
        seen += len(raw)


def _line_cut(raw: bytes, at: int) -> int:
    """The first line start at or after byte `at` that leaves something behind it, else the character at `at`."""
    line = raw.find(b"\n", max(at - 1, 0)) + 1
    if 0 < line < len(raw):
        return line
    while at > 0 and raw[at] & 0xC0 == 0x80:  # a continuation byte belongs to the character before it
        at -= 1
    return at
