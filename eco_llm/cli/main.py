"""`eco_train`: expand arguments files, pick the command, turn outcomes into exit codes.

Nothing heavy is imported here, so that `--help` and every refusal are instant; each command imports what it
needs after its arguments have been accepted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from eco_llm.cli.args_file import expand
from eco_llm.errors import UserError
from eco_llm.version import __version__

# name → (module with `run(args) -> exit code`, one line of help)
COMMANDS = {
    "train": ("eco_llm.cli.train", "train a SigmaLLM (the default command)"),
    "sample": ("eco_llm.cli.sample", "continue a prompt with a trained model"),
    "evaluate": ("eco_llm.cli.evaluate", "validation loss and bits per byte of a checkpoint"),
    "data": ("eco_llm.cli.data", "prepare or inspect a tokenised corpus"),
    "plan": ("eco_llm.cli.plan", "what fits into a GPU's memory, estimated without one"),
    "report": ("eco_llm.cli.report", "PROOF_OF_EVOLUTION.md and report.html from run directories"),
    "watch": ("eco_llm.cli.watch", "the report of a run, live in a browser on this machine"),
    "sweep": ("eco_llm.cli.sweep", "measure every value of a flag: what fits, what is fastest"),
    "compare": ("eco_llm.cli.compare", "measure two settings or revisions against each other: faster or not"),
    "doctor": ("eco_llm.cli.doctor", "check that this machine can train, and say what to fix"),
}

# what commands start of themselves; nobody types them
INTERNAL = {"_turns": "eco_llm.cli.turns"}

EXIT_CODES = """exit codes:
  0 done    1 crash (see errors/ in the run)    2 bad input    3 out of memory
  4 stopped: non-finite loss    5 compare: the two sides compute different things, no verdict
  129, 130, 143 interrupted (what was trained is saved)"""


def _overview() -> str:
    lines = ["usage: eco_train [COMMAND] [@FILE] [--args-file FILE] [FLAGS]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    lines += [
        "",
        "examples:",
        "  eco_train @presets/quickstart_cpu.txt            a small model on any machine, in minutes",
        "  eco_train @train_sigma_args.txt --steps 2000     the default GPU profile; later flags win",
        "  eco_train sample --run runs/quickstart_cpu --prompt 'import os'",
        "  eco_train COMMAND --help                         every flag of a command",
        "",
        EXIT_CODES,
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (see EXIT_CODES)."""
    _write_anything()
    try:
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
        except SystemExit as end:  # a command's --help was printed, or rich found that the reader has left
            code = 0 if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
        sys.stdout.flush()  # here, where a reader that has left can still be noticed in peace
        return code
    except UserError as error:
        print(f"eco_train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `eco_train sample | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes as it ends
        return 0
    except KeyboardInterrupt:
        print("eco_train: interrupted", file=sys.stderr)
        return 130


def _write_anything() -> None:
    """Escape what an output's encoding lacks: a redirected Windows console (cp1252) has no arrows, LC_ALL=C no ×."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _bind(argv: Sequence[str], *flags: str) -> list[str]:
    """`--a VALUE` as `--a=VALUE`, for flags whose value may itself begin with @ or -- (compare's sides)."""
    bound: list[str] = []
    for word in argv:
        if bound and bound[-1] in flags:
            bound[-1] += f"={word}"
        else:
            bound.append(word)
    return bound


def _run(argv: Sequence[str]) -> int:
    args = expand(_bind(argv, "--a", "--b"))
    if args[:1] in (["--help"], ["-h"], ["help"]):
        print(_overview())
        return 0
    if args[:1] == ["--version"]:
        print(f"eco_train {__version__}")
        return 0
    command = "train"
    if args and not args[0].startswith("-"):
        command, *args = args
        if command in INTERNAL:
            return int(import_module(INTERNAL[command]).run(args))
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; commands are {', '.join(COMMANDS)}")
    code: int = import_module(COMMANDS[command][0]).run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
