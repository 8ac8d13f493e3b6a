"""Blocks' names in a trace: every block, forward and backward, in every mode; and nothing else changes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stack_cases import SHAPE, loss_and_gradients

from eco_llm.config import InstantConfig
from eco_llm.model.sigma_llm import SigmaLLM

NAMES = [f"eco/block_{index:02d}_{mixer}" for index, mixer in enumerate(SHAPE.mixer_pattern)]
MODES = ("none", "recompute", "compress", "fixed-point", "coupled")


def build(mode: str) -> SigmaLLM:
    torch.manual_seed(0)
    model = SigmaLLM(SHAPE, InstantConfig(instant_mode=mode))
    if mode == "fixed-point":  # as a probe would have decided
        model.stack._decided.iterations = [None if mixer == "mla" else (2, 1) for mixer in SHAPE.mixer_pattern]
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def traced(model: SigmaLLM, path: Path) -> list[dict[str, Any]]:
    """The named ranges of one step, in order of their beginning."""
    model.stack.annotate = True
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as trace:
        loss_and_gradients(model, batch())
    model.stack.annotate = False
    trace.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("eco/block")]
    return sorted(ranges, key=lambda e: e["ts"])


@pytest.mark.parametrize("mode", MODES)
def test_every_block_is_named_forward_and_backward(mode: str, tmp_path: Path) -> None:
    ranges = traced(build(mode), tmp_path / "trace.json")
    names = [e["name"] for e in ranges]
    assert set(names) == {*NAMES, *(f"{name}_backward" for name in NAMES)}
    forward = list(dict.fromkeys(name for name in names if not name.endswith("_backward")))
    backward = list(dict.fromkeys(name for name in names if name.endswith("_backward")))
    assert forward == NAMES
    assert backward == [f"{name}_backward" for name in reversed(NAMES)]
    for before, after in itertools.pairwise(ranges):  # one ends before the next begins
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3


def test_backwards_ranges_hold_the_work_of_backward(tmp_path: Path) -> None:
    """They are not empty marks: the products of each block's gradient lie inside its range."""
    model = build("none")
    path = tmp_path / "trace.json"
    ranges = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in traced(model, path)}
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    products = [e["ts"] for e in events if e.get("name") == "aten::mm"]
    for name in NAMES:
        inside = [sum(low <= ts <= high for ts in products) for low, high in (ranges[name], ranges[f"{name}_backward"])]
        assert inside[1] == 2 * inside[0] > 0  # two products of gradients for each forward


@pytest.mark.parametrize("mode", MODES)
def test_names_change_no_number(mode: str) -> None:
    plain, annotated = build(mode), build(mode)
    annotated.stack.annotate = True
    for _ in range(2):
        expected, actual = loss_and_gradients(plain, batch()), loss_and_gradients(annotated, batch())
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_compiled_block_has_one_range_around_the_call(tmp_path: Path) -> None:
    """Names compile nothing anew: the same frames serve steps with and without them."""
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    model = build("none")
    model.compile_blocks(backend=count)
    expected = loss_and_gradients(model, batch())
    before = len(compiled)
    ranges = traced(model, tmp_path / "trace.json")
    assert [e["name"] for e in ranges] == [*NAMES, *(f"{name}_backward" for name in reversed(NAMES))]
    model.stack.annotate = True
    actual = loss_and_gradients(model, batch())
    assert len(compiled) == before > 0
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_without_a_profiler_no_hook_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a block was named")

    monkeypatch.setattr("eco_llm.instant.stack.named", refuse)
    model = build("none")
    loss_and_gradients(model, batch())
    model.stack.annotate = True
    with torch.no_grad():
        model.loss(*batch())  # validation is not named either
