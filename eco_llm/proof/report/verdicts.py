"""What `eco_train compare` and `eco_train sweep` found: their files, shown as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eco_llm.proof.report.document import Block, Cell, Section, Table, as_number, clean, text
from eco_llm.proof.report.evidence import COMPARISON, SWEEP, JsonFile, Run
from eco_llm.proof.report.measured import improvement
from eco_llm.proof.report.tables import absent, leaf, listing, scalars

_LISTED = 80
_BULKY = ("samples", "environment", "windows", "pairs", "config")  # raw material: linked, not printed


def improvements(runs: Sequence[Run]) -> Section:
    """Paired comparisons first, since they alone say how sure they are; then the runs given, side by side."""
    blocks: list[Block] = []
    for run in runs:
        file = run[COMPARISON]
        if not file.problem:
            blocks += _comparison(file)
        elif not file.missing or len(runs) == 1:
            blocks.append(absent(file))
    blocks += improvement(runs)
    if len(runs) == 1:
        blocks.append(text("One run was given, so there is nothing to set it against: name an earlier run before it."))
    return Section("improvement", "Quantified improvement", blocks)


def _comparison(file: JsonFile) -> list[Block]:
    blocks: list[Block] = []
    verdict = file.at("verdict")
    if verdict is not None and isinstance(verdict.value, str):
        blocks.append(
            text(
                "Verdict of the paired comparison: ", Cell(clean(verdict.value), (verdict.source,)), ".", kind="verdict"
            )
        )
    paths = [path for path in scalars(file.data) if not any(part in _BULKY for part in path) and path != ("verdict",)]
    note = "Raw samples and the environment are in the file."
    if len(paths) > _LISTED:
        note = f"The first {_LISTED} of {len(paths)} entries. {note}"
    blocks.append(listing(f"Measured comparison ({file.label})", file, paths[:_LISTED], note=note))
    return blocks


def sweeps(runs: Sequence[Run]) -> Section | None:
    """Tables of sweep.json; None where no run has one."""
    blocks: list[Block] = []
    for run in runs:
        file = run[SWEEP]
        if file.missing:
            continue
        if file.problem:
            blocks.append(absent(file))
            continue
        scalar = [path for path in scalars(file.data) if len(path) == 1]
        if scalar:
            blocks.append(listing(f"Sweep ({file.label})", file, scalar))
        for name, value in file.data.items():
            table = _rows(file, name, value)
            if table:
                blocks.append(table)
    return Section("sweep", "Sweep", blocks) if blocks else None


def _rows(file: JsonFile, name: str, value: Any) -> Table | None:
    """A list of objects as a table: one row each, the keys with plain values as columns."""
    if name in _BULKY or not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    keys: dict[tuple[str | int, ...], None] = {}
    for row in value:
        keys |= dict.fromkeys(p for p in scalars(row) if len(p) <= 2 and p[0] not in _BULKY)
    rows = tuple(tuple(leaf(file, (name, i, *key)) for key in keys) for i in range(len(value)))
    numeric = any(as_number(row.get(k[0])) is not None for row in value for k in keys)
    return Table(clean(name), tuple(clean("/".join(map(str, k))) for k in keys), rows, numeric=numeric)
