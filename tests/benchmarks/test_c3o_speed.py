"""The optimizer's speed claim: counted bytes, a gate that bites, and a whole run on tiny shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def speed(script: Callable[[str], Any]) -> Any:
    """benchmarks/c3o_speed.py."""
    return script("c3o_speed")


def test_traffic_is_the_documented_count(speed: Any) -> None:
    def bytes_of(*kind: str, hidden_share: float = 0.0, **settings: Any) -> float:
        return float(speed.Side(*kind, **settings).traffic(hidden_share))

    assert bytes_of("fp32") == 44
    assert bytes_of("fp32", sphere=True) == 48  # the gradient is read a third time
    assert bytes_of("fp32", "adamw") == 40
    assert bytes_of("bf16", "adamw", state="bf16") == 20
    assert bytes_of("bf16", state="bf16") == 22
    assert bytes_of("bf16", state="bf16", sphere=True) == 24
    assert bytes_of("bf16", state="bf16", sphere=True, idle=True) == 22
    assert bytes_of("bf16", state="bf16", skip=True) == pytest.approx(16 + 8 / 17)
    assert bytes_of("bf16", state="bf16", skip=True, idle=True) == pytest.approx(16 + 8 / 17)
    for share, measured, idle in ((0.0, 1 / 17, 0.0), (0.5, 0.5 + 0.5 / 17, 1.0), (1.0, 1.0, 2.0)):
        both = {"state": "bf16", "sphere": True, "skip": True, "hidden_share": share}
        assert bytes_of("bf16", **both) == pytest.approx(16 + 8 * measured)
        assert bytes_of("bf16", idle=True, **both) == pytest.approx(16 + 8 * measured - idle)
    assert bytes_of("bf16", state="int8") == pytest.approx(16.1875)
    assert bytes_of("bf16", state="int4", error_bits=8) == pytest.approx(6.0625 + 10.125)


def test_hidden_matrices_are_told_from_the_rest(speed: Any) -> None:
    shapes = [(50304, 1024), (768, 3072), (768,), (1536, 1, 4), (30_000, 8)]
    assert [speed.hidden(shape) for shape in shapes] == [False, True, False, False, False]
    assert 0.8 < sum(torch.Size(s).numel() for s in speed.sigma_shapes() if speed.hidden(s)) / 171_685_176 < 0.9


def test_decoder_has_the_size_it_is_named_for(speed: Any) -> None:
    assert sum(torch.Size(s).numel() for s in speed.decoder_shapes()) == pytest.approx(355e6, rel=0.01)


def test_gate_passes_every_side_and_bites(speed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for side in speed.SIDES:
        if side.kind == "c3o":
            speed.check(side, device)
    speed.check_against_adamw(device)

    import eco_llm.optim.c3o_foreach as foreach_module

    right = foreach_module.bias_correction
    monkeypatch.setattr(foreach_module, "bias_correction", lambda beta, t: 0.9 * right(beta, t))
    with pytest.raises(speed.GateError, match="no speed is reported"):
        speed.check(speed.SIDES[2], device)
    by_adam = foreach_module._direction_by_adam

    def longer(*arguments: Any) -> Any:
        u, views = by_adam(*arguments)
        return u.mul_(1.1), views

    monkeypatch.setattr(foreach_module, "_direction_by_adam", longer)
    with pytest.raises(speed.GateError, match="from AdamW"):
        speed.check_against_adamw(device)


def test_a_run_on_tiny_shapes_writes_every_side(
    speed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("measures the CPU's path")
    import steps

    written: dict[str, Any] = {}
    monkeypatch.setattr(speed, "write_evidence", lambda claim, payload, device: written.update(payload) or claim)
    monkeypatch.setattr(steps, "measured_rates", lambda device: {"copy_bytes_per_s": 1e10})
    speed.main(["--rounds", "3", "--steps", "2"], {"tiny": [(64, 128), (4096,), (33,)]})
    sides = [side for side in speed.SIDES if side.kind in ("c3o", "adamw")]
    assert len(written["table"]["rows"]) == len(sides)
    assert len(written["samples"]) == 3 * len(sides)
    assert {row[2] for row in written["table"]["rows"]} == {side.name for side in sides}
    assert written["absent"] == sorted({s.kind for s in speed.SIDES if speed.absent(s)})
    by_name = {(row[1], row[2]): float(row[6]) for row in written["table"]["rows"]}
    assert by_name["bf16", "C3O, int4 state, exact norms"] == pytest.approx(1.0625, abs=0.02)
    assert by_name["bf16", "C3O, int8 state, exact norms"] == pytest.approx(2.0625, abs=0.02)
    assert "not installed" in capsys.readouterr().out
