"""From words to configuration: tyro over frozen dataclasses, with one-line errors.

tyro builds the flags, their types and the grouped help; its boxed error panels are replaced by one `UserError`
line, because a line can be read in a log, matched by a script and quoted in a bug report.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from tyro import (
    _errors as tyro_errors,  # tyro >= 1.0.17, < 1.1 (pyproject); tests/cli/test_parse.py guards it
)

from eco_llm.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], *, prog: str, description: str | None = None) -> T:
    """Build the dataclass `cls` from flags; field names are flag names, whatever group they are in.

    Raises:
        UserError: an unknown flag (with the nearest known one), a missing or mistyped value.
        SystemExit: `--help` was asked for and printed.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        raise UserError(_one_line(event, cls))

    with tyro_errors.on_parse_error(refuse):
        flat: Any = Annotated[cls, tyro.conf.OmitArgPrefixes]
        result: T = tyro.cli(flat, args=_spell_out_switches(args), prog=prog, description=description)
        return result


def _spell_out_switches(args: Sequence[str]) -> list[str]:
    """`--torch-compile` and `--no-torch-compile` are the two ends of a three-way flag whose default is auto."""
    spelled: list[str] = []
    for i, word in enumerate(args):
        if word in ("--no-torch-compile", "--no_torch_compile"):
            spelled += ["--torch-compile", "off"]
        elif word in ("--torch-compile", "--torch_compile"):
            has_value = i + 1 < len(args) and not args[i + 1].startswith("-")
            spelled += [word] if has_value else [word, "on"]
        else:
            spelled.append(word)
    return spelled


def _one_line(event: tyro_errors.ParseErrorEvent, cls: type) -> str:
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return _unknown(event.tokens, cls)
    if isinstance(event, tyro_errors.InvalidChoice):
        return f"{_name(event.argument)} {event.value!r} is not one of {', '.join(event.choices)}"
    if isinstance(event, tyro_errors.BadValue):
        return f"{_name(event.argument)} needs a value"
    if isinstance(event, tyro_errors.InstantiationFailure):
        flag = _name(event.argument) if event.argument else "an argument"
        reason = " ".join(event.message.split())
        if reason.startswith("invalid literal for int()"):
            reason = f"{reason.rpartition(': ')[2]} is not a whole number"
        elif reason.startswith("could not convert string to float"):
            reason = f"{reason.rpartition(': ')[2]} is not a number"
        return f"{flag}: {reason}"
    if isinstance(event, tyro_errors.MissingArgs):
        return "missing " + ", ".join(_name(a.arg) for a in event.missing_arguments)
    return f"arguments not understood ({type(event).__name__})"  # tyro may add event kinds


def _name(argument: Any) -> str:
    return str(argument.lowered.name_or_flags[0])


def _unknown(tokens: Sequence[str], cls: type) -> str:
    flag = next((t for t in tokens if t.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {tokens[0]!r}"
    flag = flag.partition("=")[0]
    # Compared without their dashes, which all flags share and which would make any two short ones alike.
    known = [name.removeprefix("--") for name in _flags(cls)]
    near = difflib.get_close_matches(flag.replace("_", "-").lstrip("-"), known, n=1, cutoff=0.5)
    return f"unknown flag {flag}" + (f"; perhaps you meant --{near[0]}" if near else "")


def _flags(cls: type) -> list[str]:
    names: list[str] = ["--args-file"]
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            names += _flags(hints[field.name])
        else:
            flag = "--" + field.name.replace("_", "-")
            names.append(flag)
            if hints[field.name] is bool or field.name == "torch_compile":
                names.append("--no-" + flag[2:])
    return names
