"""Headlines, the measured tables and the curves: from metrics.jsonl and perf/baseline_throughput.json."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eco_llm.proof.report.document import Block, Card, Cards, Cell, Fact, LineChart, Section, Series, Table, text
from eco_llm.proof.report.evidence import METRICS, WINDOW, Run
from eco_llm.proof.report.numbers import cell, change, show, unit_of, whole
from eco_llm.proof.report.tables import absent, across

PHASES = ("data", "forward", "backward", "opt_step", "zero_grad", "optim", "train")
_RATES = ("effective_tokens_per_s", "core_tokens_per_s", "step_time_s", "core_step_time_s")
TIMES = (*_RATES, *(f"phase_{name}_s" for name in PHASES), "data_host_s", "gpu_util_percent")
_GPU = ("gpu_power_watts", "gpu_memory_used_gib")  # in logs of runs on a GPU
_PLACED = {*TIMES, "step", "tokens", "lr", "loss", "val_loss", "val_bits_per_byte", "started_at", "ended_at"}
_TABLE_ROWS = 10
_DRAWABLE = 1e300  # sums and differences of what is drawn stay finite; NaN is not below it either


def missing_log(run: Run) -> Block | None:
    """What is wrong with a run's log as a whole."""
    problem, rows = run.metrics.problem, len(run.metrics)
    if problem is None and rows:
        return None
    why = (
        "is missing"
        if problem == "missing"
        else f"could not be read: {problem}"
        if problem
        else "holds no whole record"
    )
    return text(Cell(run.metrics.label, code=True), f" {why}.", kind="missing")


def summary(runs: Sequence[Run]) -> Section:
    """A handful of headline numbers: the last run's, against the first's."""
    first, last = runs[0], runs[-1]
    lines = last.metrics.tail()
    tail = "the only row" if lines is not None and lines[0] == lines[1] else "tail median"
    cards = []
    for label, key, find, note in (
        ("Throughput, core", "core_tokens_per_s", _tail_median, tail),
        ("Step time", "step_time_s", _tail_median, tail),
        ("Training loss", "loss", _tail_median, tail),
        ("Validation", "val_bits_per_byte", _last, "last"),
        ("Peak memory", "memory_peak_gib", _most, "largest seen"),
        ("Steps", "step", _last, "last in the log"),
    ):
        after = find(last, key)
        if after is None:
            continue
        before = find(first, key) if last is not first else None
        unit = unit_of(key, [after.number, before.number if before else None])
        cards.append(
            Card(
                label,
                whole(after, unit),
                whole(before, unit) if before else None,
                change(before, after, 2) if before and key != "step" else None,
                note,
            )
        )
    blocks: list[Block] = [Cards(tuple(cards))] if cards else []
    blocks += [block for run in runs if run.trained and (block := missing_log(run))]
    if len(runs) > 1 and cards:
        blocks.insert(
            1,
            text(
                f"{last.label}, with {first.label} before it and the change between the two. Runs that were not made in"
                " turns differ also by what else their machine did."
            ),
        )
    return Section("summary", "Summary", blocks)


def _tail_median(run: Run, key: str) -> Fact | None:
    return run.metrics.over(key, "median", run.metrics.tail())


def tail_mean(run: Run, key: str) -> Fact | None:
    """Mean over the tail: means of parts add up to the mean of the whole, medians do not."""
    return run.metrics.over(key, "mean", run.metrics.tail())


def _last(run: Run, key: str) -> Fact | None:
    return run.metrics.one(key, "last")


def _most(run: Run, key: str) -> Fact | None:
    return run.metrics.one(key, "max")


def measured(runs: Sequence[Run]) -> Section:
    """Window table, tail table, training results."""
    blocks: list[Block] = []
    window = across(
        "Measured window (perf/baseline_throughput.json)",
        runs,
        [f"avg_{key}" for key in TIMES],
        lambda run, key: run[WINDOW].at(key),
        note=_window_note(runs),
    )
    blocks += [absent(run[WINDOW]) for run in runs if run[WINDOW].problem]
    if window:
        blocks.append(window)
    tail = across(
        "Tail of the run (metrics.jsonl)",
        runs,
        ["loss", *TIMES, *_GPU],
        _tail_median,
        note=_sentence("; ".join(f"{_tail_words(run)} of {run.label}" for run in runs if len(run.metrics))),
    )
    if tail:
        blocks.append(tail)
    results = _results(runs)
    if results:
        blocks.append(results)
    own = sorted({key for run in runs for key in run.metrics.keys} - _PLACED - set(_GPU))
    others = across(
        "Everything else in the log",
        runs,
        own,
        _tail_median,
        note="Medians over the same rows. Keys are explained in docs/perf.md, docs/c3o.md and docs/configuration.md.",
    )
    if others:
        blocks.append(others)
    blocks += [block for run in runs if (block := missing_log(run))]
    return Section("measured", "Measured results", blocks)


def _window_note(runs: Sequence[Run]) -> str:
    notes = []
    for run in runs:
        data = run[WINDOW].data
        if isinstance(data, dict):
            profiled = data.get("profiled_steps_in_window") or 0
            notes.append(
                f"{run.label}: {_steps(data.get('first_step'), data.get('last_step'))} after {data.get('warmup_steps')}"
                f" left out, {data.get('device_time_mode')} clock"
                + (f", {profiled} of them profiled and slower for it" if profiled else "")
                + (", synchronised at phase boundaries" if data.get("sync_boundaries") else "")
            )
    return "; ".join(notes) + "." if notes else ""


def _steps(first: object, last: object) -> str:
    return f"step {first}" if first == last else f"steps {first}–{last}"


def _tail_words(run: Run) -> str:
    lines = run.metrics.tail()
    assert lines is not None
    steps = run.metrics.column("step")
    inside = steps.values[(steps.lines >= lines[0]) & (steps.lines <= lines[1])]
    first, last = (f"{inside[i]:,.0f}" for i in (0, -1))
    return f"step {first} alone" if first == last else f"medians over steps {first}–{last}"


def _sentence(words: str) -> str:
    """With a capital and a full stop."""
    return f"{words[:1].upper()}{words[1:]}."


def _results(runs: Sequence[Run]) -> Table | None:
    """What was learned: losses, tokens, wall time."""
    several = len(runs) > 1
    wanted = (
        ("training loss, last step", "loss", "last"),
        ("validation loss, last", "val_loss", "last"),
        ("validation loss, best", "val_loss", "min"),
        ("validation bits/byte, last", "val_bits_per_byte", "last"),
        ("tokens seen", "tokens", "last"),
        ("last step", "step", "last"),
        ("skipped steps", "skipped_steps", "last"),
        ("peak memory", "memory_peak_gib", "max"),
    )
    rows = []
    for label, key, which in wanted:
        facts = [run.metrics.one(key, which) for run in runs]
        if any(facts):
            unit = unit_of(key, [f.number for f in facts if f])
            changes = [change(facts[0], facts[-1])] if several else []
            rows.append((Cell(label, unit=unit.name), *(cell(f, unit) for f in facts), *changes))
    times = [_wall(run) for run in runs]
    if any(times):
        shown = [Cell("–") if t is None else t for t in times]
        rows.append((Cell("first step's begin to last step's end", unit="s"), *shown, *[Cell("–")] * several))
    header = ("", *(run.label if several else "value" for run in runs), *(["change"] if several else []))
    return Table("Result of training (metrics.jsonl)", header, tuple(rows)) if rows else None


def _wall(run: Run) -> Cell | None:
    begin, end = run.metrics.one("started_at", "first"), run.metrics.one("ended_at", "last")
    if begin is None or end is None:
        return None
    return Cell(f"{end.value - begin.value:,.1f}", (end.source, begin.source))


# -- curves --------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> Section | None:
    """Charts of the logs; None where no run has one."""
    runs = [run for run in runs if len(run.metrics)]
    x_key, x_label = _abscissa(runs)
    charts: list[Block] = []
    for title, keys, from_zero in (
        ("Loss", ("loss", "val_loss"), False),
        ("Core throughput", ("core_tokens_per_s",), True),
        ("Effective throughput", ("effective_tokens_per_s",), True),
        ("GPU utilisation", ("gpu_util_percent",), True),
        ("Peak memory", ("memory_peak_gib",), True),
        ("Gradient norm", ("grad_norm",), True),
    ):
        chart = _curve(runs, title, keys, x_key, x_label, from_zero)
        if chart:
            charts.append(chart)
    return Section("curves", "Loss and throughput", charts) if charts else None


def _abscissa(runs: Sequence[Run]) -> tuple[str, str]:
    """Steps; tokens, where the runs' steps are of different sizes and would compare unequal amounts of text."""
    sizes = set()
    for run in runs:
        tokens = run.metrics.one("tokens", "last")
        if tokens is None:
            return "step", "step"
        column = run.metrics.column("tokens")
        size = float(column.values[-1]) / max(1.0, float(column.steps[-1]))
        if not math.isfinite(size):
            return "step", "step"
        sizes.add(round(size))
    return ("tokens", "tokens") if len(sizes) > 1 else ("step", "step")


def _curve(
    runs: Sequence[Run], title: str, keys: tuple[str, ...], x_key: str, x_label: str, from_zero: bool
) -> LineChart | None:
    unit = unit_of(keys[0], [])
    series, rows, dropped = [], [], 0
    for run in runs:
        for i, key in enumerate(keys):
            column = run.metrics.column(key)
            x, y = column.steps, column.values
            if x_key != "step":
                tokens = run.metrics.column(x_key)
                x = tokens.values[np.searchsorted(tokens.lines, column.lines).clip(max=tokens.lines.size - 1)]
            drawable = (np.abs(x) < _DRAWABLE) & (np.abs(y) < _DRAWABLE)
            dropped += int((~drawable).sum())
            if not drawable.any():
                continue
            x, y = x[drawable], y[drawable]
            if run.metrics.stepped_back:
                order = np.argsort(x, kind="stable")
                x, y = x[order], y[order]
            sort = "validation" if i else ("training" if len(keys) > 1 else "")
            name = " ".join(filter(None, (run.label if len(runs) > 1 else "", sort))) or title.lower()
            # One run's two kinds may have a colour each; a run among several keeps its own.
            series.append(Series(name, x, y * unit.scale, run.hue if len(runs) > 1 else i, dots=bool(i)))
            rows += _aggregated(run, key, name)
    if not series:
        return None
    unit_name = unit.name or keys[0]
    note = f"{dropped:,} values that are not finite, or no size to draw, are left out." if dropped else ""
    table = Table(
        f"{title}: {unit_name} over stretches of the run",
        ("series", "steps", "rows", "median", "min", "max"),
        tuple(rows),
        note,
    )
    first, last = (", ".join(f"{s.name} {s.y[j]:.5g}" for s in series) for j in (0, -1))
    words = f"{title} in {unit_name} over {x_label}. At the beginning: {first}. At the end: {last}."
    return LineChart(title, words, x_label, unit_name, tuple(series), table, from_zero)


def _aggregated(run: Run, key: str, name: str) -> list[tuple[Cell, ...]]:
    """The table beside a chart: up to ten stretches of equal length, median, min and max of each."""
    column = run.metrics.column(key)
    unit = unit_of(key, [])
    rows = []
    for part in np.array_split(np.arange(column.lines.size), min(_TABLE_ROWS, column.lines.size)):
        lines = int(column.lines[part[0]]), int(column.lines[part[-1]])
        facts = [run.metrics.over(key, how, lines) for how in ("median", "min", "max")]
        first, last = (f"{column.steps[part[i]]:,.0f}" for i in (0, -1))
        steps = first if first == last else f"{first}–{last}"
        rows.append((Cell(name), Cell(steps), Cell(f"{part.size:,}"), *(cell(f, unit) for f in facts)))
    return rows


# -- improvement ---------------------------------------------------------------------------------------------


def improvement(runs: Sequence[Run]) -> list[Block]:
    """Every later run against the first; the difference is not tested here, and the text says so."""
    first = runs[0]
    blocks: list[Block] = []
    for run in runs[1:]:
        rows = []
        for label, key, find in (
            ("window: effective throughput", "avg_effective_tokens_per_s", _window),
            ("window: core throughput", "avg_core_tokens_per_s", _window),
            ("tail: effective throughput", "effective_tokens_per_s", _tail_median),
            ("tail: core throughput", "core_tokens_per_s", _tail_median),
            ("tail: step time", "step_time_s", _tail_median),
            ("tail: forward", "phase_forward_s", _tail_median),
            ("tail: backward", "phase_backward_s", _tail_median),
            ("tail: optimizer step", "phase_opt_step_s", _tail_median),
            ("peak memory", "memory_peak_gib", _most),
            ("validation loss, last", "val_loss", _last),
        ):
            a, b = find(first, key), find(run, key)
            if a is None or b is None or a.number is None or b.number is None:
                continue
            unit = unit_of(key, [a.number, b.number])
            difference = b.number - a.number
            delta = Cell(("+" if difference >= 0 else "") + show(difference, unit), (b.source, a.source))
            rows.append((Cell(label, unit=unit.name), cell(a, unit), cell(b, unit), delta, change(a, b)))
        if rows:
            header = ("", first.label, run.label, "difference", "change")
            blocks.append(Table(f"{first.label} → {run.label}", header, tuple(rows)))
    if blocks:
        blocks.append(
            text(
                "Runs that were not made in turns differ also by what else their machine did, so this table is no proof"
                " of a difference: ",
                Cell("eco_train compare", code=True),
                " measures two settings in pairs and says how sure it is.",
            )
        )
    return blocks


def _window(run: Run, key: str) -> Fact | None:
    return run[WINDOW].at(key)


__all__ = ["METRICS", "PHASES", "TIMES", "curves", "improvement", "measured", "missing_log", "summary", "tail_mean"]
