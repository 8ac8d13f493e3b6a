"""Arguments files: `@file` and `--args-file PATH` become the flags written in them.

A file holds one or more flags a line. `#` starts a comment at the beginning of a word, quotes keep spaces
together, backslashes are literal (Windows paths), and `@other` inside a file is read relative to that file.
Expansion happens in place, so a flag that comes later overrides one from the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from eco_llm.errors import UserError

_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_QUOTED = re.compile(r'"([^"]*)"|' + r"'([^']*)'")
_MAX_DEPTH = 16


def expand(tokens: Iterable[str]) -> list[str]:
    """Replace every `@file`, `--args-file PATH` and `--args-file=PATH` by the file's flags.

    A value that begins with `@` is written `--flag=@value`.

    Raises:
        UserError: a file is missing, unreadable, not UTF-8, has an unbalanced quote, or includes itself.
    """
    return _expand(list(tokens), base=Path(), including=())


def expand_line(line: str, what: str) -> list[str]:
    """The flags written in one line of text, as if it were a line of a file; `what` names it in an error."""
    return expand(_split(line, what))


def _expand(tokens: list[str], base: Path, including: tuple[Path, ...]) -> list[str]:
    expanded: list[str] = []
    waiting = iter(tokens)
    for token in waiting:
        if token == "--args-file":
            name = next(waiting, "")
        elif token.startswith("--args-file="):
            name = token.partition("=")[2]
        elif token.startswith("@") and len(token) > 1:
            name = token[1:]
        else:
            expanded.append(token)
            continue
        if not name:
            raise UserError("--args-file needs a file name")
        path = base / Path(name).expanduser()
        expanded += _expand(_read(path, including), path.parent, (*including, path.resolve()))
    return expanded


def _read(path: Path, including: tuple[Path, ...]) -> list[str]:
    if path.resolve() in including or len(including) >= _MAX_DEPTH:
        raise UserError(f"arguments file {path} includes itself")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors add the mark
    except FileNotFoundError:
        raise UserError(
            f"arguments file {path} does not exist (a value that begins with @ is written --flag=@value)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"arguments file {path} cannot be read: {reason}") from None
    return [word for number, line in enumerate(text.splitlines(), 1) for word in _split(line, f"{path}:{number}")]


def _split(line: str, where: str) -> list[str]:
    words: list[str] = []
    end = 0
    while end < len(line):
        if line[end].isspace():
            end += 1
        elif line[end] == "#":
            break
        else:
            match = _WORD.match(line, end)
            end = match.end() if match else end
            if match is None or line[end : end + 1] in ('"', "'"):  # a word stops at a quote only if it never closes
                raise UserError(f"{where}: unbalanced quote")
            words.append(_QUOTED.sub(lambda m: m.group(1) or m.group(2) or "", match.group()))
    return words
