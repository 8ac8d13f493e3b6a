"""Numbers as people read them: units, digits, changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from eco_llm.proof.report.document import Cell, Fact

NONE = "–"


class Unit(NamedTuple):
    """How to show one kind of quantity: displayed = value × scale."""

    name: str
    scale: float = 1.0
    digits: int = 4
    """Significant digits, or decimals where `fixed`."""
    fixed: bool = False


def unit_of(key: str, values: Sequence[float | None]) -> Unit:
    """The unit for a key of ours; seconds are shown in s, ms or µs by the largest of `values`, one for a whole row."""
    if key.endswith("tokens_per_s"):
        return Unit("tokens/s", digits=5)
    if key.endswith("_s"):
        largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=1.0)
        if largest >= 1.0:
            return Unit("s", digits=4)
        return Unit("ms", 1e3) if largest >= 1e-3 else Unit("µs", 1e6)
    if key.endswith("percent"):
        return Unit("%", digits=2, fixed=True)
    if key.endswith("_bytes"):
        return Unit("GiB", 2.0**-30, digits=3, fixed=True)
    if key.endswith("_gib"):
        return Unit("GiB", digits=3, fixed=True)
    if key.endswith("_watts"):
        return Unit("W", digits=1, fixed=True)
    if key.endswith("_ms"):
        return Unit("ms")
    if key in ("loss", "val_loss"):
        return Unit("nats/token", digits=4, fixed=True)
    if key == "val_bits_per_byte":
        return Unit("bits/byte", digits=4, fixed=True)
    if key == "lr":
        return Unit("", digits=3)
    return Unit("", digits=5)


def show(value: float | None, unit: Unit) -> str:
    """`value` in `unit`, without the unit's name."""
    if value is None:
        return NONE
    scaled = value * unit.scale
    if not math.isfinite(scaled):
        return str(scaled)
    if unit.fixed:
        return f"{scaled:,.{unit.digits}f}"
    return significant(scaled, unit.digits)


def significant(value: float, digits: int) -> str:
    """`value` to so many significant digits, whole numbers in full, with thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent >= 15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def cell(fact: Fact | None, unit: Unit) -> Cell:
    """A table's number with its source; a dash where there is none."""
    if fact is None or fact.number is None:
        return Cell(NONE, () if fact is None else (fact.source,))
    return Cell(show(fact.number, unit), (fact.source,))


def whole(fact: Fact | None, unit: Unit) -> Cell:
    """As `cell`, with the unit behind the number: for sentences and headlines."""
    shown = cell(fact, unit)
    if shown.text == NONE or not unit.name:
        return shown
    return Cell(shown.text + ("%" if unit.name == "%" else f" {unit.name}"), shown.sources)


def change(before: Fact | None, after: Fact | None, digits: int = 3) -> Cell:
    """`after` against `before`, in percent; a dash where either is missing or the change has no meaning."""
    a, b = (None if f is None else f.number for f in (before, after))
    if (
        before is None
        or after is None
        or a is None
        or b is None
        or a == 0
        or not math.isfinite(a)
        or not math.isfinite(b)
    ):
        return Cell(NONE)
    percent = 100.0 * (b - a) / abs(a)
    shown = f"{percent:+,.{digits}f}%"
    if not any(c in "123456789" for c in shown):
        shown = "0%" if a == b else "≈ 0%"
    return Cell(shown, (after.source, before.source))
