"""`eco_train compare`: two settings or two revisions, in paired windows: faster, slower, or no difference shown."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from eco_llm.cli.args_file import expand_line
from eco_llm.cli.parse import parse
from eco_llm.cli.train import with_modes
from eco_llm.config import CompareConfig, TrainConfig, flatten
from eco_llm.errors import UserError
from eco_llm.outcome import NOT_COMPARABLE, Outcome

if TYPE_CHECKING:
    from eco_llm.proof.compare import Side
    from eco_llm.proof.revisions import Revision

_USAGE = """usage: eco_train compare --a "FLAGS" --b "FLAGS" [--a-rev REV] [--b-rev REV] [FLAGS FOR BOTH] [@FILE]

  eco_train compare @train_sigma_args.txt --a "--no-torch-compile" --b "--torch-compile"
  eco_train compare @train_sigma_args.txt --a-rev HEAD~1 --b-rev HEAD

Exit codes: 0 a verdict (also "no difference shown"), 5 the sides do not learn the same and there is none, 3 and 1 a
side ran out of memory or crashed, 130 and 143 stopped. Report:
OUT/perf/latest_bottleneck_fix_report.json, OUT being --output-dir.
"""


def run(args: Sequence[str]) -> int:
    """Refuse what cannot work; measure; show the verdict."""
    ours, common = _take(args)
    if {"-h", "--help"} & set(common):
        print(_USAGE)
        with contextlib.suppress(SystemExit):
            parse(CompareConfig, ["--help"], prog="eco_train compare")
        return 0
    settings = parse(CompareConfig, ours, prog="eco_train compare")
    settings.validate()
    given = {word.partition("=")[0].replace("_", "-") for word in ours}
    if not given & {"--a", "--b", "--a-rev", "--b-rev"}:
        raise UserError('nothing to compare: say what differs, with --a "FLAGS" --b "FLAGS" or --a-rev REV --b-rev REV')
    from eco_llm.proof.runs import Stopped

    try:
        with contextlib.ExitStack() as checkouts:
            return _compare(settings, common, checkouts)
    except Stopped as stop:
        return int(stop.outcome)


def _compare(settings: CompareConfig, common: list[str], checkouts: contextlib.ExitStack) -> int:
    from eco_llm.proof.compare import Comparison
    from eco_llm.proof.gate import NotComparable, check_same_learning, check_same_network, check_same_tokens
    from eco_llm.proof.revisions import Revision, turns_protocol
    from eco_llm.proof.runs import Stopped
    from eco_llm.proof.turns import PROTOCOL, RunFailed

    revisions = {
        label: Revision.find(name, f"--{label}-rev") if name else None
        for label, name in (("a", settings.a_rev), ("b", settings.b_rev))
    }
    why_not = "--separate" if settings.separate else None
    sides = []
    for label, typed in (("a", settings.a), ("b", settings.b)):
        revision, root = revisions[label], None
        if revision is not None:
            root = checkouts.enter_context(revision.checked_out())
            if turns_protocol(root) != PROTOCOL and why_not is None:
                why_not = f"revision {revision.name} cannot take turns"
        sides.append(_side(label, typed, [*common, *expand_line(typed, f"--{label}")], revision, root))
    a, b = sides
    if a.settings["output_dir"] != b.settings["output_dir"]:
        raise UserError("--output-dir is the comparison's, not a side's: name it once, outside --a and --b")
    check_same_tokens(a.settings, b.settings)
    check_same_learning(a.settings, b.settings, settings.gate_steps)
    check_same_network(a.settings, b.settings, settings.gate_tolerance)
    console, progress = _display()
    with progress as bar:
        task = bar.add_task("pairs", total=None)
        comparison = Comparison(
            Path(a.settings["output_dir"]), a, b, settings,
            warmup_steps=a.settings["perf_warmup_steps"],
            measure_steps=a.settings["perf_measure_steps"],
            why_not_in_turns=why_not,
            command=["eco_train", *sys.argv[1:]],  # as typed: an arguments file by its name
            say=lambda text: console.print(text, markup=False),
            on_pair=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
        try:
            report = comparison.run()
        except NotComparable as red:
            bar.stop()
            console.print(f"gate red: {red}", markup=False)
            return NOT_COMPARABLE
        except (KeyboardInterrupt, Stopped):
            bar.stop()
            console.print(f"interrupted; what was measured: {comparison.file}", markup=False)
            raise
        except RunFailed as failure:
            if failure.ending == "refused":
                raise UserError(f"--{failure.side}: {failure.reason}") from None
            bar.stop()
            console.print(f"no verdict: {failure}", markup=False)
            return failure.code if failure.code > 0 else int(Outcome.CRASHED)
    assert comparison.gate is not None
    _show(console, report, comparison.gate.sentence())
    console.print(f"report: {comparison.file}", markup=False)
    return 0


def _take(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words that are compare's own, all others). A side's flags are one word, whatever it begins with."""
    hints = get_type_hints(CompareConfig)
    ours: list[str] = []
    others: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or field.removeprefix("no_") not in hints:
            others.append(word)
        elif equals or field not in hints or hints[field] is bool:
            ours.append(word)
        else:
            value = next(words, "")
            ours.append(f"{name}={value}")
    return ours, others


def _side(label: str, typed: str, words: list[str], revision: Revision | None, root: Path | None) -> Side:
    """Have a side's own code read its flags.

    Raises:
        UserError: it refuses them.
    """
    from eco_llm.data.sources import check_sources
    from eco_llm.proof.compare import Side
    from eco_llm.proof.runs import Program

    if revision is None or root is None:
        config = parse(TrainConfig, words, prog="eco_train compare")
        config.validate()
        check_sources(config.data, seq_len=config.training.seq_len)
        settings = json.loads(json.dumps(flatten(with_modes(config))))
        return Side(label, typed, tuple(words), settings, Program.this())
    program = Program.of(root)
    done = program.ask(["train", *words, "--print-config"])
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"--{label}-rev {revision.name}: {reason[0].removeprefix('eco_train: error: ')}")
    settings = {k: v for group in json.loads(done.stdout).values() for k, v in group.items()}
    return Side(label, typed, tuple(words), settings, program, revision)


def _display() -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    return console, Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _show(console: Any, report: dict[str, Any], gate: str) -> None:
    from rich.table import Table

    a, b = report["a"], report["b"]
    rows = [
        ("throughput, tokens/s", "tail_throughput_tokens_per_s", ",.1f"),
        ("step, ms", "tail_step_time_s", ".3f"),
        *((f"{name}, ms", f"tail_{name}_s", ".3f") for name in ("forward", "backward", "opt_step")),
        ("peak memory, GiB", "peak_memory_gib", ".3f"),
    ]
    table = Table("median")
    for title in ("A", "B", "B - A", "%"):
        table.add_column(title, justify="right")
    for title, key, form in rows:
        if a[key] is None or b[key] is None:
            continue
        scale = 1000 if title.endswith("ms") else 1
        x, y = scale * a[key], scale * b[key]
        percent = f"{100 * (y / x - 1):+.1f}" if x else ""
        table.add_row(title, f"{x:{form}}", f"{y:{form}}", f"{y - x:+{form}}", percent)
    console.print(table)
    console.print(gate, markup=False)
    console.print(report["sentence"], markup=False)
