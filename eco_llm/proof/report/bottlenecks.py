"""Where the time goes, before and after: from perf/window_10m_bottlenecks.json and the phases in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eco_llm.proof.report.document import Block, Cell, Fact, Section, Source, StackedBars, Table, clean, text
from eco_llm.proof.report.evidence import BOTTLENECKS, JsonFile, Run
from eco_llm.proof.report.measured import tail_mean
from eco_llm.proof.report.numbers import cell, change, show, unit_of, whole
from eco_llm.proof.report.tables import absent

_PHASES = ("data", "forward", "backward", "opt_step", "zero_grad")
_PARTS = (*_PHASES, "other", "loop")
_GROUPS = (
    ("stages", "Shares of the whole step"),
    ("train_phase", "Shares of the train stage"),
    ("optimizer_phase", "Shares of the optimizer phase"),
)
_KERNELS_SHOWN = 12


def bottlenecks(runs: Sequence[Run]) -> Section:
    """Dominant stage, stacked phases, stage tables of the first run against the last, costliest kernels."""
    blocks: list[Block] = [absent(run[BOTTLENECKS]) for run in runs if run[BOTTLENECKS].problem]
    known = [run for run in runs if not run[BOTTLENECKS].problem]
    for run in known:
        dominant = _dominant(run)
        if dominant:
            blocks.append(dominant)
    bars = _phase_bars(runs)
    if bars:
        blocks.append(bars)
    else:
        blocks.append(text("No run's log has phase times, so there are no phase bars.", kind="missing"))
    for group, caption in _GROUPS:
        table = _shares(known, group, caption)
        if table:
            blocks.append(table)
    for run in known:
        kernels = _kernels(run[BOTTLENECKS], run.label)
        if kernels:
            blocks.append(kernels)
    return Section("bottlenecks", "Current dominant bottlenecks", blocks)


def _dominant(run: Run) -> Block | None:
    file = run[BOTTLENECKS]
    stage, steps = file.at("dominant_stage"), file.at("steps")
    if stage is None:
        return None
    parts: list[str | Cell] = [
        f"{run.label}: the dominant stage is ",
        Cell(clean(stage.value), (stage.source,), code=True),
    ]
    share = _find(file, "stages", str(stage.value), "percent")
    if share:
        parts += [", ", whole(share, unit_of("percent", [])), " of a step"]
    inside = _find(file, "optimizer_phase", "backward", "percent")
    if inside:
        parts += ["; backward is ", whole(inside, unit_of("percent", [])), " of the optimizer phase"]
    if steps:
        parts += [" (last ten minutes of the run: ", whole(steps, unit_of("steps", [])), " steps)"]
    return text(*parts, ".")


def _find(file: JsonFile, group: str, stage: str, key: str) -> Fact | None:
    """One number of the entry for `stage` in a list of shares."""
    entries = file.data.get(group) if isinstance(file.data, dict) else None
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict) and entry.get("stage") == stage:
            return file.at(group, i, key)
    return None


def _stages(file: JsonFile, group: str) -> list[str]:
    entries = file.data.get(group) if isinstance(file.data, dict) else None
    return [
        str(e["stage"]) for e in (entries if isinstance(entries, list) else []) if isinstance(e, dict) and "stage" in e
    ]


def _shares(runs: Sequence[Run], group: str, caption: str) -> Table | None:
    """One row a stage: share and milliseconds of the first run and of the last."""
    runs = list(dict.fromkeys([*runs[:1], *runs[-1:]], None))
    names = list(dict.fromkeys(name for run in reversed(runs) for name in _stages(run[BOTTLENECKS], group)))
    if not names:
        return None
    several = len(runs) > 1
    header = ["stage"]
    for when in (" before", " after") if several else ("",):
        header += [f"share{when}", f"time a step{when}"]
    if several:
        caption = f"{caption}: before ({runs[0].label}) and after ({runs[-1].label})"
    rows = []
    for name in names:
        row = [Cell(clean(name), code=True)]
        times = [_find(run[BOTTLENECKS], group, name, "avg_seconds") for run in runs]
        for run, time in zip(runs, times, strict=True):
            share = _find(run[BOTTLENECKS], group, name, "percent")
            row += [
                whole(share, unit_of("percent", [])),
                whole(time, unit_of("avg_s", [time.number if time else None])),
            ]
        rows.append((*row, *([change(times[0], times[-1])] if several else [])))
    return Table(caption, (*header, *(["change of time"] if several else [])), tuple(rows))


@dataclass(frozen=True)
class _Step:
    """Mean seconds of a run's step and of its parts (`_PARTS`), over its tail; other and loop are differences."""

    run: Run
    whole: Fact
    parts: tuple[float, ...]
    sources: tuple[tuple[Source, ...], ...]


def _step(run: Run) -> _Step | None:
    """None where the log lacks a phase or the step's times."""
    found = [tail_mean(run, f"{name}_s") for name in ("core_step_time", "step_time", *(f"phase_{p}" for p in _PHASES))]
    facts = [fact for fact in found if fact is not None]
    if len(facts) < len(found):
        return None
    core, step, *phases = facts
    # Rounding of the clock may leave -1e-9 s between phases that touch.
    other = max(0.0, core.value - sum(fact.value for fact in phases))
    loop = max(0.0, step.value - core.value)
    computed = (core.source, *(fact.source for fact in phases)), (step.source, core.source)
    return _Step(run, step, (*(f.value for f in phases), other, loop), (*((f.source,) for f in phases), *computed))


def _phase_bars(runs: Sequence[Run]) -> Block | None:
    """Mean time of every part of a step, all runs to one scale."""
    steps = [step for run in runs if (step := _step(run)) is not None]
    if not steps:
        return None
    unit = unit_of("step_time_s", [step.whole.value for step in steps])
    owner = (lambda step: f"{step.run.label}, ") if len(runs) > 1 else (lambda step: "")
    header = ["phase"]
    for step in steps:
        header += [f"{owner(step)}{unit.name}", f"{owner(step)}% of step"]
    rows = []
    for i, name in enumerate(_PARTS):
        row = [Cell(name, code=True)]
        for step in steps:
            share = 100 * step.parts[i] / step.whole.value if step.whole.value > 0 else math.nan
            row += [
                Cell(show(step.parts[i], unit), step.sources[i]),
                Cell(f"{share:.2f}", (*step.sources[i], step.whole.source)),
            ]
        rows.append(tuple(row))
    together = [c for step in steps for c in (cell(step.whole, unit), Cell("100"))]
    rows.append((Cell("whole step"), *together))
    table = Table(
        "Mean time of a step by phase, tail of each run (metrics.jsonl)",
        tuple(header),
        tuple(rows),
        "other: the rest of the core step; loop: logging, evaluation and checkpoints around it.",
    )
    bars = tuple((s.run.label, s.parts, f"{show(s.whole.value, unit)} {unit.name}") for s in steps)
    words = "; ".join(f"{label}: {total} a step" for label, _, total in bars)
    return StackedBars("Time of a step by phase", f"Stacked bars of mean phase times. {words}.", _PARTS, bars, table)


def _kernels(file: JsonFile, label: str) -> Block | None:
    table = file.data.get("profiler")
    entries = table.get("rows") if isinstance(table, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    rows = []
    for i, entry in enumerate(entries[:_KERNELS_SHOWN]):
        if isinstance(entry, dict):
            at = [file.at("profiler", "rows", i, key) for key in ("calls", "self_ms", "percent")]
            units = [unit_of(key, []) for key in ("calls", "self_ms", "percent")]
            rows.append(
                (Cell(clean(entry.get("name"), 90), code=True), *(cell(f, u) for f, u in zip(at, units, strict=True)))
            )
    steps, clock = file.at("profiler", "steps"), file.at("profiler", "clock")
    note = f"torch.profiler, {clean(steps.value if steps else '?')} steps, clock {clean(clock.value if clock else '?')}"
    caption = f"Costliest kernels or operators of {label}"
    return Table(caption, ("name", "calls", "ms", "% of all"), tuple(rows), note + ".")
