"""What a report says, before it is Markdown or HTML: sections of blocks whose numbers carry their sources.

Both renderers read the same document, so the two files cannot say different things.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Source:
    """Where a number was read.

    Attributes:
        path: the evidence file.
        label: its name for people, with the run's where there are several.
        where: `L12` or `L3-L90` in a file of lines, a JSON Pointer (RFC 6901) such as `/stages/0/percent` in JSON,
            empty for the whole file.
        what: the key, or how several rows became one number ("median of loss, 80 rows").
        value: what stands there, unrounded; None for text.
    """

    path: Path
    label: str
    where: str = ""
    what: str = ""
    value: float | None = None

    def __str__(self) -> str:
        where = f" {self.where.replace('-', '–')}" if self.where.startswith("L") else ""
        value = "" if self.value is None else f" = {self.value!r}"
        return f"{self.label}{where} → {clean(self.what)}{value}" if self.what else f"{self.label}{where}"


@dataclass(frozen=True)
class Fact:
    """A value and where it was read."""

    value: Any
    source: Source

    @property
    def number(self) -> float | None:
        """The value, where it is a number (the words "nan" and "inf", which stand for numbers in our JSON, too)."""
        return as_number(self.value)


def as_number(value: Any) -> float | None:
    """`value` as a float; None where it is none (true and false are none)."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
        try:
            return float(value)
        except OverflowError:  # JSON may hold an integer of 400 digits
            return None
    return None


@dataclass(frozen=True)
class Cell:
    """Text of a table or a sentence; `sources` has more than one entry where it was computed from several.

    `unit` is shown small behind the name of a row, and is that of the row's numbers.
    """

    text: str
    sources: tuple[Source, ...] = ()
    code: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph. `kind` is `plain`, `missing` (evidence that is not there), `warning` or `verdict`."""

    parts: tuple[str | Cell, ...]
    kind: str = "plain"


@dataclass(frozen=True)
class Code:
    """Preformatted text; folded behind `summary` where that is given."""

    text: str
    source: Source | None = None
    summary: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    numeric: bool = True
    """Columns after the first are aligned right."""


@dataclass(frozen=True)
class Series:
    """One line, or the dots, of a chart; `hue` chooses its colour (a run keeps its own over all charts)."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    hue: int
    dots: bool = False


@dataclass(frozen=True)
class LineChart:
    """Curves over steps or tokens, with the same numbers, aggregated, in `table`."""

    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    table: Table
    from_zero: bool = False


@dataclass(frozen=True)
class StackedBars:
    """One horizontal bar a row, all to one scale; `table` holds the same numbers."""

    title: str
    description: str
    parts: tuple[str, ...]
    bars: tuple[tuple[str, tuple[float, ...], str], ...]
    """(label, one value a part, the total in words)"""
    table: Table


@dataclass(frozen=True)
class Card:
    """One headline number: what, the first run's and the last run's (if it is another) values, the change."""

    label: str
    value: Cell
    before: Cell | None = None
    change: Cell | None = None
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """The headline numbers."""

    cards: tuple[Card, ...]


Block = Text | Code | Table | LineChart | StackedBars | Cards


@dataclass
class Section:
    """A heading and what stands under it; `slug` is its anchor."""

    slug: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """A whole report. `date` comes from the evidence, never from the clock of whoever renders it."""

    title: str
    runs: tuple[Cell, ...]
    date: Cell
    sections: tuple[Section, ...]


def text(*parts: str | Cell, kind: str = "plain") -> Text:
    """A paragraph of words and cells."""
    return Text(parts, kind)


def clean(value: object, limit: int = 400, *, lines: bool = False) -> str:
    """Text from a file, safe to show: control characters spelt out, cut at `limit`, one line unless `lines`.

    Escaping for HTML or Markdown is the renderers' work.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    shown = str(value) if lines else " ".join(str(value).split())
    allowed = "\n\t" if lines else ""
    shown = "".join(c if c in allowed or c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
