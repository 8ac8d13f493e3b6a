"""render: tables and curves follow the evidence, staleness is noticed, markers cannot rot unseen."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("benchmarks_render", ROOT / "benchmarks" / "render.py")
assert spec is not None
assert spec.loader is not None
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


def run_evidence(claim: str = "train_tiny", steps: int = 50, **summary: Any) -> dict[str, Any]:
    return {
        "claim": claim,
        "command": "eco_train @x",
        "environment": {
            "date": "2026-11-20T10:00:00+00:00", "commit": "0123456789abcdef", "dirty": True,
            "source_sha256": "f" * 64,
        },
        "summary": {
            "parameters": 1_234_567, "steps": steps, "tokens": 102_400, "final_train_loss": 3.14159,
            "final_val_loss": 3.3, "val_bits_per_byte": 1.5, "core_tokens_per_s": 2000.4,
            "effective_tokens_per_s": 1900.0, "peak_memory_gib": None, "wall_seconds": 51.2, **summary,
        },
        "samples": [
            {"step": i, "loss": 8.0 / (1 + i / 10), "val_loss": 4.0 if i % 25 == 0 else None}
            for i in range(1, steps + 1)
        ],
    }  # fmt: skip


def ratio_evidence() -> dict[str, Any]:
    summary = {
        "median_a": 0.012345, "median_b": 0.01, "ratio": 1.2345, "ratio_low": 1.2, "ratio_high": 1.27,
        "rounds": 20,
    }  # fmt: skip
    samples = [{"round": 0, "a": 1.0, "b": 1.0}]
    environment = run_evidence()["environment"] | {"commit": None, "dirty": None}
    return {"claim": "fast_op", "environment": environment, "summary": summary, "samples": samples}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for hardware, evidence in (("cpu-2c-amd", run_evidence()), ("nvidia-h200", ratio_evidence())):
        folder = tmp_path / "benchmarks" / "results" / hardware
        folder.mkdir(parents=True)
        (folder / f"{evidence['claim']}.json").write_text(json.dumps(evidence), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# é\n<!-- evidence:train_*/*/summary -->\nold\n<!-- /evidence -->\nafter\n", encoding="utf-8"
    )
    (tmp_path / "docs" / "op.md").write_text(
        "<!-- evidence:fast_op/nvidia-h200/ratio -->\n<!-- /evidence -->\n", encoding="utf-8"
    )
    return tmp_path


def main(site: Path, *flags: str) -> int:
    code: int = render.main(["--root", str(site), *flags])
    return code


def test_renders_then_is_fresh_then_notices_every_kind_of_staleness(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (site / "README.md").read_text(encoding="utf-8")
    assert main(site, "--check") == 1
    assert (site / "README.md").read_text(encoding="utf-8") == before, "--check changed a file"
    assert "stale: README.md" in capsys.readouterr().err
    assert main(site) == 0
    assert main(site, "--check") == 0

    page = site / "docs" / "op.md"
    page.write_text(page.read_text(encoding="utf-8").replace("1.234", "9.999"), encoding="utf-8")
    assert main(site, "--check") == 1
    assert main(site) == 0

    evidence = site / "benchmarks" / "results" / "cpu-2c-amd" / "train_tiny.json"
    evidence.write_text(json.dumps(run_evidence(final_val_loss=2.0)), encoding="utf-8")
    assert main(site, "--check") == 1
    assert main(site) == 0

    curve = site / "docs" / "img" / "train_tiny_cpu-2c-amd.svg"
    curve.unlink()
    assert main(site, "--check") == 1
    assert main(site) == 0

    orphan = curve.with_name("gone_cpu.svg")
    orphan.write_text(curve.read_text(encoding="utf-8"), encoding="utf-8")
    drawing = curve.with_name("drawn_by_hand.svg")
    drawing.write_text("<svg/>", encoding="utf-8")
    assert main(site, "--check") == 1
    assert main(site) == 0
    assert not orphan.exists()
    assert drawing.exists()
    assert main(site, "--check") == 0


def test_tables_hold_the_evidences_numbers(site: Path) -> None:
    main(site)
    readme = (site / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# é\n")
    assert readme.endswith("<!-- /evidence -->\nafter\n")
    assert "old" not in readme
    row = next(line for line in readme.splitlines() if "`train_tiny`" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "`train_tiny`", "cpu-2c-amd", "1,234,567", "50", "102,400", "3.142", "3.300", "1.500", "2,000", "1,900", "–",
        "51", "2026-11-20", "01234567+",
    ]  # fmt: skip
    op = (site / "docs" / "op.md").read_text(encoding="utf-8")
    assert "| `fast_op` | nvidia-h200 | 0.01235 | 0.01 | 1.234 | 1.200 – 1.270 | 20 | 2026-11-20 |" in op
    assert "source ffffffff" in op


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- evidence:nothing/cpu/summary -->\n<!-- /evidence -->\n", "no such file"),
        ("<!-- evidence:train_tiny/*/pie -->\n<!-- /evidence -->\n", "unknown table"),
        ("<!-- evidence:fast_op/*/summary -->\n<!-- /evidence -->\n", "'parameters'"),
        ("<!-- evidence:train_tiny/*/summary -->\n", "not closed"),
        ("<!-- evidence:train_tiny/summary -->\n<!-- /evidence -->\n", "malformed"),
    ],
)
def test_broken_markers_are_errors(site: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (site / "docs" / "bad.md").write_text(text, encoding="utf-8")
    assert main(site, "--check") == 2
    assert message in capsys.readouterr().err


def test_curve_is_well_formed_inside_its_frame_and_says_what_it_shows() -> None:
    item = run_evidence(claim="train_tiny") | {"hardware": "cpu-2c-amd"}
    svg = render.loss_curve(item)
    root = ET.fromstring(svg)
    space = {"s": "http://www.w3.org/2000/svg"}
    texts = {element.text for element in root.iterfind(".//s:text", space)}
    assert {"train_tiny on cpu-2c-amd", "step", "loss, nats per token", "train", "validation"} <= texts
    assert "prefers-color-scheme: dark" in svg
    lines = root.findall(".//s:polyline", space)
    assert [line.get("class") for line in lines] == ["train", "val"]
    for line, count in zip(lines, (50, 2), strict=True):
        points = [tuple(map(float, p.split(","))) for p in (line.get("points") or "").split()]
        assert len(points) == count
        assert all(64 <= x <= 696 and 56 <= y <= 328 for x, y in points)
        assert points == sorted(points)  # left to right
    first, last = (lines[0].get("points") or "").split()[0], (lines[0].get("points") or "").split()[-1]
    assert float(first.split(",")[1]) < float(last.split(",")[1]), "a falling loss is drawn downwards"


def test_curve_without_validation_and_with_one_or_many_points() -> None:
    many = run_evidence(steps=10_000) | {"hardware": "x"}
    for sample in many["samples"]:
        del sample["val_loss"]
    root = ET.fromstring(render.loss_curve(many))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [line.get("class") for line in lines] == ["train"]
    assert len((lines[0].get("points") or "").split()) == 400
    ET.fromstring(render.loss_curve(run_evidence(steps=1) | {"hardware": "x"}))


def test_ticks_are_round_and_enclose() -> None:
    assert render._ticks(0.3, 9.7, 6) == [0, 2, 4, 6, 8, 10]
    assert render._ticks(1, 200, 8) == [0, 50, 100, 150, 200]
    for low, high in ((3.1, 3.1), (0.0, 0.0), (1e-3, 2e-3), (-5, 1e6)):
        ticks = render._ticks(low, high, 6)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert ticks[0] < ticks[-1]


def test_this_repositorys_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


def test_pending_evidence_is_admitted_and_then_shown(site: Path) -> None:
    page = site / "docs" / "speed.md"
    page.write_text("<!-- evidence:later_*/*/table pending -->\nold\n<!-- /evidence -->\n", encoding="utf-8")
    assert main(site) == 0
    assert "*Not measured yet.*" in page.read_text(encoding="utf-8")
    environment = run_evidence()["environment"]
    for shape in ("4x512", "1x8"):
        table = {"title": shape, "header": ["step", "ms"], "rows": [["ours", 1.5], ["theirs", None]]}
        item = {"claim": f"later_{shape}", "environment": environment, "summary": {"x": 1}, "table": table}
        folder = site / "benchmarks" / "results" / "nvidia-h200"
        evidence = json.dumps(item | {"samples": [{"round": 0}]})
        (folder / f"later_{shape}.json").write_text(evidence, encoding="utf-8")
    assert main(site) == 0
    text = page.read_text(encoding="utf-8")
    assert "| nvidia-h200 | 4x512 | ours | 1.5 | 2026-11-20 | 01234567+ |" in text
    assert "| nvidia-h200 | 1x8 | theirs | – |" in text
    assert "Not measured" not in text


def test_pending_does_not_excuse_an_unknown_table(site: Path) -> None:
    (site / "docs" / "x.md").write_text("<!-- evidence:later/*/pie pending -->\n<!-- /evidence -->\n", encoding="utf-8")
    assert main(site) == 2


def test_tiles_name_their_path(site: Path) -> None:
    summary = {"T512_chunk64_ms": 1.0, "T512_chunk128_ms": 0.5, "T512_chunk256_ms": 2.0}
    item = ratio_evidence() | {"claim": "tiles_x", "path": "triton, eager", "summary": summary}
    item["samples"] = [{"T": 512, "chunk": 64, "round": 0, "seconds": 1.0}]
    (site / "benchmarks" / "results" / "nvidia-h200" / "tiles_x.json").write_text(json.dumps(item), encoding="utf-8")
    page = site / "docs" / "tiles.md"
    page.write_text("<!-- evidence:tiles_x/*/tiles -->\n<!-- /evidence -->\n", encoding="utf-8")
    assert main(site) == 0
    assert "| nvidia-h200 | triton, eager | 512 | 1.000 | **0.500** | 2.000 |" in page.read_text(encoding="utf-8")


def memory_evidence(samples: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    environment = run_evidence()["environment"]
    return {"claim": "modes", "environment": environment, "summary": {"x": 1}, "samples": samples, **more}


def crowd() -> list[dict[str, Any]]:
    """Points close to each other, three of them in one place, and one that did not fit."""
    names = ["none", "recompute*8,none*10", "recompute", "coupled", "nanoGPT", "nanoGPT recompute", "compress 4 bits"]
    samples: list[dict[str, Any]] = [
        {"row": name, "shape": shape, "peak_gib": 7.0 + 0.05 * (i % 4), "tokens_per_s": 250_000.0 + 2_000 * (i % 5)}
        for i, (name, shape) in enumerate((name, shape) for name in names for shape in ("16x1024", "2x8192"))
    ]
    samples += [{**samples[0], "row": "same place"}, {**samples[0], "row": "a < b & c"}]
    return [*samples, {"row": "nanoGPT chunked loss", "shape": "64x1024", "out_of_memory": True}]


def boxes_of(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    """Every name in the picture, with the room it takes."""
    found = []
    for text in root.iterfind(".//{http://www.w3.org/2000/svg}text"):
        if text.get("class") == "ink" and float(text.get("y") or 0) > 60:
            width = len(text.text or "") * 6.5
            share = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor") or "start"]
            left = float(text.get("x") or 0) - share * width
            y = float(text.get("y") or 0)
            found.append((text.text or "", left, y - 10, left + width, y + 2))
    return found


def test_memory_plot_names_every_point_and_no_name_covers_another() -> None:
    samples = crowd()
    item = memory_evidence(samples, cap_gib=8.0) | {"hardware": "nvidia-h200"}
    svg = render.memory_plot(item)
    assert svg == render.memory_plot(json.loads(json.dumps(item))), "the same evidence gives the same bytes"
    assert "prefers-color-scheme: dark" in svg
    root = ET.fromstring(svg)
    boxes = boxes_of(root)
    # 64x1024 did not fit, but its panel has two batches, so that names say which.
    assert [name for name, *_ in boxes].count("none, 16 × 1024") == 1
    assert [name for name, *_ in boxes].count("none") == 1
    assert {"same place, 16 × 1024", "a < b & c, 16 × 1024", "nanoGPT recompute"} <= {name for name, *_ in boxes}
    assert len(boxes) == len(samples) - 1
    height = float((root.get("viewBox") or "").split()[3])
    for i, (name, left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= 720, name
        assert 0 <= top < bottom <= height, name
        for other, *place in boxes[i + 1 :]:
            apart = right <= place[0] or place[2] <= left or bottom <= place[1] or place[3] <= top
            assert apart, f"{name} covers {other}"
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text or "" for text in root.iter(f"{space}text")]
    assert "does not fit: nanoGPT chunked loss, 64 × 1024" in texts
    cap = "; dashed: the cap of 8 GiB"
    assert {f"T = 1024{cap}", f"T = 8192, 2 × 8192 tokens a step{cap}"} <= set(texts)
    squares = [rect for rect in root.iter(f"{space}rect") if rect.get("class") == "peer"]
    circles = [c for c in root.iter(f"{space}circle") if c.get("class") == "ours"]
    assert len(squares) == 4 + 1  # with the legend's
    assert len(circles) == len(samples) - 1 - 4 + 1


def test_memory_plot_puts_more_memory_right_and_more_speed_up() -> None:
    samples = [
        {"row": name, "shape": "1x1024", "peak_gib": peak, "tokens_per_s": speed}
        for name, peak, speed in (("none", 16.0, 300_000.0), ("recompute", 5.0, 250_000.0))
    ]
    root = ET.fromstring(render.memory_plot(memory_evidence(samples) | {"hardware": "x"}))
    legend, a, b = (
        (float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in root.iter("{http://www.w3.org/2000/svg}circle")
    )
    left, right = sorted((a, b))
    assert left[1] > right[1] > legend[1]


def test_memory_plot_of_nothing_that_fits_still_says_so() -> None:
    samples = [
        {"row": "none", "shape": "1x8", "peak_gib": 1.0, "tokens_per_s": 5.0},
        {"row": "none", "shape": "1x16", "out_of_memory": True},
    ]
    root = ET.fromstring(render.memory_plot(memory_evidence(samples) | {"hardware": "x"}))
    assert "does not fit: none" in {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}


def test_a_page_shows_the_plot_of_evidence_that_has_one(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = site / "benchmarks" / "results" / "nvidia-h200", site / "docs" / "modes.md"
    page.write_text("<!-- evidence:modes/*/plot pending -->\n<!-- /evidence -->\n", encoding="utf-8")
    assert main(site) == 0
    assert "*Not measured yet.*" in page.read_text(encoding="utf-8")
    (folder / "modes.json").write_text(json.dumps(memory_evidence(crowd())), encoding="utf-8")
    assert main(site, "--check") == 1
    assert main(site) == 0
    assert "](img/modes_nvidia-h200.svg)" in page.read_text(encoding="utf-8")
    assert (site / "docs" / "img" / "modes_nvidia-h200.svg").is_file()
    assert main(site, "--check") == 0
    page.write_text("<!-- evidence:fast_op/*/plot -->\n<!-- /evidence -->\n", encoding="utf-8")
    assert main(site) == 2
    assert "peak_gib" in capsys.readouterr().err
    page.unlink()
    (site / "README.md").write_text("<!-- evidence:modes/*/plot -->\n<!-- /evidence -->\n", encoding="utf-8")
    assert main(site) == 2
    assert "docs/*.md only" in capsys.readouterr().err
