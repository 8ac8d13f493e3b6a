"""What was changed, and the commands: from config.json and the environment blocks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from eco_llm.config import TrainConfig, to_dict
from eco_llm.perf.environment import command_line
from eco_llm.proof.report.document import Block, Cell, Code, Fact, Section, Table, clean, text
from eco_llm.proof.report.evidence import CONFIG, Run
from eco_llm.proof.report.tables import absent
from eco_llm.proof.report.verdicts import commands_of, varied
from eco_llm.version import __version__

_PLACES = ("output_dir", "resume")  # they say where a run is, not what it does


def what_changed(runs: Sequence[Run], also: Sequence[Run] = ()) -> Section | None:
    """Settings in which the runs differ; of one run, those that are not this version's defaults.

    None where nothing is known.

    Args:
        runs: those that were trained.
        also: where comparisons and sweeps may lie, each of which says what it varied.
    """
    blocks: list[Block] = [absent(run[CONFIG]) for run in runs if run[CONFIG].problem]
    known = [run for run in runs if not run[CONFIG].problem]
    if len(runs) == 1:
        blocks += [_against_defaults(run) for run in known]
    elif len(known) > 1:
        blocks.append(_between(known))
    for run in known:
        blocks += _resumes(run)
    if len(runs) == 1 and (shelf := runs[0].set_aside):
        blocks.append(
            text(
                f"{len(shelf)} earlier {'run lies' if len(shelf) == 1 else 'runs lie'} in ",
                Cell("previous/", code=True),
                "; name one before this run to see what changed since: ",
                Cell(
                    f"eco_train report {clean(runs[0].label)}/previous/{clean(shelf[-1])} {clean(runs[0].label)}",
                    code=True,
                ),
            )
        )
    for run in also:
        blocks += varied(run)
    return Section("changed", "What was changed", blocks) if blocks else None


def _settings(run: Run) -> dict[str, Fact]:
    """Every setting by its name; names are unique across groups."""
    found: dict[str, Fact] = {}
    config = run[CONFIG].data.get("config")
    for group, values in config.items() if isinstance(config, dict) else ():
        for name in values if isinstance(values, dict) else ():
            fact = run[CONFIG].at("config", group, name)
            if fact is not None:
                found[name] = fact
    return found


def _flag(name: str) -> Cell:
    return Cell("--" + clean(name).replace("_", "-"), code=True)


def _shown(fact: Fact | None) -> Cell:
    return Cell("–") if fact is None else Cell(_word(fact.value), (fact.source,))


def _word(value: Any) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) or '""'


def _against_defaults(run: Run) -> Block:
    defaults = {name: value for group in to_dict(TrainConfig()).values() for name, value in group.items()}
    rows = tuple(
        (_flag(name), Cell(_word(_plain(defaults.get(name)))), _shown(fact))
        for name, fact in _settings(run).items()
        if name not in _PLACES and fact.value != _plain(defaults.get(name))
    )
    if not rows:
        return text(f"Every setting is the default of eco_llm {__version__}.")
    caption = f"Settings that differ from the defaults of eco_llm {__version__}"
    return Table(caption, ("setting", "default", "this run"), rows, numeric=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _between(runs: Sequence[Run]) -> Block:
    settings = [_settings(run) for run in runs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    rows = []
    for name in names:
        facts = [one.get(name) for one in settings]
        if name not in _PLACES and any(_value(f) != _value(facts[0]) for f in facts):
            rows.append((_flag(name), *(_shown(f) for f in facts)))
    for label, facts in _code_of(runs).items():
        if any(_value(f) != _value(facts[0]) for f in facts):
            rows.append((Cell(label), *(_shown(f) for f in facts)))
    if not rows:
        return text("No setting, and no version of the code, differs between these runs.")
    return Table("What differs between the runs", ("", *(run.label for run in runs)), tuple(rows), numeric=False)


def _value(fact: Fact | None) -> Any:
    return None if fact is None else fact.value


def _code_of(runs: Sequence[Run]) -> dict[str, list[Fact | None]]:
    """Code and machine, as far as each run says."""
    found: dict[str, list[Fact | None]] = {}
    for label, path in {
        "code: commit": ("commit",),
        "code: SHA-256 of the package": ("source_sha256",),
        "GPU": ("gpu", "name"),
        "CPU": ("cpu", "model"),
    }.items():
        places = [run.environment for run in runs]
        found[label] = [place[0].at(*place[1], *path) if place else None for place in places]
    for key in (
        "device",
        "compute_dtype",
        "torch_compile",
        "cuda_graph",
        "kernels",
        "torch",
        "parameters",
        "data_fingerprint",
    ):
        found[f"resolved: {key}"] = [run[CONFIG].at("resolved", key) for run in runs]
    return found


def _resumes(run: Run) -> list[Block]:
    rows = []
    resumed = run[CONFIG].data.get("resumed")
    for i, entry in enumerate(resumed if isinstance(resumed, list) else []):
        if not isinstance(entry, dict):
            continue
        changed = entry.get("changed")
        what = [
            f"--{name.replace('_', '-')} {_word(pair[0])} → {_word(pair[1])}"
            for name, pair in (changed.items() if isinstance(changed, dict) else ())
            if isinstance(pair, list) and len(pair) == 2
        ]
        step, date = run[CONFIG].at("resumed", i, "step"), run[CONFIG].at("resumed", i, "date")
        rows.append((_shown(date), _shown(step), Cell(clean("; ".join(what)) or "nothing")))
    if not rows:
        return []
    caption = f"Times that {run.label} was resumed"
    return [Table(caption, ("date", "after step", "changed"), tuple(rows), numeric=False)]


def commands(runs: Sequence[Run]) -> Section:
    """The command lines as they were typed, each with its file."""
    blocks: list[Block] = []
    for run in runs:
        blocks += commands_of(run)
        file = run[CONFIG]
        if file.problem:
            blocks += [absent(file)] if run.trained else []
            continue
        resumed = file.data.get("resumed")
        starts = [("started",), *(("resumed", i) for i in range(len(resumed) if isinstance(resumed, list) else 0))]
        for where in starts:
            fact = file.at(*where, "command")
            if fact is not None:
                source = dataclasses.replace(fact.source, label=f"{run.label}: {CONFIG}")
                blocks.append(Code(_typed(fact.value), source))
    if not any(isinstance(block, Code) for block in blocks):
        blocks.append(text("No file says which command was run.", kind="missing"))
    return Section("commands", "Benchmark commands used", blocks)


def _typed(command: Any) -> str:
    """One shell line; the program by the name that people type, whatever file started it."""
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        return clean(command, 4000)
    line = command_line(command)
    program, _, rest = line.partition(" ")
    if program.strip("'") in ("__main__.py", "main.py", "train_sigma.py"):
        line = f"eco_train {rest}"
    return clean(line, 4000)
