"""Whole steps: against what GPUs measured, and against what must hold of any estimate."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eco_llm.config import (
    C3OConfig,
    InstantConfig,
    OptimizerConfig,
    RuntimeConfig,
    SigmaConfig,
    TrainConfig,
    TrainingConfig,
)
from eco_llm.errors import UserError
from eco_llm.instant.plan.search import (
    cheapest_modes,
    choose,
    fits,
    job_of,
    largest_batch,
    largest_model,
    last_that_fits,
    make_plan,
    mode_text,
    modes_of,
    scaled,
)
from eco_llm.instant.plan.sizes import Job, Shapes
from eco_llm.instant.plan.step import GIB, context_of, estimate

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
DEFAULT = SigmaConfig()


def job(model: SigmaConfig = DEFAULT, mode: str = "none", batch: int = 4, seq_len: int = 512, **changes: Any) -> Job:
    return Job(model, batch, seq_len, modes_of(mode, model), **changes)


@pytest.mark.parametrize("shape", ["4x512", "32x1024", "1x65536"])
def test_estimates_are_within_one_percent_of_measured_steps(shape: str) -> None:
    """C3O in float32, one CUDA graph: the evidence of benchmarks/against_nanogpt.py."""
    evidence = json.loads((RESULTS / "nvidia-h200" / f"against_nanogpt_{shape}.json").read_text(encoding="utf-8"))
    measured = evidence["summary"]["sigma_peak_memory_gib"]
    batch, seq_len = map(int, re.findall(r"\d+", shape))
    width, chunk = evidence["summary"]["mlp_hidden_dim"], evidence["model"]["loss_chunk_tokens"]
    model = SigmaConfig(vocab_size=50_304, mlp_hidden_dim=width, loss_chunk_tokens=chunk)
    assert Shapes(model).parameters() == evidence["summary"]["sigma_parameters"]
    assert estimate(job(model, batch=batch, seq_len=seq_len)).peak / GIB == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("nvidia-*/plan_accuracy*.json")), ids=lambda p: p.parent.name)
def test_evidence_of_the_plan_holds(file: Path) -> None:
    """Every configuration that benchmarks/plan_accuracy.py measured, estimated anew."""
    evidence = json.loads(file.read_text(encoding="utf-8"))
    samples = evidence["samples"]
    assert len(samples) >= 12
    for sample in samples:
        model = SigmaConfig(**sample["model"])
        one = Job(model, modes=modes_of(sample["mode"], model), **sample["job"])
        peak, measured = estimate(one).peak, sample["measured_peak"]
        assert peak == pytest.approx(measured, rel=0.05), sample["name"]


@pytest.mark.parametrize("mode", ["none", "recompute", "compress", "fixed-point", "coupled", "recompute*9,none*9"])
@pytest.mark.parametrize("compiled", [True, False])
def test_what_holds_of_every_estimate(mode: str, compiled: bool) -> None:
    one = job(mode=mode, batch=8, seq_len=1024, compiled=compiled)
    found = estimate(one)
    assert found.peak == sum(found.by_kind.values())
    assert found.peak <= found.reserved < found.total
    weights = 4 * Shapes(DEFAULT).parameters()
    assert weights <= found.by_kind["weights"] <= 1.05 * weights
    assert found.by_kind["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert estimate(one.replace(batch=16)).peak > found.peak
    assert estimate(one.replace(state_bytes=2.0625)).peak < found.peak - 5 * Shapes(DEFAULT).parameters()
    assert estimate(one.replace(weight_bytes=2)).peak < found.peak
    # Released gradients leave other gaps, whose rests may be a little larger.
    released = estimate(one.replace(release=True))
    assert released.peak <= 1.001 * found.peak
    assert released.by_kind["gradients"] <= found.by_kind["gradients"]
    # A micro-step that finds gradients holds them all from the start.
    assert estimate(one.replace(grad_accum=2)).by_kind["gradients"] >= 0.99 * weights


def test_modes_save_what_they_are_for() -> None:
    peaks = {
        m: estimate(job(mode=m, batch=32, seq_len=1024)).peak for m in ("none", "recompute", "compress", "coupled")
    }
    assert peaks["coupled"] < peaks["recompute"] < peaks["compress"] < peaks["none"]
    four = estimate(job(mode="compress", batch=32, seq_len=1024, bits=4)).peak
    assert four < peaks["compress"]
    assert estimate(job(mode="fixed-point", batch=32, seq_len=1024)).peak >= peaks["recompute"]  # it begins as that


def test_coupled_activations_do_not_grow_with_depth() -> None:
    def beside_parameters(layers: int) -> int:
        model = SigmaConfig(n_layers=layers)
        found = estimate(job(model, "coupled", batch=32, seq_len=1024))
        return found.by_kind["activations"] + found.by_kind["temporaries"]

    assert beside_parameters(48) == pytest.approx(beside_parameters(12), rel=0.02)


def test_validation_takes_little_beside_a_graph() -> None:
    """It scores some thousand tokens at once and keeps no casts of weights: 36 layers, and 64 sequences."""
    wide = SigmaConfig(d_model=1536, n_heads=24, n_layers=36)
    for one in (job(wide, "coupled", batch=1, seq_len=1024), job(SigmaConfig(), "recompute", batch=64, seq_len=1024)):
        for graph in (False, True):
            this = one.replace(compiled=False, graph=graph)
            scored, trained = estimate(this), estimate(this.replace(evaluates=False))
            assert scored.peak - trained.peak <= (0.2 * GIB if graph else 0)  # beside a graph's gradients, which stay
            assert scored.reserved - trained.reserved <= (0.4 * GIB if graph else 0)


def test_released_gradients_are_never_all_there() -> None:
    model = SigmaConfig(n_layers=36, vocab_size=1024)
    assert estimate(job(model, "recompute", release=True)).by_kind["gradients"] < 0.1 * 4 * Shapes(model).parameters()


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("most", [1, 2, 5, 8, 64, 1000])
def test_last_that_fits(limit: int, most: int) -> None:
    assert last_that_fits(lambda n: n <= limit, most) == min(limit, most)
    assert last_that_fits(lambda n: False, most) == 0


@pytest.mark.parametrize("mode", ["none", "recompute", "coupled"])
def test_the_largest_batch_fits_and_one_more_does_not(mode: str) -> None:
    one = job(mode=mode, seq_len=1024)
    most = largest_batch(one, 8.0)
    assert most > 4
    assert fits(one.replace(batch=most), 8.0)
    assert not fits(one.replace(batch=most + 1), 8.0)
    assert largest_batch(one, 1.0) == 0


@pytest.mark.parametrize(("holes", "most"), [((), 70), ((71, 72, 73), 74), (range(71, 75), 75), (range(71, 76), 70)])
def test_what_fits_is_looked_for_beyond_a_gap(
    holes: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bisection ends at 70, the number before the first that does not fit."""
    last = max(holes, default=69) + 1
    monkeypatch.setattr(
        "eco_llm.instant.plan.search.fits", lambda job, gib: job.batch <= last and job.batch not in holes
    )
    assert largest_batch(job(), 8.0) == most
    assert last_that_fits(lambda n: n <= last and n not in holes, 1000) == most
    assert last_that_fits(lambda n: n <= last and n not in holes, 72) == (72 if last >= 72 and 72 not in holes else 70)


def test_the_largest_model_fits_and_the_next_does_not() -> None:
    one = job(mode="coupled", batch=1, seq_len=1024, state_bytes=2.0625, weight_bytes=2, release=True)
    found = largest_model(one, "coupled", 8.0)
    assert found is not None
    size = found.n_heads
    assert found == scaled(DEFAULT, size)
    found.validate()
    assert fits(one.replace(model=found, modes=modes_of("coupled", found)), 8.0)
    more = scaled(DEFAULT, size + 1)
    assert not fits(one.replace(model=more, modes=modes_of("coupled", more)), 8.0)
    assert found.d_model // found.n_heads == DEFAULT.d_model // DEFAULT.n_heads
    assert largest_model(one, "none", 0.6) is None


def test_scaling_stops_widening_where_the_kernels_do() -> None:
    assert scaled(DEFAULT, 12) == DEFAULT
    widest, deeper = scaled(DEFAULT, 64), scaled(DEFAULT, 80)
    assert widest.mamba_inner_dim == 8192
    assert deeper.d_model == widest.d_model
    assert deeper.n_layers == 120


def test_the_cheapest_modes_that_fit() -> None:
    one = job(batch=32, seq_len=1024)
    totals = {m: estimate(job(mode=m, batch=32, seq_len=1024)).total / GIB for m in ("none", "recompute", "coupled")}
    assert cheapest_modes(one, totals["none"] + 0.01) == ("none",) * 18
    between = cheapest_modes(one, (totals["none"] + totals["recompute"]) / 2)
    assert between is not None
    count = between.count("recompute")
    assert between == ("recompute",) * count + ("none",) * (18 - count)
    assert 0 < count < 18
    fewer = ("recompute",) * (count - 1) + ("none",) * (19 - count)
    assert not fits(one.replace(modes=fewer), (totals["none"] + totals["recompute"]) / 2)
    assert cheapest_modes(one, (totals["recompute"] + totals["coupled"]) / 2) == ("coupled",) * 18
    assert cheapest_modes(one, totals["coupled"] - 0.01) is None


@pytest.mark.parametrize("text", ["none", "coupled", "recompute*9,none*9", "none*1,recompute*16,none*1"])
def test_mode_text_is_what_the_flag_takes(text: str) -> None:
    assert mode_text(modes_of(text, DEFAULT)) == text


def config(**changes: Any) -> TrainConfig:
    instant = {
        "vram_gib": 8.0,
        **{k: v for k, v in changes.items() if k in ("instant_mode", "vram_gib", "instant_bits")},
    }
    return TrainConfig(
        training=TrainingConfig(batch_size=changes.get("batch_size", 4), seq_len=1024),
        runtime=RuntimeConfig(device=changes.get("device", "auto"), weights_dtype=changes.get("weights", "fp32")),
        optimizer=OptimizerConfig(optimizer=changes.get("optimizer", "c3o")),
        c3o=C3OConfig(
            c3o_credit_gain=changes.get("credit", 0.0),
            c3o_state_dtype=changes.get("state", "fp32"),
            c3o_error_bits=changes.get("error_bits", 0),
        ),
        instant=InstantConfig(**instant),
    )


def test_settings_become_a_job() -> None:
    found = job_of(config(state="bf16", batch_size=3, instant_mode="compress", instant_bits="4"))
    assert (found.batch, found.seq_len, found.state_bytes, found.bits) == (3, 1024, 4.0, 4)
    assert not found.compiles  # nothing asked: a captured step, of whole blocks
    assert found.graph
    assert set(found.modes) == {"compress"}


def test_adamw_keeps_its_moments_in_the_type_of_the_weight() -> None:
    wide, narrow = (estimate(job_of(config(optimizer="adamw", weights=w))) for w in ("fp32", "bf16"))
    numbers = Shapes(DEFAULT).parameters()
    assert wide.by_kind["optimizer"] == pytest.approx(8 * numbers, rel=0.005)
    assert narrow.by_kind["optimizer"] == pytest.approx(4 * numbers, rel=0.03)  # vectors stay in float32


def test_error_bits_are_a_byte_for_every_number_of_a_matrix() -> None:
    plain, exact = (estimate(job_of(config(state="int4", weights="bf16", error_bits=n))) for n in (0, 8))
    numbers = Shapes(DEFAULT).parameters()
    assert exact.by_kind["optimizer"] - plain.by_kind["optimizer"] == pytest.approx(numbers, rel=0.005)


def test_a_graph_takes_more_outside_the_allocator() -> None:
    one = job()
    for each in (one, one.replace(graph=False)):
        found = estimate(each)
        assert found.total - found.reserved == context_of(each)
    assert context_of(one) > context_of(one.replace(graph=False)) > 0.7 * GIB


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "cpu"}, "--device cpu"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"credit": 1.0}, "--c3o-credit-gain"),
        ({"vram_gib": 0.0}, "--vram-gib"),
    ],
)
def test_what_is_not_foretold_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_plan(config(**changes))


def test_auto_becomes_the_modes_that_fit() -> None:
    chosen = choose(config(instant_mode="auto", batch_size=16))
    assert re.fullmatch(r"recompute\*\d+,none\*\d+", chosen.instant.instant_mode)
    chosen.validate()
    assert choose(chosen) is chosen
    assert choose(config(instant_mode="auto", batch_size=4)).instant.instant_mode == "none"
    with pytest.raises(UserError, match=r"takes \d+\.\d GiB at least"):
        choose(config(instant_mode="auto", batch_size=512))
    with pytest.raises(UserError, match="--vram-gib"):
        config(instant_mode="auto", vram_gib=0.0).validate()


def test_auto_is_chosen_for_the_shape_and_type_that_are_trained() -> None:
    one = config(instant_mode="auto", batch_size=12, vram_gib=8.0)
    plain, wide = choose(one), choose(one, compute_bytes=4)
    large = choose(one, model=dataclasses.replace(one.model, vocab_size=128_256))
    counts = [Counter(x.instant.block_modes(x.model.mixer_pattern))["none"] for x in (plain, wide, large)]
    assert counts[0] > max(counts[1:])


@pytest.mark.parametrize(
    "changes", [{"n_heads": 16}, {"attention_ratio": 0, "d_model": 1024}, {"attention_ratio": 0, "n_heads": 5}], ids=str
)
def test_sizes_that_cannot_be_built_do_not_end_the_search(changes: dict[str, int]) -> None:
    """48·2·n channels with n odd are no whole number of Mamba's heads of 64; without attention its heads scale."""
    model = dataclasses.replace(DEFAULT, **changes)
    one = job(batch=1, seq_len=1024).replace(model=model)
    found = largest_model(one.replace(modes=("none",) * model.n_layers), "none", 8.0)
    assert found is not None
    assert Shapes(found).parameters() > Shapes(model).parameters()
    found.validate()
    now = model.d_model // (model.d_model // model.n_heads if "n_heads" in changes and len(changes) == 1 else 64)
    assert scaled(model, now) == model


def test_a_plan_lists_every_mode_and_the_modes_it_chose() -> None:
    plan = make_plan(config(instant_mode="auto", batch_size=16))
    assert {"none", "recompute", "compress", "fixed-point", "coupled"} < {c.mode for c in plan.candidates}
    assert plan.chosen is not None
    assert mode_text(plan.chosen) in {c.mode for c in plan.candidates}
    assert all(c.fits == (c.estimate.total <= 8 * GIB) for c in plan.candidates)
    assert [mode for mode, _ in plan.models] == ["none", "recompute", "coupled"]
    assert make_plan(config(batch_size=512)).chosen is None


def test_growing_segments_leave_smaller_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job_of(config(instant_mode="recompute", batch_size=32))
    assert not one.expandable
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,roundup_power2_divisions:4")
    grown = job_of(config(instant_mode="recompute", batch_size=32))
    assert grown.expandable
    assert estimate(grown).reserved < estimate(one).reserved
    assert estimate(grown).peak <= estimate(one).peak
