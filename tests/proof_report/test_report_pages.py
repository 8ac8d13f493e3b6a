"""The two files as documents: the same bytes from the same files, well formed, accessible, safe, small, quick."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import NASTY
from page_reader import Page

from eco_llm.proof.report import charts, markdown, write_report
from eco_llm.proof.report.charts import thin, ticks
from eco_llm.proof.report.document import LineChart, Series, Table, clean

Runs = Callable[..., list[Path]]

SECTIONS = (
    "Summary",
    "What was changed",
    "Benchmark commands used",
    "Loss and throughput",
    "Measured results",
    "Quantified improvement",
    "Current dominant bottlenecks",
    "Memory",
    "Incidents",
    "Hardware and versions",
    "Notes",
)


def test_the_same_files_give_the_same_bytes(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = runs("before", "after", "died")
    first = [path.read_bytes() for path in write_report(paths)]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert [path.read_bytes() for path in write_report(paths)] == first
    assert b"\r" not in first[0] + first[1]


def test_the_baselines_own_report_is_left_alone(runs: Runs, tmp_path: Path) -> None:
    paths = runs("before", "after")
    own = [path.read_bytes() for path in write_report(paths[:1])]
    written = write_report(paths)
    assert [path.parent for path in written] == [paths[1], paths[1]]
    assert [(paths[0] / path.name).read_bytes() for path in written] == own
    assert [path.parent for path in write_report(paths, tmp_path / "proof")] == [tmp_path / "proof"] * 2


def test_one_row_is_not_called_a_median(runs: Runs) -> None:
    (run,) = runs("before")
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(rows[0])
    text = write_report([run])[0].read_text(encoding="utf-8")
    assert "Step 1 alone of before." in text
    assert "1–1" not in text
    assert "tail median" not in text
    assert "the only row" in text
    (run / "metrics.jsonl").write_bytes(b"".join(rows[:12]))
    assert "Medians over steps 8–12 of before." in write_report([run])[0].read_text(encoding="utf-8")


def test_the_sections_and_the_date_come_from_the_evidence(runs: Runs) -> None:
    paths = runs("before", "after")
    text = write_report(paths)[0].read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == SECTIONS
    end = json.loads((paths[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["ended_at"]
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(end))
    assert f"Date: [{shown}](metrics.jsonl#L60)" in text


def test_what_changed_is_what_differs_between_the_configs(runs: Runs) -> None:
    text = write_report(runs("before", "after"))[0].read_text(encoding="utf-8")
    table = text[text.index("### What differs between the runs") : text.index("## Benchmark commands used")]
    rows = re.findall(r"^\| `(--[\w-]+)` \| \[(.*?)\].* \| \[(.*?)\]", table, re.M)
    assert rows == [("--save-interval", "500", "30"), ("--optimizer", "c3o", "adamw")]


@pytest.mark.parametrize("names", [("before",), ("before", "after"), ("died",), ("before", "after", "died")])
def test_the_page_is_well_formed_and_accessible(runs: Runs, names: tuple[str, ...]) -> None:
    page = Page(write_report(runs(*names))[1].read_text(encoding="utf-8"))
    assert page.complaints == []
    assert len(page.root.all("svg")) >= 5
    for chart in (n for n in page.root.all("figure") if n.all("svg")):
        assert chart.all("table"), "a chart without its numbers as a table"


def test_the_reader_of_pages_finds_faults(runs: Runs) -> None:
    """The check above can fail."""
    good = write_report(runs("before"))[1].read_text(encoding="utf-8")
    for whole, broken, complaint in (
        ("</table>", "</div>", "</div> where <table> is open"),
        ("<caption><span>", "<caption><span hidden></span></caption><i>", "</span> where <i> is open"),
        ('<th scope="row">', "<th>", "header cell without scope"),
        ('<html lang="en">', "<html>", "no language"),
        ('id="summary"', 'id="changed"', "id twice: changed"),
        (' role="img"', "", "chart without a role and a name"),
        (' tabindex="0"', "", "a box that scrolls cannot be reached by keyboard"),
        ("</td></tr>", "</td><td>1</td></tr>", "rows of different lengths"),
    ):
        assert whole in good
        complaints = Page(good.replace(whole, broken, 1)).complaints
        assert any(complaint in c for c in complaints), (complaint, complaints)


def test_nothing_is_fetched_and_no_script_is_needed(runs: Runs) -> None:
    html = write_report(runs("before"))[1].read_text(encoding="utf-8")
    page = Page(html)
    addresses = re.findall(r"""(?:src|href|action|data)=["']?([^"' >]+)""", html) + re.findall(r"url\(([^)]*)\)", html)
    assert [a for a in addresses if re.match(r"(?:[a-z]+:)?//", a)] == []
    assert "@import" not in html
    policy = next(m.attrs["content"] for m in page.root.all("meta") if "http-equiv" in m.attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_text_from_files_is_shown_and_never_obeyed(runs: Runs) -> None:
    """Names, settings, messages and keys may hold HTML, Markdown and control characters."""
    (run,) = runs("died")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["config"]["training"]["sample_prompt"] = NASTY
    config["started"]["command"] += ["--sample-prompt", NASTY, "```\n# heading"]
    config["resolved"]["kernels"] = NASTY
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({"step": 99, "loss": 1.0, NASTY: 5.0}) + "\n")
    (run / "perf" / "sweep.json").write_text(json.dumps({"results": [{NASTY: NASTY}], NASTY: NASTY}), encoding="utf-8")
    named = run.rename(run.with_name("a<b>&'\"|`x[1](y)"))
    md, html = (path.read_text(encoding="utf-8") for path in write_report([named]))
    page = Page(html)
    assert page.complaints == []
    scripts = [s.words() for s in page.root.all("script") if s.attrs.get("type") != "application/json"]
    assert len(scripts) == 1
    assert "alert" not in scripts[0]
    assert page.root.words().count("<script>alert(1)</script>") >= 5
    assert "\x1b" not in html + md
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", md, flags=re.M | re.S)  # fenced blocks show anything as it is
    outside = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", outside)
    assert "<script" not in outside
    assert "[link](x)" not in outside


def test_a_command_cannot_end_its_fence() -> None:
    from eco_llm.proof.report.document import Cell, Code, Document, Section

    document = Document("t", (), Cell("d"), (Section("s", "S", [Code("```\n# out\n````")]),))
    text = markdown.render(document, lambda source: "")
    assert "\n`````text\n```\n# out\n````\n`````\n" in text


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_rendered_quickly_and_small(runs: Runs, tmp_path: Path) -> None:
    (run,) = runs("before")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as f:
        for i in range(100_000):
            row = rows[i % len(rows)] | {"step": i + 1, "loss": 2 + 6 * math.exp(-i / 2e4) + rng.gauss(0, 0.1)}
            f.write(json.dumps(row | ({"loss": 0.125} if i == 77_777 else {})) + "\n")
    begin = time.process_time()  # not the wall's: other tests run beside this one
    _, page = write_report([run])
    assert time.process_time() - begin < 5.0
    assert page.stat().st_size < 2_000_000
    text = page.read_text(encoding="utf-8")
    assert "min of loss, 10,000 rows = 0.125" in text  # the one odd loss is in the table …
    y = [float(v) for v in re.findall(r" (\d+(?:\.\d)?)(?=[LZ])", re.findall(r'class="band h0" d="([^"]+)"', text)[0])]
    assert max(y) > 380  # … and in the drawing, near the bottom


# -- drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 400, 401, 999, 100_000])
def test_thinning_keeps_every_extreme(n: int) -> None:
    y = np.random.default_rng(n).standard_normal(n)
    drawn = thin(np.arange(n, dtype=float), y)
    assert drawn.x.size <= 400
    low, high = (drawn.y, drawn.y) if drawn.low is None or drawn.high is None else (drawn.low, drawn.high)
    assert (low.min(), high.max()) == (y.min(), y.max())
    assert ((low <= drawn.y) & (drawn.y <= high)).all()
    assert (
        len(set(np.diff(drawn.x)[:-1])) <= 1
    )  # equal stretches: else one part of a run would look calmer than another


@pytest.mark.parametrize(
    "span", [(0.0, 1.0), (1.0, 100_000.0), (-3.0, 7.5), (2.1e-7, 9.9e-7), (5.0, 5.0), (0.0, 8103.0)]
)
def test_ticks_are_round_and_inside(span: tuple[float, float]) -> None:
    marks = ticks(*span)
    assert 1 <= len(marks) <= 9
    assert all(span[0] - 1e-9 <= m <= span[1] + 1e-9 for m in marks)
    if span[0] < span[1]:
        assert len(marks) >= 3


def chart(*ys: list[float], from_zero: bool = False) -> LineChart:
    series = tuple(Series(f"s{i}", np.arange(len(y), dtype=float), np.array(y), i) for i, y in enumerate(ys))
    return LineChart("t", "d", "step", "u", series, Table("c", ("",), ()), from_zero)


@pytest.mark.parametrize(
    "ys", [[[1.0]], [[0.0]], [[5.0] * 10], [[-1.0, -1.0]], [[1e300, -1e300]], [[0.0] * 4, [1e-12] * 3]]
)
def test_any_curve_can_be_drawn(ys: list[list[float]]) -> None:
    for from_zero in (False, True):
        drawn = charts.line_chart(chart(*ys, from_zero=from_zero))
        assert "nan" not in drawn.shapes
        assert "inf" not in drawn.shapes
        assert drawn.x_ticks
        assert drawn.y_ticks
        assert all(0 <= tick.at <= 100 for tick in drawn.y_ticks)


def test_one_wild_value_does_not_flatten_the_curve_and_is_named() -> None:
    drawn = charts.line_chart(chart([2.0 + 0.01 * i for i in range(200)] + [1e9]))
    assert float(drawn.points["top"]) < 10  # type: ignore[arg-type]
    assert drawn.note == f"1 points above {drawn.points['top']:.4g} are off the chart; the largest is 1,000,000,000."


def test_runs_with_steps_of_different_sizes_are_drawn_over_tokens(runs: Runs) -> None:
    before, after = runs("before", "after")
    log = after / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    log.write_text("".join(json.dumps(row | {"tokens": 2 * row["tokens"]}) + "\n" for row in rows), encoding="utf-8")
    html = write_report([before, after])[1].read_text(encoding="utf-8")
    points = json.loads(Page(html).root.all("script")[0].words())
    assert points["x"] == "tokens"
    assert [s["x"][-1] for s in points["series"]] == [2880, 2880, 5760, 5760]


def test_clean_spells_out_what_cannot_be_seen() -> None:
    assert clean("a\x00b\x1b[1m\n c\udcff") == "a\\x00b\\x1b[1m c\\udcff"
    assert clean("x" * 500, 10) == "x" * 9 + "…"
    assert clean("a\n\tb", lines=True) == "a\n\tb"
    assert clean(True) == "yes"
