"""What `eco_train compare` and `eco_train sweep` found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from eco_llm.proof.report.document import Block, Cell, Code, Fact, Section, Table, Text, clean, text
from eco_llm.proof.report.evidence import COMPARISON, SWEEP, JsonFile, Run
from eco_llm.proof.report.measured import improvement
from eco_llm.proof.report.numbers import cell, change, show, unit_of
from eco_llm.proof.report.tables import absent, leaf, listing, scalars

_SIDES = (
    "tail_throughput_tokens_per_s",
    "tail_core_throughput_tokens_per_s",
    "tail_step_time_s",
    "tail_core_step_time_s",
    "tail_data_s",
    "tail_forward_s",
    "tail_backward_s",
    "tail_opt_step_s",
    "tail_zero_grad_s",
    "peak_memory_gib",
)
_HOW_SURE = ("paired", "gate", "interrupted", "mode", "why_separate", "pairs", "steps_per_window", "tokens_per_step")
_POINTS = (
    "name",
    "status",
    "avg_effective_tokens_per_s",
    "avg_core_tokens_per_s",
    "avg_step_time_s",
    "avg_phase_forward_s",
    "avg_phase_backward_s",
    "avg_phase_opt_step_s",
    "peak_memory_gib",
    "message",
)
_FOUND = ("largest_stable_batch", "fastest_point", "complete", "steps_per_point")
_MEASURED_ON: tuple[tuple[str | int, ...], ...] = (
    ("date",),
    ("environment", "device"),
    ("environment", "gpu", "name"),
    ("environment", "cpu", "model"),
    ("environment", "cpu", "logical_cores"),
    ("environment", "versions", "torch"),
    ("a", "commit"),
    ("b", "commit"),
    ("environment", "dirty"),
)
_LISTED = 80
_BULKY = ("samples", "environment", "losses_a", "losses_b", "settings", "resolved")  # raw material: in the file


def verdict(run: Run) -> Text | None:
    """What a paired comparison says in one sentence; None where there is none."""
    file = run[COMPARISON]
    if file.problem:
        return None
    for key in ("sentence", "verdict", "failure"):
        fact = file.at(key)
        if fact is not None and isinstance(fact.value, str):
            return text("Paired comparison: ", Cell(clean(fact.value), (fact.source,)), ".", kind="verdict")
    if (passed := file.at("gate", "passed")) is not None and passed.value is False:
        reason = file.at("gate", "reason")
        if reason is None:  # a report of an earlier version
            return text(
                "Paired comparison: no verdict, since the two sides' ",
                Cell("losses differ", (passed.source,)),
                ".",
                kind="verdict",
            )
        said = Cell(clean(reason.value), (reason.source,))
        return text("Paired comparison: no verdict on speed, since ", said, ".", kind="verdict")
    return None


def improvements(runs: Sequence[Run], trained: Sequence[Run]) -> Section:
    """Paired comparisons first, since they alone say how sure they are; then the trained runs, side by side."""
    blocks: list[Block] = []
    for run in runs:
        file = run[COMPARISON]
        if not file.problem:
            blocks += _comparison(run, file)
        elif not file.missing or len(runs) == 1:
            blocks.append(absent(file))
    if trained:
        blocks += improvement(trained)
    if len(runs) == 1 and trained:
        blocks.append(text("One run was given, so there is nothing to set it against: name an earlier run before it."))
    return Section("improvement", "Quantified improvement", blocks)


def _comparison(run: Run, file: JsonFile) -> list[Block]:
    blocks: list[Block] = []
    said = verdict(run)
    if said is not None:
        blocks.append(said)
    sides = []
    for key in _SIDES:
        a, b = file.at("a", key), file.at("b", key)
        if a is None or b is None or a.number is None or b.number is None:
            continue
        unit = unit_of(key, [a.number, b.number])
        difference = b.number - a.number
        delta = Cell(("+" if difference >= 0 else "") + show(difference, unit), (b.source, a.source))
        sides.append((Cell(key, code=True, unit=unit.name), cell(a, unit), cell(b, unit), delta, change(a, b)))
    if sides:
        note = "Medians over all windows. Whether a difference is more than noise, the interval says, not this table."
        header = ("", "A", "B", "difference", "change")
        blocks.append(Table(f"Measured comparison ({file.label})", header, tuple(sides), note))
    paths = [p for p in scalars(file.data) if not any(part in _BULKY for part in p)]
    known = [p for p in paths if p[0] in _HOW_SURE]
    measured_on: list[tuple[str | int, ...]] = [path for path in _MEASURED_ON if file.at(*path) is not None]
    if known:
        blocks.append(listing("How sure, and how it was measured", file, known + measured_on))
    if not sides and not known:  # of another version: everything it says
        note = f"The first {_LISTED} of {len(paths)} entries." if len(paths) > _LISTED else ""
        blocks.append(listing(f"Measured comparison ({file.label})", file, paths[:_LISTED], note=note))
    return blocks


def varied(run: Run) -> list[Block]:
    """What the two sides of a comparison differ in, and what a sweep went through."""
    blocks: list[Block] = []
    file = run[COMPARISON]
    changed = {} if file.problem else file.data.get("changed")
    rows: list[tuple[Cell, ...]] = [
        (_flag(name), _said(file.at("changed", name, 0)), _said(file.at("changed", name, 1)))
        for name, pair in (changed.items() if isinstance(changed, dict) else ())
        if isinstance(pair, list) and len(pair) == 2
    ]
    revisions = [None if file.problem else file.at(side, "revision") for side in "ab"]
    if any(fact is not None and fact.value is not None for fact in revisions):
        rows.append((Cell("code: revision"), *(_said(fact) for fact in revisions)))
    if rows:
        blocks.append(
            Table(f"The two sides of the comparison ({file.label})", ("", "A", "B"), tuple(rows), numeric=False)
        )
    file = run[SWEEP]
    axes = {} if file.problem else file.data.get("axes")
    values: list[tuple[Cell, ...]] = [
        (_flag(name), _said(file.at("axes", name))) for name in (axes if isinstance(axes, dict) else ())
    ]
    if values:
        blocks.append(Table(f"What the sweep varied ({file.label})", ("", "values"), tuple(values), numeric=False))
    return blocks


def _flag(name: str) -> Cell:
    return Cell("--" + clean(name).replace("_", "-"), code=True)


def _said(fact: Fact | None) -> Cell:
    if fact is None or fact.value is None:
        return Cell("–")
    if isinstance(fact.value, list):
        return Cell(clean(", ".join(map(str, fact.value))), (fact.source,))
    return Cell(clean(fact.value if isinstance(fact.value, str) else json.dumps(fact.value)), (fact.source,))


def sweep_in_short(run: Run) -> Text | None:
    """The sweep's two answers in a sentence; None where it has none."""
    parts: list[str | Cell] = []
    for key, words in (("largest_stable_batch", "largest stable batch "), ("fastest_point", "fastest ")):
        fact = run[SWEEP].at(key) if not run[SWEEP].problem else None
        if fact is not None:
            parts += ["; " if parts else "Sweep: ", words, Cell(clean(fact.value), (fact.source,))]
    return text(*parts, ".") if parts else None


def commands_of(run: Run) -> list[Block]:
    """Command lines of comparisons and sweeps."""
    blocks: list[Block] = []
    for name in (COMPARISON, SWEEP):
        fact = run[name].at("command") if not run[name].problem else None
        if fact is not None:
            blocks.append(Code(clean(fact.value, 4000), fact.source))
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
        found: list[tuple[str | int, ...]] = [(key,) for key in _FOUND if file.at(key) is not None]
        if not found:
            found.extend(path for path in scalars(file.data) if len(path) == 1)
        found += [path for path in _MEASURED_ON if path[0] == "environment" and file.at(*path) is not None]
        if found:
            blocks.append(listing(f"Sweep ({file.label})", file, found[:_LISTED]))
        for name, value in file.data.items():
            table = _rows(file, name, value)
            if table:
                blocks.append(table)
    return Section("sweep", "Sweep", blocks) if blocks else None


def _rows(file: JsonFile, name: str, value: Any) -> Table | None:
    """A list of objects as a table: one row each; our own columns, or every key with a plain value."""
    if name in _BULKY or not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    paths: dict[tuple[str | int, ...], None] = {}
    for row in value:
        paths |= dict.fromkeys(p for p in scalars(row) if len(p) <= 2 and p[0] not in _BULKY)
    keys: list[tuple[str | int, ...]] = [(key,) for key in _POINTS if (key,) in paths] or list(paths)
    if not keys:
        return None
    rows = tuple(tuple(leaf(file, (name, i, *key)) for key in keys) for i in range(len(value)))
    return Table(clean(f"Sweep: {name}"), tuple(clean("/".join(map(str, k))) for k in keys), rows)
