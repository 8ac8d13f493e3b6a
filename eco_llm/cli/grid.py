"""Flags with comma lists become a grid: `--batch-size 2,4 --mamba-chunk 64,128` is four points."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any, get_type_hints

from eco_llm.config import TrainConfig, flag_of
from eco_llm.errors import UserError

# Flags whose value is free text or several words (these are _SEVERAL), in which a comma is a comma.
_TEXT = frozenset({"data", "data_cache", "output_dir", "sample_prompt", "text_field"})
_SEVERAL = frozenset({"data"})
_SWITCH = {"on": True, "off": False}


def split(words: Sequence[str], fixed: Sequence[str] = ()) -> tuple[list[str], dict[str, list[str]]]:
    """(the words without the listed flags, {field name: its values as typed}).

    As everywhere, the last of two equal flags wins, so a list is no list if the flag comes again with one value.

    Args:
        fixed: fields that the caller sets itself and that cannot be listed.

    Raises:
        UserError: a list with an empty or repeated value, a flag that cannot be listed, or no list at all.
    """
    hints = _fields()
    last, place = _read(words, hints)
    axes = {field: _values(field, v, hints[field]) for field, v in last.items() if "," in v and field not in _TEXT}
    for field in axes:
        if field in fixed:
            raise UserError(f"{flag_of(field)} cannot be a list: each point sets it itself")
    if not axes:
        raise UserError("nothing to sweep: give one or more flags a comma list, say --batch-size 2,4,6,8")
    return [word for i, word in enumerate(words) if place.get(i) not in axes], axes


def without(words: Sequence[str], fields: Collection[str]) -> list[str]:
    """The words without the flags of these fields (none of several words) and their values."""
    _, place = _read(words, _fields())
    return [word for i, word in enumerate(words) if place.get(i) not in fields]


def _read(words: Sequence[str], hints: dict[str, Any]) -> tuple[dict[str, str], dict[int, str]]:
    """({field: its last value as typed, where it has one}, {index of a word: the field to whose flag it belongs})."""
    last: dict[str, str] = {}
    place: dict[int, str] = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        field = name[2:].replace("-", "_") if name.startswith("--") else ""
        if field.startswith("no_") and field[3:] in hints:
            last.pop(field[3:], None)
            place[i] = field[3:]
        if field not in hints:
            continue
        place[i] = field
        if not equals and i + 1 < len(words) and not words[i + 1].startswith("--") and field not in _SEVERAL:
            value = words[i + 1]
            if hints[field] is not bool or "," in value:
                place[i + 1] = field
        last[field] = value
    return last, place


def points(axes: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination of values, the last flag's changing fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def flags(point: dict[str, str]) -> list[str]:
    """The words that set a point."""
    hints = _fields()
    words = []
    for field, value in point.items():
        if hints[field] is bool:
            words.append(flag_of(field) if _SWITCH[value] else flag_of(f"no_{field}"))
        else:
            words += [f"{flag_of(field)}={value}"]
    return words


def _values(field: str, text: str, hint: Any) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if "" in values:
        raise UserError(f"{flag_of(field)} {text}: a value of the list is empty")
    seen: dict[Any, str] = {}
    for value in values:
        parsed = _parsed(value, hint)
        if parsed in seen:
            same = "" if seen[parsed] == value else f", as {seen[parsed]}"
            raise UserError(f"{flag_of(field)} {text}: {value} is there twice{same}")
        seen[parsed] = value
    if hint is bool and (wrong := [v for v in values if v not in _SWITCH]):
        raise UserError(f"{flag_of(field)} {wrong[0]!r} is not one of on, off")
    return values


def _parsed(value: str, hint: Any) -> Any:
    """A number as one, so that 2 is 02 and 1e-3 is 0.001; all else, and what is no number, as typed."""
    try:
        return hint(value) if hint in (int, float) else value
    except ValueError:
        return value  # refused with its name when it is parsed


def _fields() -> dict[str, Any]:
    """{field name: type} of everything `eco_train train` can be told."""
    groups = get_type_hints(TrainConfig)
    return {
        f.name: get_type_hints(groups[group.name])[f.name]
        for group in dataclasses.fields(TrainConfig)
        for f in dataclasses.fields(groups[group.name])
    }
