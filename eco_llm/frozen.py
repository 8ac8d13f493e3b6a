"""What only the frozen executable needs: it is its own `sys.executable`, so it must do a Python interpreter's work.

Programs start `[sys.executable, …]` to have a second Python: TorchInductor its compile workers and its check of what
the processor can do, `torchrun` its workers, `multiprocessing` its children, `eco_train doctor` its probes, `sweep` and
`compare` their runs. In the frozen build all of those start the executable itself, which would otherwise take the words
for flags of `eco_train train`. So there, and only there, it first looks whether its words are an interpreter's:

    eco_train [-u] [-X OPTION] [-W FILTER] [-B -E -I -O -P -S -q -s -v] {-c CODE | -m MODULE | FILE.py} [ARGUMENTS]

Anything else is a command of eco_train, none of which begins with one of these.
"""

from __future__ import annotations

import io
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SWITCHES = frozenset("uBEIOPSqsvdx")  # of the interpreter, without a value; all but -u mean nothing here
_VALUED = ("-X", "-W")


class Program(NamedTuple):
    """What an interpreter was asked to run."""

    kind: str
    """`-c`, `-m` or `file`."""
    what: str
    """Code, a module's name, or a path."""
    arguments: list[str]
    unbuffered: bool


def is_frozen() -> bool:
    """Whether this process is the executable that `make exe` builds."""
    return bool(getattr(sys, "frozen", False))


def installing(command: str) -> str:
    """How to have a package that is missing: `command`; into an executable nothing can be installed."""
    if is_frozen():
        return f"this executable was built without it; use eco_train from Python, and there {command}"
    return command


def interpreter_call(words: Sequence[str]) -> Program | None:
    """The program that `words` (without the executable) ask an interpreter for; None if they are eco_train's own."""
    waiting = list(words)
    unbuffered = False
    while waiting:
        word = waiting.pop(0)
        if word in ("-c", "-m"):
            return Program(word, waiting[0], waiting[1:], unbuffered) if waiting else None
        if word in _VALUED:
            del waiting[:1]
        elif word.startswith(_VALUED):
            continue
        elif len(word) > 1 and word[0] == "-" and _SWITCHES.issuperset(word[1:]):
            unbuffered |= "u" in word
        elif word.endswith(".py") and Path(word).is_file():
            return Program("file", word, waiting, unbuffered)
        else:
            return None
    return None


def stand_in_for_python() -> None:
    """Return if the executable was started as eco_train; run the program and exit if it was started as Python."""
    _clean_environment()
    import multiprocessing  # here and below, not above: `eco_train --help` is instant

    multiprocessing.freeze_support()  # children of multiprocessing end here
    program = interpreter_call(sys.argv[1:])
    if program is not None:
        _run(program)
        sys.exit(0)


def _clean_environment() -> None:
    """Give other programs (compiler, linker, git) the user's search path for libraries, not the build's own.

    The bootloader puts the build's folder into LD_LIBRARY_PATH before Python starts, and would leave that out in a
    child that it takes for a part of this process; the second variable makes it treat every child as a fresh start.
    """
    before = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
    if before:
        os.environ["LD_LIBRARY_PATH"] = before
    else:
        os.environ.pop("LD_LIBRARY_PATH", None)
    os.environ["PYINSTALLER_RESET_ENVIRONMENT"] = "1"
    commit = Path(getattr(sys, "_MEIPASS", "")) / "commit.txt"
    if commit.is_file():  # what the build was made from, for evidence files
        os.environ.setdefault("ECO_LLM_COMMIT", commit.read_text(encoding="utf-8"))


def _run(program: Program) -> None:
    """Run it as `__main__`, as the interpreter would."""
    import runpy
    import sysconfig

    # Modules of the standard library that nothing in the build imports, but a user's file may.
    sys.path.append(sysconfig.get_path("stdlib"))
    if program.unbuffered:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(write_through=True)
    if program.kind == "-m":
        sys.argv = [program.what, *program.arguments]
        runpy.run_module(program.what, run_name="__main__", alter_sys=True)
    elif program.kind == "-c":
        sys.argv = ["-c", *program.arguments]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main  # where pickle looks for what the code defines
        exec(compile(program.what, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [program.what, *program.arguments]
        sys.path.insert(0, str(Path(program.what).resolve().parent))
        runpy.run_path(program.what, run_name="__main__")
