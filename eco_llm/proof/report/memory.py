"""The memory ledger: perf/memory.json where a run wrote one, and the peaks in the log."""

from __future__ import annotations

from collections.abc import Sequence

from eco_llm.proof.report.document import Block, Cell, Fact, Section, StackedBars, Table, text
from eco_llm.proof.report.evidence import MEMORY, JsonFile, Run
from eco_llm.proof.report.measured import missing_log
from eco_llm.proof.report.numbers import cell, show, unit_of, whole
from eco_llm.proof.report.tables import absent, listing, scalars

LEDGER = ("weights", "gradients", "optimizer", "activations", "temporary", "other", "fragmentation")
_WHOLES = ("peak", "reserved")
_LISTED = 60


def memory(runs: Sequence[Run]) -> Section:
    """Ledger as stacked bars and a table; the largest peak of each run."""
    blocks: list[Block] = []
    ledgers: list[tuple[Run, dict[str, Fact]]] = []
    for run in runs:
        file = run[MEMORY]
        if file.problem:
            blocks.append(absent(file))
        elif entries := {part: fact for part in (*LEDGER, *_WHOLES) if (fact := _entry(file, part))}:
            ledgers.append((run, entries))
        else:
            blocks.append(
                text(Cell(file.label, (file.whole(),), code=True), " has no entry of a ledger.", kind="warning")
            )
    if ledgers:
        blocks.append(_bars(ledgers, several=len(runs) > 1))
    for run in runs:
        if run[MEMORY].data:
            paths = list(scalars(run[MEMORY].data))
            note = f"The first {_LISTED} of {len(paths)} entries." if len(paths) > _LISTED else ""
            blocks.append(listing(f"All of {run[MEMORY].label}", run[MEMORY], paths[:_LISTED], note=note))
    for run in runs:
        peak = run.metrics.one("memory_peak_gib", "max")
        if peak is not None:
            shown = whole(peak, unit_of("memory_peak_gib", []))
            at = cell(run.metrics.step_of(peak), unit_of("step", []))
            blocks.append(text(f"{run.label}: peak memory ", shown, ", first seen at step ", at, "."))
        elif missing_log(run) is None:
            blocks.append(
                text(f"{run.label}: its log has no ", Cell("memory_peak_gib", code=True), ".", kind="missing")
            )
    return Section("memory", "Memory", blocks)


def _bars(ledgers: Sequence[tuple[Run, dict[str, Fact]]], *, several: bool) -> StackedBars:
    gib = unit_of("x_bytes", [])
    bars = []
    for run, entries in ledgers:
        peak = entries.get("peak")
        values = tuple(_bytes(entries[part]) if part in entries else 0.0 for part in LEDGER)
        bars.append((run.label, values, f"peak {show(_bytes(peak), gib)} GiB" if peak else ""))
    rows = []
    for part in (*LEDGER, *_WHOLES):
        facts = [entries.get(part) for _, entries in ledgers]
        if part in LEDGER or any(facts):
            rows.append(
                (Cell(part), *(Cell("–") if f is None else Cell(show(_bytes(f), gib), (f.source,)) for f in facts))
            )
    header = ("", *(f"{run.label}, GiB" if several else "GiB" for run, _ in ledgers))
    table = Table(
        "Memory ledger (perf/memory.json)",
        header,
        tuple(rows),
        "Each part has its own worst moment (gradients come as activations go), so their sum may exceed the peak.",
    )
    words = "; ".join(f"{label}: {total or 'peak not in the file'}" for label, _, total in bars)
    return StackedBars("Memory by use", f"Stacked bars of memory. {words}.", LEDGER, tuple(bars), table)


def _entry(file: JsonFile, part: str) -> Fact | None:
    """The number for one use of memory, however deep: `weights`, `weights_bytes` or `weights_gib`."""
    for path in scalars(file.data):
        name = path[-1]
        if name in (part, f"{part}_bytes", f"{part}_gib"):
            fact = file.at(*path)
            if fact is not None and fact.number is not None:
                return fact
    return None


def _bytes(fact: Fact) -> float:
    assert fact.number is not None
    return fact.number * (2.0**30 if fact.source.what.endswith("_gib") else 1.0)
