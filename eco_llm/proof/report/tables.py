"""Tables that several sections share: one row a quantity, one column a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eco_llm.proof.report.document import Cell, Fact, Table, Text, as_number, clean, text
from eco_llm.proof.report.evidence import WRITTEN_BY, JsonFile, Run
from eco_llm.proof.report.numbers import cell, change, unit_of, whole


def across(
    caption: str, runs: Sequence[Run], keys: Sequence[str], find: Callable[[Run, str], Fact | None], *, note: str = ""
) -> Table | None:
    """One row a key, one column a run, and the last run's change against the first where there are several.

    Keys that no run has are left out; None where no key is left.
    """
    several = len(runs) > 1
    header = ["", *(run.label if several else "value" for run in runs), *(["change"] if several else [])]
    rows = []
    for key in keys:
        facts = [find(run, key) for run in runs]
        if all(fact is None for fact in facts):
            continue
        unit = unit_of(key, [fact.number for fact in facts if fact is not None])
        changes = [change(facts[0], facts[-1])] if several else []
        rows.append((Cell(clean(key), code=True, unit=unit.name), *(cell(fact, unit) for fact in facts), *changes))
    return Table(caption, tuple(header), tuple(rows), note) if rows else None


def absent(file: JsonFile) -> Text:
    """The sentence for evidence that is not there, or is damaged."""
    name = file.label.rpartition(": ")[2]
    if file.missing:
        return text(Cell(file.label, code=True), f" is missing; it is written by {WRITTEN_BY[name]}.", kind="missing")
    return text(Cell(file.label, (file.whole(),), code=True), f" could not be read: {file.problem}.", kind="warning")


def scalars(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all numbers, texts and truth values in a JSON value, in the file's order."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from scalars(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from scalars(inner, (*path, i))
    elif value is not None:
        yield path


def leaf(file: JsonFile, path: tuple[str | int, ...]) -> Cell:
    """A number in its unit, or a text, with its source."""
    fact = file.at(*path)
    if fact is None:
        return Cell("–")
    if as_number(fact.value) is None:
        return Cell(clean(fact.value), (fact.source,))
    named = next((str(p) for p in reversed(path) if isinstance(p, str)), "")
    unit = unit_of(named, [fact.number])
    return whole(fact, unit)


def listing(caption: str, file: JsonFile, paths: Sequence[tuple[str | int, ...]], *, note: str = "") -> Table:
    """Key and value, one row a path: for content whose layout is not ours to know."""
    rows = tuple((Cell(clean("/".join(map(str, p))), code=True), leaf(file, p)) for p in paths)
    return Table(caption, ("key", "value"), rows, note)
