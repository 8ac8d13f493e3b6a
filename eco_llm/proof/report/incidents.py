"""What went wrong: crash reports, steps that were skipped, losses that were no numbers, damaged files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eco_llm.proof.report.document import Block, Cell, Code, Section, Source, Table, clean, text
from eco_llm.proof.report.evidence import CONFIG, SWEEP, WRITTEN_BY, JsonFile, Run
from eco_llm.proof.report.numbers import unit_of, whole

_TRACEBACK = 6000


def incidents(runs: Sequence[Run]) -> Section:
    """One table of crashes with their tracebacks folded, and a sentence for everything else."""
    blocks: list[Block] = []
    rows: list[tuple[Cell, ...]] = []
    traces: list[Block] = []
    for run in runs:
        for file in run.crashes:
            if file.problem:
                blocks.append(
                    text(
                        Cell(file.label, (file.whole(),), code=True),
                        f" could not be read: {file.problem}.",
                        kind="warning",
                    )
                )
                continue
            rows.append(_crash(run, file))
            trace = file.at("traceback")
            if trace is not None:
                lines = trace.value if isinstance(trace.value, list) else [trace.value]
                shown = "".join(map(str, lines))
                shown = shown if len(shown) <= _TRACEBACK else "…" + shown[-_TRACEBACK:]
                name = f"Traceback, {file.label}"
                traces.append(Code(clean(shown, 4 * _TRACEBACK, lines=True).rstrip(), trace.source, name))
        if run.crash_count > len(run.crashes):
            blocks.append(
                text(f"{run.label}: {run.crash_count:,} crash reports; the newest {len(run.crashes)} are shown.")
            )
    if rows:
        blocks.insert(0, Table("Crash reports", ("run", "time", "step", "kind", "what"), tuple(rows), numeric=False))
    blocks += traces
    for run in runs:
        blocks += _in_the_log(run) + _in_the_sweep(run)
    if not blocks:
        blocks.append(text("None: no crash report, no skipped step, no damaged file."))
    return Section("incidents", "Incidents", blocks)


def _crash(run: Run, file: JsonFile) -> tuple[Cell, ...]:
    def shown(key: str) -> Cell:
        fact = file.at(key)
        return Cell("–") if fact is None else Cell(clean(fact.value, 80).replace("_", " "), (fact.source,))

    exception, message = file.at("exception"), file.at("message")
    what = ": ".join(clean(f.value, 300) for f in (exception, message) if f is not None)
    source = next((f.source for f in (message, exception) if f is not None), file.whole())
    return Cell(run.label), shown("time"), shown("step"), shown("kind"), Cell(what or "–", (source,))


def _in_the_sweep(run: Run) -> list[Block]:
    """Points that ended badly and left no crash report: killed, refused, interrupted."""
    file, found = run[SWEEP], list[Block]()
    points = None if file.problem else file.data.get("points")
    for i, point in enumerate(points if isinstance(points, list) else []):
        if not isinstance(point, dict) or point.get("status") in ("done", None) or point.get("crash_reports"):
            continue
        name, status, message = (file.at("points", i, key) for key in ("name", "status", "message"))
        parts: list[str | Cell] = [f"{run.label}: the sweep's point ", Cell(clean(name.value if name else i))]
        if status is not None:
            parts += [" ended as ", Cell(clean(status.value).replace("_", " "), (status.source,))]
        if message is not None:
            parts += [": ", Cell(clean(message.value, 300), (message.source,))]
        found.append(text(*parts, "."))
    return found


def _in_the_log(run: Run) -> list[Block]:
    """Sentences on a run's log and settings; none where all is well."""
    log = run.metrics
    found: list[Block] = []
    skipped = log.one("skipped_steps", "last")
    if skipped is not None and skipped.value > 0:
        found.append(
            text(
                f"{run.label}: ",
                whole(skipped, unit_of("steps", [])),
                " steps were skipped for a loss or gradient that was not finite.",
            )
        )
    loss = log.column("loss")
    bad = np.flatnonzero(~np.isfinite(loss.values))
    if bad.size:
        first = log.at(loss, int(bad[0]), "loss")
        found.append(
            text(
                f"{run.label}: {bad.size:,} losses are not finite, the first at step ",
                Cell(f"{loss.steps[bad[0]]:,.0f}", (first.source,)),
                ".",
            )
        )
    trips = log.one("instant_gate_trips", "max")
    if trips is not None and trips.value > 0:
        found.append(
            text(f"{run.label}: INSTANT's verification gate tripped ", whole(trips, unit_of("trips", [])), " times.")
        )
    failure = run[CONFIG].at("resolved", "cuda_graph_failure")
    if failure is not None:
        found.append(text(f"{run.label}: no CUDA graph: ", Cell(clean(failure.value), (failure.source,)), "."))
    wanted, last = run[CONFIG].at("config", "training", "steps"), log.one("step", "last")
    if wanted is not None and last is not None and wanted.number is not None and last.value < wanted.number:
        parts = (whole(last, unit_of("step", [])), " of ", whole(wanted, unit_of("step", [])))
        why = "." if run.died else ": still running, interrupted or killed."
        found.append(text(f"{run.label}: the log ends at step ", *parts, why))
    for line, why in log.damaged:
        found.append(
            text(
                Cell(f"{log.label} line {line:,}", (Source(log.path, log.label, f"L{line}"),), code=True),
                f" is {why}; it was left out.",
                kind="warning",
            )
        )
    if log.damaged_count > len(log.damaged):
        found.append(text(f"{log.label}: {log.damaged_count:,} lines in all were left out.", kind="warning"))
    if log.cut_off is not None:
        source = Source(log.path, log.label, f"L{log.cut_off}")
        found.append(
            text(
                Cell(f"{log.label} line {log.cut_off:,}", (source,), code=True),
                ", the last, has no end: a process that was killed, or is writing it now. It was left out.",
                kind="warning",
            )
        )
    if log.stepped_back:
        source = Source(log.path, log.label, f"L{log.stepped_back[0]}")
        found.append(
            text(
                f"{run.label}: the step does not grow at ",
                Cell(f"{len(log.stepped_back):,} lines of the log", (source,)),
                "; curves are drawn in the order of steps.",
                kind="warning",
            )
        )
    for name in WRITTEN_BY:
        file = run.files.get(name)
        if file is not None and file.problem and not file.missing:
            found.append(text(Cell(file.label, (file.whole(),), code=True), f": {file.problem}.", kind="warning"))
    superseded = run.path / "metrics.superseded.jsonl"
    if superseded.exists():
        found.append(
            text(
                f"{run.label}: a resume took back steps that no checkpoint held; their lines are in ",
                Cell(superseded.name, (Source(superseded, superseded.name),), code=True),
                ".",
            )
        )
    return found
