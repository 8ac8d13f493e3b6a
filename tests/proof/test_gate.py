"""The gate is green for what only costs differently, and red for what does not learn the same, in bf16 too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eco_llm.cli.main import main
from eco_llm.config import TrainConfig, flatten
from eco_llm.errors import UserError
from eco_llm.proof.gate import Allowed, Gate, check_same_learning, check_same_network, check_same_tokens
from eco_llm.proof.runs import read_records

Flags = Callable[..., list[str]]
FP32, BF16 = Allowed.of(["float32"]), Allowed.of(["bfloat16"])
FALL = (5.7, 5.6, 5.5)


def records(*losses: Any, norm: Any = 2.0) -> list[dict[str, Any]]:
    return [{"step": i, "loss": loss, "grad_norm": norm} for i, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("a", "b", "allowed", "red"),
    [
        (records(*FALL), records(*FALL), FP32, None),
        (records(*FALL), records(5.7005, 5.6005, 5.5005), FP32, None),
        (records(*FALL), records(5.701, 5.601, 5.501), FP32, "losses of step 1 differ by 0.00018"),
        (records(*FALL), records(5.701, 5.601, 5.501), BF16, None),
        (records(*FALL), records(*FALL, norm=2.03), FP32, None),
        (records(*FALL), records(*FALL, norm=2.1), BF16, "gradient norms of step 1 differ by 0.048"),
        (records(*FALL), records(*FALL, norm=0.0), BF16, "gradient norms of step 1 differ by 1 of"),
        (records(*FALL), records(5.7, 5.6, 5.507), BF16, None),
        (records(*FALL), records(5.7, 5.6, 5.51), BF16, "fell by 0.2 in A and by 0.19 in B, on average 0.025 of that"),
        (records(*FALL), records(5.7, 5.61, 5.5), BF16, "on average 0.025 of that apart"),  # only on the way
        (records(*FALL), records(5.7, 5.7, 5.7), BF16, "by 0.2 in A and by 0 in B"),
        (records(5.7, 5.7, 5.7), records(*FALL), BF16, "by 0 in A and by 0.2 in B"),
        (records(5.7, 5.7, 5.65), records(5.7, 5.7, 5.65), FP32, "could not tell: in 3 steps the loss moved by 0.05"),
        (records(5.7, 5.7, 5.7), records(5.7, 5.7, 5.7), FP32, "could not tell"),
        (records(5.7, 6.2, 7.0), records(5.7, 6.2, 7.0), FP32, None),  # what moves up moves too
        (records(*FALL, "nan"), records(*FALL, "nan"), FP32, None),  # the fourth is not asked about
        (records(5.7, 5.6, "nan"), records(5.7, 5.6, "nan"), FP32, "not finite"),
        (records(*FALL), records(5.7, "inf", 5.5), FP32, "not finite"),
        (records(*FALL, norm="nan"), records(*FALL, norm="nan"), FP32, "not finite"),
    ],
)
def test_the_rule(a: Any, b: Any, allowed: Allowed, red: str | None) -> None:
    gate = Gate.judge(a, b, 3, allowed)
    assert gate.passed == (red is None)
    assert (red or "") in (gate.reason or "")
    json.dumps(dataclasses.asdict(gate))


def test_one_step_says_what_it_leaves_out() -> None:
    gate = Gate.judge(records(5.7), records(5.7), 1, FP32)
    assert (gate.passed, gate.progress_difference) == (True, None)
    assert gate.covers == "forward, backward; not applied to the optimizer"
    assert "not applied to the optimizer" in gate.sentence()
    assert not Gate.judge(records(5.7), records(5.7, norm=3.0), 1, FP32).passed


def test_limits() -> None:
    assert Allowed.of(["float32", "bfloat16"]) == BF16
    assert Allowed.of(["bfloat16"], 1e-5) == dataclasses.replace(BF16, loss=1e-5)
    assert Allowed.of(["float32"], 0.5) == Allowed(0.5, 0.5, 0.5)


def settings(**own: Any) -> dict[str, Any]:
    return {**flatten(TrainConfig()), **own}


@pytest.mark.parametrize("name", ["seed", "seq_len", "vocab_size", "data", "tokenizer", "val_fraction", "text_field"])
def test_sides_that_see_other_tokens_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .* in A and .* in B"):
        check_same_tokens(settings(), settings(**{name: 7}))


def test_equal_tokens_may_be_accumulated_differently() -> None:
    check_same_tokens(settings(batch_size=4, grad_accum=2), settings(batch_size=8, grad_accum=1))
    with pytest.raises(UserError, match="eco_train sweep"):
        check_same_tokens(settings(batch_size=4), settings(batch_size=8))


@pytest.mark.parametrize(
    "own",
    [
        {"lr": 1e-9},
        {"optimizer": "adamw"},
        {"weight_decay": 0.0},
        {"schedule": "constant"},
        {"grad_clip": 0.0},
        {"c3o_sphere": 2.0},
        {"c3o_nesterov": False},
    ],
)
def test_sides_that_learn_differently_by_intention_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(own)).replace('_', '-')} is .*--gate-steps 1 compares speed"):
        check_same_learning(settings(), settings(**own), 10)
    check_same_learning(settings(), settings(**own), 1)
    check_same_learning(settings(), settings(c3o_trust_norm_refresh_drift=0.02, instant_mode="recompute"), 10)


@pytest.mark.parametrize("own", [{"rope_theta": 5e5}, {"norm_eps": 2e-5}, {"n_layers": 5}, {"mamba_state_dim": 16}])
def test_two_networks_are_refused_unless_a_tolerance_was_asked_for(own: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(own)).replace('_', '-')} is .*two networks"):
        check_same_network(settings(), settings(**own), 0.0)
    check_same_network(settings(), settings(**own), 0.1)
    check_same_network(settings(), settings(mamba_chunk=64, loss_chunk_tokens=512, instant_mode="recompute"), 0.0)


def test_a_side_of_an_earlier_version_has_what_it_did_of_what_it_lacks() -> None:
    earlier = settings()
    del earlier["c3o_sphere"], earlier["c3o_nesterov"]
    check_same_learning(earlier, settings(c3o_nesterov=False), 10)
    with pytest.raises(UserError, match="--c3o-sphere"):
        check_same_learning(settings(c3o_sphere=2.0, c3o_nesterov=False), earlier, 10)
    with pytest.raises(UserError, match="--c3o-nesterov is True in A and False in B"):
        check_same_learning(settings(), earlier, 10)


# -- training --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_flags: Flags, tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Records of ten steps as a comparison's sides train them, in bf16."""
    made = 0

    def train(more: str = "") -> list[dict[str, Any]]:
        nonlocal made
        made += 1
        same = f"--dtype bf16 --lr 4e-3 --steps 10 --eval-interval 0 --warmup-steps 0 {more}"
        assert main(tiny_flags(same, run=f"run{made}")) == 0
        return read_records(tmp_path / f"run{made}")

    return train


def test_in_bf16_faults_are_red_and_what_costs_differently_is_green(
    trained: Callable[[str], list[dict[str, Any]]], script: Callable[[str], Any]
) -> None:
    a = trained("")
    for more in ("--batch-size 1 --grad-accum 2", "--instant-mode recompute", "--weights-dtype bf16"):
        gate = Gate.judge(a, trained(more), 10, BF16)
        assert gate.passed, (more, gate.reason)
    gates = {"--lr 1e-9": Gate.judge(a, trained("--lr 1e-9"), 10, BF16)}
    for fault in ("zero gradients", "third step skipped", "half of each step"):
        with script("faults").planted(fault):
            gates[fault] = Gate.judge(a, trained(""), 10, BF16)
    assert {fault: gate.passed for fault, gate in gates.items()} == dict.fromkeys(gates, False)
    assert "gradient norms" in str(gates.pop("zero gradients").reason)
    assert all("the loss fell by" in str(gate.reason) for gate in gates.values())
