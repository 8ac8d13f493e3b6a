"""`eco_train report`: PROOF_OF_EVOLUTION.md and report.html from evidence in run directories alone.

evidence.py, metrics_log.py      files → facts: values that know the file and the line or key they came from
changed.py … provenance.py       facts → sections (document.py)
markdown.py, html.py, charts.py  sections → files; page/ holds the template
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eco_llm.errors import UserError
from eco_llm.files import replacing
from eco_llm.proof.report import html, markdown
from eco_llm.proof.report.bottlenecks import bottlenecks
from eco_llm.proof.report.changed import commands, what_changed
from eco_llm.proof.report.document import Cell, Document
from eco_llm.proof.report.evidence import CONFIG, OUTPUTS, Run, open_runs
from eco_llm.proof.report.incidents import incidents
from eco_llm.proof.report.links import relative_to
from eco_llm.proof.report.measured import curves, measured, summary
from eco_llm.proof.report.memory import memory
from eco_llm.proof.report.provenance import date_of, hardware, notes
from eco_llm.proof.report.verdicts import improvements, sweep_in_short, sweeps, verdict

MOST_RUNS = 8  # as many colours as can be told apart


def document_of(runs: Sequence[Run]) -> Document:
    """The report on these runs, the first being what the others are set against.

    Folders of comparisons or sweeps alone have no log and no window: they take part only in the sections about those.
    """
    trained = [run for run in runs if run.trained]
    head = summary(trained or runs)
    head.blocks += [said for run in runs for say in (verdict, sweep_in_short) if (said := say(run)) is not None]
    sections = (
        head,
        what_changed(trained, runs),
        commands(runs),
        curves(trained) if trained else None,
        measured(trained) if trained else None,
        improvements(runs, trained),
        bottlenecks(trained) if trained else None,
        memory(trained) if trained else None,
        sweeps(runs),
        incidents(runs),
        hardware(runs),
        notes(runs),
    )
    names = tuple(Cell(run.label, (run[CONFIG].whole(),) if not run[CONFIG].missing else ()) for run in runs)
    return Document("PROOF_OF_EVOLUTION", names, date_of(runs), tuple(s for s in sections if s is not None))


def write_report(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Render the runs into `out`, the last run's directory by default; return the two files.

    The first run is what the others are set against: its own report, the baseline's, must not be overwritten.

    The same evidence gives the same bytes: nothing is taken from the clock.

    Raises:
        UserError: no run, too many, a folder that holds none, or a place that cannot be written.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise UserError(f"name 1 to {MOST_RUNS} run directories, not {len(paths)}")
    runs = open_runs(list(paths))
    folder = runs[-1].path if out is None else out
    document = document_of(runs)
    link = relative_to(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(OUTPUTS, (markdown.render(document, link), html.render(document, link)), strict=True):
            with replacing(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8", newline="\n")
            written.append(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror}") from None
    return written
