"""`eco_train sweep`: a short measured run for each value of one or more flags; what fits, and what is fastest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eco_llm.cli import grid
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig

_USAGE = """usage: eco_train sweep [@FILE] FLAGS OF eco_train train, one or more with a comma list

  eco_train sweep @train_sigma_args.txt --batch-size 2,4,6,8
  eco_train sweep @presets/quickstart_cpu.txt --batch-size 2,4 --torch-compile on,off

Each point is a run of its own process: --perf-warmup-steps, then --perf-measure-steps that count (--steps is not used).
Results: OUT/perf/sweep.json and a table, OUT being --output-dir. The same command again runs what is missing;
--no-resume starts anew. All flags: eco_train train --help."""


def run(args: Sequence[str]) -> int:
    """Refuse what cannot work; run the points that are missing; show the table."""
    if {"-h", "--help"} & set(args):
        print(_USAGE)
        return 0
    from eco_llm.proof.runs import Stopped
    from eco_llm.proof.sweep import FIXED, Point, Sweep, fixed_flags, point_config

    words, axes = grid.split(args, fixed=FIXED)
    points, fresh = [], False
    for values in grid.points(axes):
        flags = [*words, *grid.flags(values)]
        typed = parse(TrainConfig, flags, prog="eco_train sweep")
        fresh = not typed.training.resume
        config = point_config(typed)
        config.validate()
        own = grid.without(flags, {*FIXED, "output_dir"})
        points.append(Point(values, (*own, *fixed_flags(typed)), config))

    from eco_llm.data.sources import check_sources

    for config in {p.config.data: p.config for p in points}.values():
        check_sources(config.data, seq_len=config.training.seq_len)
    out = Path(points[0].config.training.output_dir)
    sweep = Sweep(out, points, fresh=fresh, command=["eco_train", *sys.argv[1:]])
    try:
        with sweep.opened():
            _run(sweep)
    except Stopped as stop:
        return int(stop.outcome)
    return 0 if any(row["status"] == "done" for row in sweep.rows.values()) else 1


def _run(sweep: Any) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from eco_llm.proof.runs import Stopped

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    waiting, steps = sweep.waiting, sweep.steps_per_point
    if len(waiting) < len(sweep.points):
        console.print(f"{len(sweep.points) - len(waiting)} of {len(sweep.points)} points are finished already")
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    )  # fmt: skip
    finished = 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(waiting[0].name if waiting else "", total=len(waiting) * steps)

        def on_row(row: dict[str, Any]) -> None:
            nonlocal finished
            finished += 1
            following = waiting[finished].name if finished < len(waiting) else ""
            bar.update(task, completed=finished * steps, description=following)
            console.print(f"{finished}/{len(waiting)}  {row['name']}: {_result(row)}", markup=False)

        try:
            sweep.run(lambda done: bar.update(task, completed=finished * steps + done), on_row)
        except (KeyboardInterrupt, Stopped):
            bar.stop()
            console.print(f"stopped; {finished} points were measured now. The same command runs the rest")
            raise
    _show(console, sweep)


def _result(row: dict[str, Any]) -> str:
    if row["status"] == "done":
        return f"{row['avg_effective_tokens_per_s']:,.1f} tokens/s"
    return f"{row['status'].replace('_', ' ')}: {row['message']}"


def _show(console: Any, sweep: Any) -> None:
    from rich.table import Table

    summary = sweep.summary()
    names = list(summary["axes"])
    table = Table(*(f"--{n.replace('_', '-')}" for n in names))
    for title in ("result", "tokens/s", "step, ms", "peak GiB"):
        table.add_column(title, justify="left" if title == "result" else "right")
    for row in summary["points"]:
        cells = [*row["values"].values(), row["status"].replace("_", " ")]
        if row["status"] == "done":
            cells += [f"{row['avg_effective_tokens_per_s']:,.1f}", f"{1000 * row['avg_step_time_s']:.2f}"]
            cells.append("" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}")
        table.add_row(*cells)
    console.print(table)
    if summary["largest_stable_batch"] is not None:
        console.print(f"largest stable batch: {summary['largest_stable_batch']}")
    if summary["fastest_point"] is not None:
        fastest = sweep.rows[summary["fastest_point"]]
        typed = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in fastest["values"].items())
        console.print(f"fastest: {typed} ({fastest['avg_effective_tokens_per_s']:,.1f} tokens/s)", markup=False)
        rates = [r["avg_effective_tokens_per_s"] for r in summary["points"] if r["status"] == "done"]
        near = sum(rate > 0.97 * max(rates) for rate in rates)
        if near > 1:
            console.print(f"{near} points are within 3% of each other: `eco_train compare` tells whether they differ")
    console.print(f"results: {sweep.file}", markup=False)
