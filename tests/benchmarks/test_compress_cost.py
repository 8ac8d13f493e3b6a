"""compress_cost: its gate bites, ratios are paired with none's, the verdict can be no."""

from __future__ import annotations

from typing import Any

import pytest

from eco_llm.config import InstantConfig, SigmaConfig

LEARNS = {"none": [10.4, 6.0, 3.0], "compress, 8 bits": [10.4, 6.1, 3.1]}


@pytest.fixture
def cost(script: Any) -> Any:
    """benchmarks/compress_cost.py."""
    return script("compress_cost")


def test_sides_are_what_they_are_called(cost: Any) -> None:
    mixers = SigmaConfig().mixer_pattern
    modes = {name: InstantConfig(**choice).block_modes(mixers) for name, choice in cost.SIDES.items()}
    assert [set(found) for found in modes.values()] == [{"none"}, {"compress"}, {"compress"}, {"recompute"}]
    assert [cost.SIDES[name]["instant_bits"] for name in modes if "bits" in name] == ["8", "4"]


def test_the_gate_lets_alike_ones_pass(cost: Any) -> None:
    cost.gate(LEARNS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([10.5, 6.0, 3.0], "first loss"),
        ([10.4, float("nan"), 3.0], "not finite"),
        ([10.4, 10.4, 10.3], "does not fall"),
        ([10.4, 6.0, 3.4], "last loss"),
    ],
)
def test_the_gate_bites(cost: Any, script: Any, wrong: list[float], message: str) -> None:
    with pytest.raises(script("common").GateError, match=message):
        cost.gate({**LEARNS, "compress, 4 bits": wrong})


def test_the_table_says_no_where_the_bar_is_missed(cost: Any) -> None:
    rounds = [
        {"none": t, "compress, 8 bits": 1.04 * t, "compress, 4 bits": 1.06 * t, "recompute": 1.25 * t}
        for t in (0.100, 0.102, 0.110)
    ]
    found = cost.table(rounds, dict.fromkeys(cost.SIDES, 2.0), "x")
    assert all(len(row) == len(found["header"]) for row in found["rows"])
    assert [row[3] for row in found["rows"]] == ["", "yes", "**no**", ""]
    assert found["rows"][2][2].startswith("1.060 (")
    assert found["rows"][0][1:3] == ["102.0", "1"]
