"""The settings: derived shapes, refusals, and what may change when a run is resumed."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from eco_llm.config import (
    FREE_ON_RESUME,
    C3OConfig,
    DataConfig,
    InstantConfig,
    OptimizerConfig,
    PerfConfig,
    RuntimeConfig,
    SigmaConfig,
    TrainConfig,
    TrainingConfig,
    differences,
    flatten,
    from_dict,
    to_dict,
)
from eco_llm.errors import UserError

GROUPS = (
    TrainingConfig, SigmaConfig, DataConfig, OptimizerConfig, C3OConfig, RuntimeConfig, InstantConfig, PerfConfig,
)  # fmt: skip


def with_settings(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` with fields replaced, whichever group they are in."""
    for group in dataclasses.fields(config):
        old = getattr(config, group.name)
        mine = {k: v for k, v in changes.items() if hasattr(old, k)}
        config = dataclasses.replace(config, **{group.name: dataclasses.replace(old, **mine)})
    assert changes.items() <= flatten(config).items()
    return config


def other_value(value: Any) -> Any:
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (*value, "x") if isinstance(value, tuple) else value + "x"


def test_the_defaults_are_valid() -> None:
    TrainConfig().validate()


@pytest.mark.parametrize(
    ("mamba", "attention", "layers", "pattern"),
    [
        (5, 1, 18, "mmmmmA" * 3),
        (5, 1, 7, "mmmmmAm"),
        (2, 2, 6, "mmAAmm"),
        (1, 0, 3, "mmm"),
        (0, 1, 3, "AAA"),
        (7, 1, 4, "mmmm"),
        (0, 3, 2, "AA"),
    ],
)
def test_mixer_pattern(mamba: int, attention: int, layers: int, pattern: str) -> None:
    config = SigmaConfig(n_layers=layers, mamba_ratio=mamba, attention_ratio=attention)
    assert "".join({"mamba": "m", "mla": "A"}[mixer] for mixer in config.mixer_pattern) == pattern


@pytest.mark.parametrize("d_model", [8, 24, 64, 72, 96, 384, 512, 768, 1000, 1024])
def test_mlp_width_is_the_next_multiple_of_64(d_model: int) -> None:
    width = SigmaConfig(d_model=d_model).mlp_dim
    assert width % 64 == 0
    assert 0 <= width - 8 * d_model / 3 < 64


def test_derived_widths() -> None:
    config = SigmaConfig()
    assert (config.mlp_dim, config.head_dim, config.mamba_inner_dim, config.mamba_n_heads) == (2048, 64, 1536, 24)
    assert SigmaConfig(mlp_hidden_dim=100).mlp_dim == 100


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"d_model": 770}, "--n-heads"),
        ({"d_model": 2048, "n_heads": 8}, "limit is 128"),
        ({"rope_head_dim": 31}, "--rope-head-dim"),
        ({"rope_head_dim": 64}, "--rope-head-dim"),
        ({"mamba_head_dim": 100}, "--mamba-head-dim"),
        ({"mamba_ratio": 0, "attention_ratio": 0}, "--mamba-ratio and --attention-ratio"),
        ({"d_model": -1}, "--d-model"),
        ({"n_layers": 0}, "--n-layers"),
        ({"norm_eps": math.nan}, "--norm-eps"),
        ({"data": ()}, "--data"),
        ({"data": ("stdlib", " ")}, "--data"),
        ({"text_field": ""}, "--text-field"),
        ({"val_fraction": 0.0}, "--val-fraction"),
        ({"lr": math.nan}, "--lr"),
        ({"lr": math.inf}, "--lr"),
        ({"lr": -1e-3}, "--lr"),
        ({"beta2": 1.0}, "--beta2"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"c3o_trust_radius": -1.0}, "--c3o-trust-radius"),
        ({"c3o_trust_norm_refresh_drift": 1.0}, "--c3o-trust-norm-refresh-drift"),
        ({"c3o_sphere": -1.0}, "--c3o-sphere"),
        ({"c3o_sphere": 100.0, "lr": 1e-2}, "--c3o-sphere 100 × --lr 0.01"),
        ({"steps": 0}, "--steps"),
        ({"seed": 2**63}, "--seed"),
        ({"batch_size": 65_536, "seq_len": 1_048_576}, "--batch-size × --seq-len"),
        ({"output_dir": " "}, "--output-dir"),
        ({"device": "tpu"}, "--device"),
        ({"device": "cpu:0"}, "--device"),
        ({"device": "cuda:x"}, "--device"),
        ({"perf_measure_steps": 0}, "--perf-measure-steps"),
        ({"perf_profile_enable": True, "steps": 5}, "--perf-warmup-steps"),
        (
            {"perf_profiler_steps": 2},
            "--perf-profiler-steps 2 traces steps after the measured window: add --perf-profile-enable",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError) as caught:
        with_settings(TrainConfig(), **changes).validate()
    assert flag in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shape_rules_of_a_mixer_bind_only_where_it_is_used() -> None:
    SigmaConfig(attention_ratio=0, n_heads=7).validate()
    SigmaConfig(mamba_ratio=0, mamba_head_dim=100).validate()
    SigmaConfig(n_layers=5, n_heads=7).validate()  # 5 : 1, and the MLA would be the sixth


def test_the_reports_perf_run_is_accepted() -> None:
    with_settings(
        TrainConfig(),
        steps=3,
        perf_profile_enable=True,
        perf_warmup_steps=1,
        perf_measure_steps=2,
        perf_profiler_steps=2,
    ).validate()


def test_names_are_unique_across_groups() -> None:
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert set(flatten(TrainConfig())) == set(names)
    assert {type(getattr(TrainConfig(), f.name)) for f in dataclasses.fields(TrainConfig)} == set(GROUPS)


def test_every_free_setting_exists() -> None:
    assert set(flatten(TrainConfig())) >= FREE_ON_RESUME


@pytest.mark.parametrize("name", sorted(flatten(TrainConfig())))
def test_differences_sees_every_setting_but_the_free_ones(name: str) -> None:
    old = TrainConfig()
    value = flatten(old)[name]
    new = with_settings(old, **{name: other_value(value)})
    expected = {} if name in FREE_ON_RESUME else {name: (value, other_value(value))}
    assert differences(old, new) == expected


@pytest.mark.parametrize(
    "name",
    ["seed", "batch_size", "seq_len", "grad_accum", "d_model", "text_field", "tokenizer", "lr", "optimizer", "dtype"],
)
def test_what_decides_the_result_is_not_free(name: str) -> None:
    assert name not in FREE_ON_RESUME
    assert name in flatten(TrainConfig())


def test_the_dictionary_survives_json() -> None:
    config = with_settings(TrainConfig(), data=("a", "b"), mamba_chunk=128, lr=0.1 + 0.2)
    again = from_dict(json.loads(json.dumps(to_dict(config))), source="config.json")
    assert again == config
    assert differences(config, again) == {}


def test_sections_and_settings_that_are_not_ours_are_refused() -> None:
    raw = to_dict(TrainConfig())
    with pytest.raises(UserError, match=r"config\.json: unknown setting 'd_modle' in 'model'"):
        from_dict({**raw, "model": {**raw["model"], "d_modle": 1}}, source="config.json")
    with pytest.raises(UserError, match=r"config\.json: no section 'perf'"):
        from_dict({k: v for k, v in raw.items() if k != "perf"}, source="config.json")
    with pytest.raises(UserError, match=r"config\.json: no section 'data'"):
        from_dict({**raw, "data": 3}, source="config.json")


def test_runs_of_earlier_versions_take_the_defaults_of_later_settings() -> None:
    raw = to_dict(TrainConfig())
    del raw["runtime"]["cuda_graph"], raw["runtime"]["weights_dtype"], raw["optimizer"]["gradient_release"]
    assert from_dict(raw, source="config.json") == TrainConfig()
    del raw["c3o"]["c3o_nesterov"]  # whose default is not what they did
    earlier = from_dict(raw, source="config.json")
    assert earlier == with_settings(TrainConfig(), c3o_nesterov=False)
    assert differences(earlier, TrainConfig()) == {"c3o_nesterov": (False, True)}
    del raw["runtime"]["dtype"]
    with pytest.raises(UserError, match="no setting 'dtype'"):
        from_dict(raw, source="config.json")


def test_a_setting_that_is_gone_may_have_been_off() -> None:
    raw = to_dict(TrainConfig())
    raw["c3o"]["c3o_cautious"] = False
    assert from_dict(raw, source="config.json") == TrainConfig()
    raw["c3o"]["c3o_cautious"] = True
    with pytest.raises(
        UserError, match=r"config\.json: 'c3o_cautious' is True, a setting that this version no longer has"
    ):
        from_dict(raw, source="config.json")
