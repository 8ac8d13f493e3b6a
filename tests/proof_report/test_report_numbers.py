"""Every number of a report is in the file, and at the place, that it links to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from page_reader import Page

from eco_llm.proof.report import write_report
from eco_llm.proof.report.document import Fact, Source
from eco_llm.proof.report.numbers import NONE, change, show, significant, unit_of

Runs = Callable[..., list[Path]]
_SCALES = (1.0, 1e3, 1e6, 2.0**-30)


def look_up(folder: Path, href: str, what: str) -> Any:
    """What stands at an address, read by other code than the report's."""
    name, _, where = href.partition("#")
    file = (folder / unquote(name)).resolve()
    assert file.is_file(), href
    if not where:
        return None
    where = unquote(where)
    if where.startswith("/"):
        value = json.loads(file.read_text(encoding="utf-8"))
        for part in where[1:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value
    first, last = re.fullmatch(r"L(\d+)(?:-L(\d+))?", where).group(1, 2)  # type: ignore[union-attr]
    lines = file.read_text(encoding="utf-8").split("\n")[int(first) - 1 : int(last or first)]
    assert lines
    aggregated = re.fullmatch(r"(median|mean|min|max) of (\w+), ([\d,]+) rows", what)
    if aggregated is None:
        return json.loads(lines[0]).get(what) if len(lines) == 1 and what else None
    how, key, rows = aggregated.groups()
    records = [r for r in map(json.loads, lines) if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]
    if key.endswith("_s"):  # a profiler slows the steps that it traces
        records = [r for r in records if "traced" not in r] or records
    values = [r[key] for r in records]
    assert len(values) == int(rows.replace(",", ""))
    return float(getattr(np, how)(values))


def leading_number(text: str) -> tuple[float, float] | None:
    """(number, half a unit of its last digit) at the beginning of a text."""
    found = re.match(r"([-+]?[\d,]+)(\.\d+)?(e[-+]\d+)?(?![\w/-])", text)
    if not found:
        return None
    size = 10.0 ** int((found[3] or "e0")[1:])
    return float(found[0].replace(",", "")), 0.5001 * size * 10.0 ** -len((found[2] or ".")[1:])


def cited(title: str) -> list[tuple[str, float | None]]:
    """(what, unrounded value) of every source in a tooltip."""
    lines = [line for line in title.split("\n") if line != "computed from"]
    return [
        (m["what"] or "", None if m["value"] is None else float(m["value"]))
        for m in (re.fullmatch(r".*?(?: → (?P<what>.*?))?(?: = (?P<value>\S+))?", line) for line in lines)
        if m
    ]


@pytest.mark.parametrize("names", [("before",), ("before", "after"), ("died",), ("died", "before", "after")])
def test_every_number_is_where_its_link_says(runs: Runs, names: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "out"
    write_report(runs(*names), out)
    anchors = Page((out / "report.html").read_text(encoding="utf-8")).root.all("a")
    checked = computed = 0
    for anchor in anchors:
        href, title = anchor.attrs["href"] or "", anchor.attrs.get("title") or ""
        if href.startswith("#"):
            continue
        sources = cited(title)
        found = look_up(out, href, sources[0][0])
        value, number = sources[0][1], leading_number(anchor.words())
        if value is None or number is None:
            continue
        shown, rounding = number
        if isinstance(found, (int, float)):
            assert found == pytest.approx(value, rel=1e-12), (href, title)
        if title.startswith("computed from"):
            computed += 1
            if anchor.words().endswith("%") and len(sources) == 2 and anchor.words()[0] in "+-":
                before, after = sources[1][1], sources[0][1]
                assert before is not None
                assert after is not None
                assert shown == pytest.approx(100 * (after - before) / abs(before), abs=rounding)
        elif "UTC" not in anchor.words():
            checked += 1
            near = [abs(value * scale - shown) <= rounding for scale in _SCALES]
            assert any(near), (anchor.words(), title)
    assert checked > 50
    assert computed > 5 or len(names) == 1


@pytest.mark.parametrize("names", [("before",), ("before", "after"), ("died",)])
def test_every_link_of_the_markdown_resolves(runs: Runs, names: tuple[str, ...]) -> None:
    paths = runs(*names)
    markdown = write_report(paths)[0].read_text(encoding="utf-8")
    markdown = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.M | re.S)  # a traceback may hold anything
    links = re.findall(r"(?<!\\)\]\(([^)\s]+)\)", markdown)
    assert len(links) > 50
    for href in links:
        look_up(paths[0], href, "")


def test_both_files_say_the_same_numbers(runs: Runs) -> None:
    """Each number of the page's tables is in the Markdown, too."""
    markdown, page = (p.read_text(encoding="utf-8") for p in write_report(runs("before", "after")))
    numbers = [c.words() for c in Page(page).root.all("td") if leading_number(c.words()) is not None]
    assert len(numbers) > 200
    assert [n for n in numbers if n not in markdown.replace("\\", "")] == []


@pytest.mark.parametrize(
    ("key", "value", "shown", "unit"),
    [
        ("avg_core_tokens_per_s", 152.1569, "152.16", "tokens/s"),
        ("core_tokens_per_s", 1234567.8, "1,234,568", "tokens/s"),
        ("avg_step_time_s", 13.4598, "13.46", "s"),
        ("phase_forward_s", 0.0158765, "15.88", "ms"),
        ("phase_zero_grad_s", 1.23456e-5, "12.35", "µs"),
        ("percent", 89.1912, "89.19", "%"),
        ("weights_bytes", 2**30, "1.000", "GiB"),
        ("loss", 2.71828, "2.7183", "nats/token"),
        ("c3o_foreach_groups", 4.0, "4", ""),
        ("lr", 3e-5, "3.00e-05", ""),
        ("loss", math.nan, "nan", "nats/token"),
        ("tokens", 0.0, "0", ""),
    ],
)
def test_numbers_are_shown_in_units_people_read(key: str, value: float, shown: str, unit: str) -> None:
    chosen = unit_of(key, [value])
    assert (show(value, chosen), chosen.name) == (shown, unit)


def test_a_row_has_one_unit() -> None:
    assert unit_of("step_time_s", [0.5e-3, 2.0, None, math.inf]).name == "s"
    assert show(0.0005, unit_of("step_time_s", [0.0005, 2.0])) == "0.0005000"


def test_significant_digits() -> None:
    assert [significant(v, 4) for v in (-0.0, 999.96, 123456.7, 1e20, -1.5e-7)] == [
        "0", "1,000.0", "123,457", "1.000e+20", "-1.500e-07",
    ]  # fmt: skip


def test_changes_are_against_the_first_and_never_made_up() -> None:
    def fact(value: Any) -> Fact:
        return Fact(value, Source(Path("f"), "f"))

    assert change(fact(152.1569), fact(173.2904)).text == "+13.889%"  # the author's own figure
    assert change(fact(180.7208), fact(198.2186)).text == "+9.682%"
    assert change(fact(-2.0), fact(-1.0)).text == "+50.000%"
    assert change(fact(5), fact(5)).text == "0%"
    assert change(fact(1e9), fact(1e9 + 1)).text == "≈ 0%"
    for nothing in (
        (None, fact(1)),
        (fact(1), None),
        (fact(0), fact(1)),
        (fact(1), fact("nan")),
        (fact(True), fact(2)),
    ):
        assert change(*nothing).text == NONE
