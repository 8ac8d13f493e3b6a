"""What the numbers were measured on, and the files they were read from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime

from eco_llm.proof.report.document import Block, Cell, Fact, Section, Source, Table, clean, text
from eco_llm.proof.report.evidence import COMPARISON, CONFIG, METRICS, SWEEP, WRITTEN_BY, Run

_ROWS = (
    ("GPU", ("gpu", "name")),
    ("GPU memory, GiB", ("gpu", "memory_gib")),
    ("GPU driver", ("gpu", "driver")),
    ("compute capability", ("gpu", "compute_capability")),
    ("CPU", ("cpu", "model")),
    ("logical cores", ("cpu", "logical_cores")),
    ("host memory, GiB", ("cpu", "memory_gib")),
    ("system", ("platform",)),
    ("Python", ("python",)),
    ("eco_llm", ("eco_llm",)),
    ("commit", ("commit",)),
    ("code differs from the commit", ("dirty",)),
    ("SHA-256 of the package", ("source_sha256",)),
    ("measured", ("date",)),
)
_RESOLVED = ("device", "compute_dtype", "torch_compile", "cuda_graph", "kernels", "parameters", "flops_per_token")


def hardware(runs: Sequence[Run]) -> Section:
    """Machine, versions and code of each run."""
    rows: list[tuple[Cell, ...]] = []

    def add(label: str, facts: list[Fact | None]) -> None:
        if any(f is not None for f in facts):
            rows.append((Cell(label), *(_shown(f) for f in facts)))

    places = [run.environment for run in runs]
    for label, path in _ROWS:
        add(label, [place[0].at(*place[1], *path) if place else None for place in places])
    libraries: dict[str, None] = {}
    for place in places:
        versions = place[0].data["environment"].get("versions") if place else None
        libraries |= dict.fromkeys(versions if isinstance(versions, dict) else ())
    for name in libraries:
        add(clean(name), [place[0].at(*place[1], "versions", name) if place else None for place in places])
    if "torch" not in libraries:
        add("torch", [run[CONFIG].at("resolved", "torch") for run in runs])
    for key in _RESOLVED:
        add(key.replace("_", " "), [run[CONFIG].at("resolved", key) for run in runs])
    blocks: list[Block] = []
    if rows:
        header = ("", *(run.label if len(runs) > 1 else "value" for run in runs))
        blocks.append(Table("Hardware and versions", header, tuple(rows), numeric=False))
    for run, place in zip(runs, places, strict=True):
        if place is None:
            blocks.append(text(f"{run.label}: no perf file says what it ran on.", kind="missing"))
    return Section("hardware", "Hardware and versions", blocks)


def _shown(fact: Fact | None) -> Cell:
    if fact is None:
        return Cell("–")
    plain = isinstance(fact.value, (int, float)) and not isinstance(fact.value, bool)
    return Cell(f"{fact.value:,}" if plain else clean(fact.value), (fact.source,))


def notes(runs: Sequence[Run]) -> Section:
    """How to check this report: the files, with sizes and digests, and the rules of aggregation."""
    rows = []
    for run in runs:
        for name in WRITTEN_BY:
            rows.append((Cell(run.label), *_file_row(run, name)))
        for file in run.crashes:
            state = Cell("read" if file.problem is None else clean(file.problem))
            rows.append(
                (
                    Cell(run.label),
                    Cell(file.label.rpartition(": ")[2], (file.whole(),), code=True),
                    state,
                    Cell(f"{file.size:,}"),
                    Cell(file.sha256[:16], code=True),
                )
            )
    table = Table(
        "Evidence files", ("run", "file", "state", "bytes", "SHA-256, first 16 digits"), tuple(rows), numeric=False
    )
    return Section(
        "notes",
        "Notes",
        [
            text(
                "Every number here was read from a file of a run, or computed from such numbers, and links to the"
                " file and to its line or key."
            ),
            text(
                "Tail: the last fifth of the log's rows, at least 5 and at most 1,000, without the first 5. Curves with"
                " more points than fit are drawn as the median of each stretch, with the smallest and largest value"
                " as a band."
            ),
            table,
        ],
    )


def _file_row(run: Run, name: str) -> tuple[Cell, ...]:
    if name == METRICS:
        log = run.metrics
        state = log.problem or f"read: {len(log):,} rows"
        if log.damaged_count or log.cut_off:
            state += f", {log.damaged_count + (log.cut_off is not None):,} lines left out"
        source, size, digest, missing = Source(log.path, log.label), log.size, log.sha256, log.problem == "missing"
    else:
        file = run[name]
        state, source, size, digest, missing = (
            file.problem or "read",
            file.whole(),
            file.size,
            file.sha256,
            file.missing,
        )
    if missing:
        return Cell(name, code=True), Cell(f"missing (written by {WRITTEN_BY[name]})"), Cell("–"), Cell("–")
    return Cell(name, (source,), code=True), Cell(clean(state)), Cell(f"{size:,}"), Cell(digest[:16], code=True)


def date_of(runs: Sequence[Run]) -> Cell:
    """When the newest evidence was measured, UTC; from the evidence, so that the same files give the same report."""
    found: list[tuple[datetime, Cell]] = []
    problem: Cell | None = None
    for run in runs:
        if (end := run.metrics.one("ended_at", "last")) is not None:
            try:
                when = datetime.fromtimestamp(end.value, UTC)
            except (ValueError, OverflowError, OSError):
                problem = Cell("unknown: the log's last time is none", (end.source,))
            else:
                found.append((when, Cell(when.strftime("%Y-%m-%d %H:%M:%S UTC"), (end.source,))))
        dates = [run[CONFIG].at("started", "date")]
        dates += [run[name].at(*path) for name in (COMPARISON, SWEEP) for path in (("date",), ("environment", "date"))]
        if (place := run.environment) is not None:
            dates.append(place[0].at(*place[1], "date"))
        for fact in filter(None, dates):
            with contextlib.suppress(ValueError):
                when = datetime.fromisoformat(str(fact.value))
                when = when if when.tzinfo else when.replace(tzinfo=UTC)
                found.append((when, Cell(clean(fact.value), (fact.source,))))
    if problem is not None:
        return problem
    if found:
        return max(found, key=lambda pair: pair[0])[1]
    return Cell("unknown: no file has one")
