"""Files as runs leave them: missing, cut off, damaged, from elsewhere, or growing while they are read."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page

from eco_llm.cli.main import main
from eco_llm.proof.report import write_report
from eco_llm.proof.report.evidence import (
    BOTTLENECKS,
    COMPARISON,
    CONFIG,
    MEMORY,
    METRICS,
    SWEEP,
    WINDOW,
    WRITTEN_BY,
    open_runs,
    read_json,
)
from eco_llm.proof.report.metrics_log import MetricsLog

Runs = Callable[..., list[Path]]


def log_of(tmp_path: Path, content: bytes) -> MetricsLog:
    path = tmp_path / METRICS
    path.write_bytes(content)
    log = MetricsLog(path, METRICS)
    log.refresh()
    return log


def line(step: int, **more: object) -> bytes:
    return json.dumps({"step": step, **more}).encode() + b"\n"


def report(paths: list[Path]) -> tuple[str, str]:
    markdown, page = write_report(paths)
    return markdown.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")


# -- the log ---------------------------------------------------------------------------------------------------


def test_columns_know_their_lines(tmp_path: Path) -> None:
    log = log_of(tmp_path, line(1, loss=3.0) + line(2, loss="nan", gpu=None, name="x", on=True) + line(3, val_loss=2.5))
    loss, validation = log.column("loss"), log.column("val_loss")
    assert log.keys == ["loss", "step", "val_loss"]
    assert loss.lines.tolist() == [1, 2]
    assert np.isnan(loss.values[1])
    assert (validation.lines[0], validation.steps[0], validation.values[0]) == (3, 3.0, 2.5)
    assert log.column("never").values.size == 0
    median = log.over("loss", "median", (1, 3))
    assert median is not None
    assert (median.value, median.source.where, median.source.what) == (3.0, "L1-L3", "median of loss, 1 rows")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"step": 2, "lo\n', "not JSON"),
        (b"\n", "not JSON"),
        (b"\xff\xfe{}\n", "not UTF-8"),
        (b"\0" * 4096 + b"\n", "not JSON"),
        (b"[1, 2]\n", "no record of a step"),
        (b'{"loss": 1}\n', "no record of a step"),
        (b'{"step": null}\n', "no record of a step"),
        (b'{"step": "nan"}\n', "no record of a step"),
        (b"[" * 100_000 + b"\n", "no record of a step"),
    ],
)
def test_a_damaged_line_is_counted_and_skipped(tmp_path: Path, bad: bytes, why: str) -> None:
    log = log_of(tmp_path, line(1, loss=3.0) + bad + line(3, loss=2.0))
    assert (len(log), log.damaged, log.cut_off) == (2, [(2, why)], None)
    assert log.column("loss").lines.tolist() == [1, 3]  # lines are the file's, so that links stay right


def test_a_number_too_large_for_a_float_is_left_out(tmp_path: Path) -> None:
    log = log_of(tmp_path, b'{"step": 1, "loss": 1' + b"0" * 400 + b', "lr": 0.5}\n')
    assert (len(log), log.keys) == (1, ["lr", "step"])


def test_a_cut_off_last_line_is_named_and_read_once_it_is_whole(tmp_path: Path) -> None:
    log = log_of(tmp_path, line(1, loss=3.0) + b'{"step": 2, "loss"')
    assert (len(log), log.cut_off, log.damaged) == (1, 2, [])
    with log.path.open("ab") as f:
        f.write(b": 2.0}\n" + line(3, loss=1.0))
    log.refresh()
    assert (len(log), log.cut_off) == (3, None)
    assert log.column("loss").values.tolist() == [3.0, 2.0, 1.0]


def test_growing_in_any_pieces_gives_what_reading_at_once_gives(tmp_path: Path) -> None:
    content = (
        b"".join(line(i, loss=1.0 / i, **({"val_loss": 2.0} if i % 7 == 0 else {})) for i in range(1, 60)) + b'{"st'
    )
    whole = log_of(tmp_path, content)
    growing_file = tmp_path / "growing.jsonl"
    growing_file.write_bytes(b"")
    growing = MetricsLog(growing_file, METRICS)
    for i in range(0, len(content), 37):
        with growing_file.open("ab") as f:
            f.write(content[i : i + 37])
        growing.refresh()
    assert (growing.size, growing.sha256, growing.cut_off) == (whole.size, whole.sha256, whole.cut_off)
    for key in whole.keys:
        for a, b in zip(whole.column(key), growing.column(key), strict=True):
            assert np.array_equal(a, b)


def test_a_log_that_was_rewritten_is_read_anew(tmp_path: Path) -> None:
    log = log_of(tmp_path, b"".join(line(i, loss=float(i)) for i in range(1, 20)))
    rewound = tmp_path / "rewound"
    rewound.write_bytes(b"".join(line(i, loss=-float(i)) for i in range(1, 30)))
    rewound.replace(log.path)
    log.refresh()
    assert log.column("loss").values.tolist() == [-float(i) for i in range(1, 30)]
    log.path.write_bytes(line(1, loss=7.0))  # the same file, shorter
    log.refresh()
    assert log.column("loss").values.tolist() == [7.0]
    log.path.unlink()
    log.refresh()
    assert (log.problem, len(log)) == ("missing", 0)


@pytest.mark.parametrize(("rows", "tail"), [(1, (1, 1)), (4, (4, 4)), (6, (6, 6)), (12, (8, 12)), (100, (81, 100))])
def test_the_tail_is_the_last_fifth_without_the_first_steps(tmp_path: Path, rows: int, tail: tuple[int, int]) -> None:
    assert log_of(tmp_path, b"".join(line(i) for i in range(1, rows + 1))).tail() == tail


def test_traced_steps_are_not_of_the_tail_nor_of_its_times(tmp_path: Path) -> None:
    text = [line(i, step_time_s=1.0, loss=float(i)) for i in range(1, 31)]
    text += [line(i, step_time_s=9.0, loss=float(i), traced=1) for i in range(31, 36)]
    text += [line(36, step_time_s=2.0, loss=36.0)]
    log = log_of(tmp_path, b"".join(text))
    assert log.tail() == (26, 36)  # 31 rows that were not traced, the last 6 of them
    times, losses = (log.over(key, "max", (26, 36)) for key in ("step_time_s", "loss"))
    assert times is not None
    assert losses is not None
    assert (times.value, losses.value) == (2.0, 36.0)
    assert "6 rows" in times.source.what
    assert "11 rows" in losses.source.what
    only = log.over("step_time_s", "mean", (31, 35))
    assert only is not None
    assert only.value == 9.0
    log = log_of(tmp_path, b"".join(line(i, traced=1) for i in range(1, 8)))
    assert log.tail() == (6, 7)


# -- JSON files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing"),
        (b"", "damaged or cut off: not JSON at line 1"),
        (b'{"a": 1,\n "b', "damaged or cut off: not JSON at line 2"),
        (b"\xff", "damaged: not UTF-8"),
        (b"[]", "damaged: not a JSON object"),
        (b'{"a": ' + b"1" * 5000 + b"}", "damaged or cut off: not JSON"),
        (b'{"a":' * 100_000, "damaged or cut off: not JSON"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path, "x.json").problem == problem


def test_a_json_pointer_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a/b": [{"~": 5}]}', encoding="utf-8")
    fact = read_json(path, "x.json").at("a/b", 0, "~")
    assert fact is not None
    assert (fact.value, fact.source.where) == (5, "/a~1b/0/~0")
    assert read_json(path, "x.json").at("a/b", 1) is None


@pytest.mark.parametrize("name", WRITTEN_BY)
def test_a_missing_file_is_said_to_be_missing(runs: Runs, name: str) -> None:
    (run,) = runs("before")
    (run / name).unlink(missing_ok=True)
    markdown, page = report([run])
    assert re.search(rf"{re.escape(name)}`? is missing|`{re.escape(name)}` \| missing", markdown), name
    assert Page(page).complaints == []


@pytest.mark.parametrize(
    "name", [CONFIG, METRICS, WINDOW, BOTTLENECKS, COMPARISON, MEMORY, SWEEP, "errors/crash_1.json"]
)
@pytest.mark.parametrize(
    "content",
    [b'{"cut": [1, 2', b"\xff\xfe\x00", b"[]", b"{}", b'{"stages": 3, "config": [], "resumed": 7, "environment": "x"}'],
    ids=["cut", "bytes", "list", "empty", "other"],
)
def test_a_damaged_file_is_reported_and_survived(runs: Runs, name: str, content: bytes) -> None:
    """In either place: a report of two runs has other tables than that of one."""
    damaged, whole = runs("before", "after")
    (damaged / name).parent.mkdir(exist_ok=True)
    (damaged / name).write_bytes(content)
    for paths in ([damaged], [damaged, whole], [whole, damaged]):
        markdown, page = report(paths)
        assert Page(page).complaints == []
        if content in (b'{"cut": [1, 2', b"\xff\xfe\x00", b"[]") and name != METRICS:
            assert re.search(rf"{re.escape(name)}.*(damaged|could not be read)", markdown), name


@pytest.mark.parametrize("seed", range(6))
def test_files_full_of_other_types_never_stop_a_report(runs: Runs, seed: int) -> None:
    """Each value of each file is replaced, in turn at random, by one of another type."""
    rng = np.random.default_rng(seed)
    (run,) = runs("died")
    for name, content in ((COMPARISON, COMPARED), (SWEEP, SWEPT), (MEMORY, {"weights_gib": 1.0, "peak_gib": 2.0})):
        (run / name).write_text(json.dumps(content), encoding="utf-8")
    for path in [run / CONFIG, *sorted(run.glob("*/*.json"))]:
        path.write_text(json.dumps(_shaken(json.loads(path.read_text(encoding="utf-8")), rng)), encoding="utf-8")
    lines = [_shaken(json.loads(one), rng) for one in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    (run / METRICS).write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert Page(report([run])[1]).complaints == []


def _shaken(value: object, rng: np.random.Generator) -> object:
    if rng.random() < 0.04:
        others: list[object] = [None, True, "text", -1, 1e308, "nan", [], {}, [1], {"a": {"b": "c"}}]
        return others[int(rng.integers(len(others)))]
    if isinstance(value, dict):
        return {k: _shaken(v, rng) for k, v in value.items()}
    return [_shaken(v, rng) for v in value] if isinstance(value, list) else value


def test_a_killed_runs_last_line_is_reported(runs: Runs) -> None:
    (run,) = runs("before")
    whole = (run / METRICS).read_bytes()
    (run / METRICS).write_bytes(whole[:-200])
    markdown, _ = report([run])
    assert "metrics.jsonl line 60`](metrics.jsonl#L60), the last, has no end" in markdown
    assert "the log ends at step [59](metrics.jsonl#L59) of [60]" in markdown


COMPARED = {
    "kind": "compare",
    "command": "eco_train compare --a= '--b=--no-torch-compile'",
    "changed": {"torch_compile": ["on", "off"], "lr": [0.001, 0.02]},
    "verdict": "faster",
    "sentence": "B is faster: its throughput is +9.68% against A's (99.1% interval +8.00% to +11.00%, 12 pairs)",
    "a": {"tail_throughput_tokens_per_s": 180.7208, "tail_step_time_s": 11.33, "peak_memory_gib": None},
    "b": {"tail_throughput_tokens_per_s": 198.2186, "tail_step_time_s": 10.31, "peak_memory_gib": None},
    "paired": {"percent": 9.6822, "low": 8.0, "high": 11.0, "pairs": 12},
    "gate": {"passed": True, "steps": 5, "losses_a": [1.0, 2.0]},
    "samples": [{"pair": 1}],
    "environment": {"date": "2026-02-17T14:22:00+00:00", "cpu": {"model": "a CPU"}},
}
"""What `eco_train compare` writes, shortened."""

SWEPT = {
    "kind": "sweep",
    "largest_stable_batch": 4,
    "fastest_point": "batch-size-4",
    "points": [
        {"name": "batch-size-4", "status": "done", "avg_step_time_s": 0.5, "message": None, "environment": {"x": 1}},
        {"name": "batch-size-6", "status": "out_of_memory", "message": "OutOfMemoryError: <b>"},
    ],
}
"""What `eco_train sweep` writes, shortened."""


def test_a_comparison_a_sweep_and_a_ledger_are_shown(runs: Runs) -> None:
    (run,) = runs("before")
    ledger = {"weights_gib": 1.0, "steps": [{"activations_bytes": 2**29}], "peak_gib": 1.75}
    about = {"date": "2099-01-01T00:00:00+00:00", "device": "cuda:0", "gpu": {"name": "NVIDIA H200"}, "dirty": False}
    compared = {**COMPARED, "environment": about, "a": {**COMPARED["a"], "commit": "a1b2"}}
    for name, content in ((COMPARISON, compared), (SWEEP, SWEPT), (MEMORY, ledger)):
        (run / name).write_text(json.dumps(content), encoding="utf-8")
    markdown, page = report([run])
    assert "| `environment/gpu/name` | [NVIDIA H200](" in markdown
    assert "| `a/commit` | [a1b2](" in markdown
    assert "[2099-01-01T00:00:00+00:00](perf/latest_bottleneck_fix_report.json#/environment/date)" in markdown
    at = "perf/latest_bottleneck_fix_report.json"
    assert markdown.count("**Paired comparison: [B is faster: its throughput is +9.68% against A's") == 2
    assert f"| `--lr` | [0.001]({at}#/changed/lr/0) | [0.02]({at}#/changed/lr/1) |" in markdown
    row = f"[180.72]({at}#/a/tail_throughput_tokens_per_s) | [198.22]({at}#/b/tail_throughput_tokens_per_s)"
    assert f"{row} | [+17.498]({at}#/b/tail_throughput_tokens_per_s) | [+9.682%]" in markdown
    assert f"| `gate/passed` | [yes]({at}#/gate/passed) |" in markdown
    assert "losses_a" not in markdown
    assert "Sweep: largest stable batch [4](perf/sweep.json#/largest_stable_batch); fastest [batch-size-4]" in markdown
    assert "[out\\_of\\_memory](perf/sweep.json#/points/1/status) | – |" in markdown
    assert "| activations | [0.500](perf/memory.json#/steps/0/activations_bytes) |" in markdown
    assert "| gradients | – |" in markdown
    assert "| peak | [1.750](perf/memory.json#/peak_gib) |" in markdown
    assert Page(page).complaints == []


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_a_folder_whose_name_is_not_utf8(runs: Runs, tmp_path: Path) -> None:
    one, other = runs("before", "after")
    odd = one.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd-\xff")))
    page = write_report([odd, other], tmp_path / "out")[1].read_text(encoding="utf-8")
    assert "../odd-%FF/metrics.jsonl" in page


def test_a_run_a_sweep_and_a_comparison_are_reported_together(runs: Runs, tmp_path: Path) -> None:
    """Tables of training have columns for what was trained; what failed in a sweep is an incident."""
    (run,) = runs("before")
    swept, compared = tmp_path / "swept", tmp_path / "compared"
    (swept / "perf" / "sweep" / "errors").mkdir(parents=True)
    crash = "perf/sweep/errors/crash_batch-size-6_1.json"
    points = [{**SWEPT["points"][1], "crash_reports": [crash]}, {"name": "batch-size-8", "status": "killed"}]
    content = {**SWEPT, "axes": {"batch_size": ["4", "6", "8"]}, "points": [SWEPT["points"][0], *points]}
    (swept / SWEEP).write_text(json.dumps(content), encoding="utf-8")
    died = {"exception": "OutOfMemoryError", "message": "no room", "kind": "out_of_memory", "step": 1}
    (swept / crash).write_text(json.dumps(died), encoding="utf-8")
    (compared / "perf").mkdir(parents=True)
    sides = {side: {**COMPARED[side], "revision": name} for side, name in (("a", "v1"), ("b", "v2"))}
    (compared / COMPARISON).write_text(json.dumps({**COMPARED, **sides}), encoding="utf-8")
    markdown, page = report([run, swept, compared])
    sections = dict(re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", markdown, re.M | re.S))
    changed = sections["What was changed"]
    assert "| `--d-model` | 768 | [32](" in changed
    assert "| `--batch-size` | [4, 6, 8](" in changed
    assert re.search(r"\| `--lr` \| \[0.001\].* \| \[0.02\]", changed)
    assert re.search(r"\| code: revision \| \[v1\].* \| \[v2\]", changed)
    assert "- Steps, last in the log: **[60](" in sections["Summary"]
    assert "|  | value |" in sections["Measured results"]
    assert "swept" not in sections["Measured results"] + sections["Memory"]
    incidents = sections["Incidents"]
    assert "OutOfMemoryError: no room" in incidents
    assert "swept: the sweep's point batch-size-8 ended as [killed](" in incidents
    assert "None: no crash report" not in incidents
    assert Page(page).complaints == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"verdict": None, "failure": "B crashed: no"}, "Paired comparison: [B crashed: no]"),
        (
            {"verdict": None, "gate": {"passed": False, "largest_relative_difference": 0.25, "tolerance": 1e-4}},
            "no verdict, since the two sides' [losses differ](",
        ),
        ({"tail_of_another_version": 180.7208}, "| `tail_of_another_version` | [180.72]"),
    ],
)
def test_a_comparison_without_a_verdict_says_why(tmp_path: Path, content: dict[str, object], said: str) -> None:
    """And a folder that holds nothing else is reported on without empty sections."""
    (tmp_path / "perf").mkdir()
    (tmp_path / COMPARISON).write_text(json.dumps(content), encoding="utf-8")
    markdown, page = report([tmp_path])
    assert said in markdown
    assert "## Measured results" not in markdown
    assert "missing" not in markdown.partition("## Notes")[0].replace("No file says which command", "")
    assert Page(page).complaints == []


# -- which runs, and where to ------------------------------------------------------------------------------------


def test_runs_are_named_as_shortly_as_tells_them_apart(runs: Runs, tmp_path: Path) -> None:
    (run,) = runs("before")
    other = shutil.copytree(run, tmp_path / "deeper" / "before")
    assert [r.label for r in open_runs([run])] == ["before"]
    assert [r.label for r in open_runs([run, other])] == [f"{tmp_path.name}/before", "deeper/before"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "needs a run directory"),
        ("nowhere", "nowhere is not a directory"),
        ("empty", "empty holds no run"),
        ("run run", "run is named twice"),
        ("run --out file", "the report cannot be written"),
        ("run --port 1", "unknown flag --port"),
        ("run " * 9, "name 1 to 8 run directories, not 9"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    runs: Runs, words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs("before")[0].rename(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_the_next_run_takes_the_report_of_the_last_with_it(
    trained: Path, tiny: list[str], corpus: Path, data_cache: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained / "before", tmp_path / "before")
    write_report([run])
    places = ["--data", str(corpus), "--data-cache", str(data_cache), "--output-dir", str(run)]
    assert main([*tiny, *places, "--steps", "2", "--no-resume"]) == 0
    assert sorted(p.name for p in (run / "previous" / "001").glob("*o*r*t*")) == ["report.html"]
    assert (run / "previous" / "001" / "PROOF_OF_EVOLUTION.md").is_file()
    assert not (run / "PROOF_OF_EVOLUTION.md").exists()
    markdown, _ = report([run])
    assert "eco_train report before/previous/001 before" in markdown
    markdown, _ = report([run / "previous" / "001", run])
    assert "### before/previous/001 → before" in markdown
