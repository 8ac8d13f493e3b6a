"""Flags to configuration: types, overriding, switches, and one-line refusals."""

from __future__ import annotations

import dataclasses

import pytest

from eco_llm.cli.doctor import DoctorCommand
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig, flatten, from_dict, to_dict
from eco_llm.errors import UserError


def parsed(line: str) -> TrainConfig:
    return parse(TrainConfig, line.split(), prog="eco_train train")


def test_no_flag_gives_the_defaults() -> None:
    assert parsed("") == TrainConfig()


def test_the_last_of_repeated_flags_wins() -> None:
    assert parsed("--steps 3 --lr 1 --steps 7").training.steps == 7
    assert parsed("--no-resume --resume").training.resume is True


def test_many_values_equals_sign_and_underscores() -> None:
    config = parsed("--data a b c --lr=0.5 --batch_size 3 --mamba-chunk 128")
    assert config.data.data == ("a", "b", "c")
    assert (config.optimizer.lr, config.training.batch_size, config.model.mamba_chunk) == (0.5, 3, 128)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("", "auto"),
        ("--torch-compile", "on"),
        ("--no-torch-compile", "off"),
        ("--torch-compile --steps 3", "on"),
        ("--torch-compile auto", "auto"),
        ("--torch-compile --no-torch-compile", "off"),
    ],
)
def test_torch_compile_is_a_switch_whose_default_is_auto(line: str, value: str) -> None:
    assert parsed(line).runtime.torch_compile == value


def test_every_flag_of_the_design_is_there() -> None:
    flags = (
        "d_model n_layers n_heads seq_len batch_size kv_latent_dim mamba_ratio attention_ratio optimizer lr"
        " weight_decay device seed steps data tokenizer output_dir save_interval log_interval resume torch_compile"
        " perf_profile_enable perf_warmup_steps perf_measure_steps perf_profiler_steps perf_device_time_mode"
        " perf_sync_boundaries c3o_trust_norm_refresh_drift c3o_trust_norm_refresh_steps"
    )
    assert set(flags.split()) <= set(flatten(TrainConfig()))


def test_flag_names_are_unique_across_groups() -> None:
    config = TrainConfig()
    total = sum(len(dataclasses.fields(getattr(config, g.name))) for g in dataclasses.fields(config))
    assert len(flatten(config)) == total


def test_dashes_alone_make_no_flag_a_near_one() -> None:
    with pytest.raises(UserError) as refused:
        parse(DoctorCommand, ["--nope"], prog="eco_train doctor")
    assert str(refused.value) == "unknown flag --nope"
    with pytest.raises(UserError, match="unknown flag --jsno; perhaps you meant --json"):
        parse(DoctorCommand, ["--jsno"], prog="eco_train doctor")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stepz 3", "unknown flag --stepz; perhaps you meant --steps"),
        ("--lrate=3", "unknown flag --lrate; perhaps you meant --"),
        ("--no-torch-compiel", "perhaps you meant --no-torch-compile"),
        ("--zzzzqqq 3", "unknown flag --zzzzqqq"),
        ("--no-torch_compiel", "perhaps you meant --no-torch-compile"),
        ("stray", "unexpected argument 'stray'"),
        ("--steps 3x", "--steps: '3x' is not a whole number"),
        ("--steps 3.5", "--steps: '3.5' is not a whole number"),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--steps", "--steps needs a value"),
        ("--optimizer sgd", "--optimizer 'sgd' is not one of c3o, adamw, muon"),
        ("--torch-compile maybe", "'maybe' is not one of auto, on, off"),
        ("--mamba-chunk 100", "--mamba-chunk '100' is not one of auto, 64, 128, 256"),
    ],
)
def test_bad_words_are_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parsed(line)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr nan", "--lr must be between 0 and 100, got nan"),
        ("--lr inf", "--lr must be between"),
        ("--lr -1", "--lr must be between"),
        ("--steps 0", "--steps must be between 1 and"),
        ("--steps -3", "--steps must be between"),
        ("--steps 99999999999999999999", "--steps must be between"),
        ("--d-model 1000000000000", "--d-model must be between"),
        ("--d-model 100 --n-heads 12", "--d-model 100 is not divisible by --n-heads 12"),
        ("--d-model 4096 --n-heads 8", "heads of width 512; the limit is 128"),
        ("--rope-head-dim 7", "--rope-head-dim 7 must be even"),
        ("--rope-head-dim 64", "smaller than the head width 64"),
        ("--mamba-ratio 0 --attention-ratio 0", "both 0"),
        ("--mamba-head-dim 100", "not divisible by --mamba-head-dim 100"),
        ("--vocab-size 100", "--vocab-size must be between 257"),
        ("--beta2 1.0", "--beta2 must be between"),
        ("--val-fraction 0", "--val-fraction must be between"),
        ("--c3o-trust-radius nan", "--c3o-trust-radius must be between"),
        ("--device tpu", "--device 'tpu' is not one of"),
        ("--device cpu:1", "--device 'cpu:1' is not one of"),
        ("--batch-size 65536 --seq-len 1048576", "--batch-size × --seq-len"),
        (
            "--steps 5 --perf-profile-enable",
            "--perf-warmup-steps 10 + --perf-measure-steps 20 exceed --steps 5",
        ),
    ],
)
def test_impossible_values_are_refused_by_validate(line: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parsed(line).validate()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_defaults_are_valid_and_survive_json() -> None:
    import json

    TrainConfig().validate()
    assert from_dict(json.loads(json.dumps(to_dict(TrainConfig()))), source="x") == TrainConfig()


def test_a_settings_file_from_elsewhere_is_refused() -> None:
    raw = to_dict(TrainConfig())
    raw["model"]["d_modle"] = 3
    with pytest.raises(UserError, match="x: unknown setting 'd_modle' in 'model'"):
        from_dict(raw, source="x")
    with pytest.raises(UserError, match="x: no section 'training'"):
        from_dict({}, source="x")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "d_model", None),
        ("model", "d_model", 3.0),
        ("model", "mamba_chunk", 100),
        ("model", "tie_embeddings", 1),
        ("optimizer", "lr", "fast"),
        ("optimizer", "optimizer", "sgd"),
        ("data", "data", "stdlib"),
        ("data", "data", [1]),
    ],
)
def test_a_damaged_settings_file_is_refused(group: str, name: str, value: object) -> None:
    raw = to_dict(TrainConfig())
    raw[group][name] = value
    with pytest.raises(UserError, match=f"x: '{name}' in '{group}' cannot be"):
        from_dict(raw, source="x")
    del raw[group][name]
    with pytest.raises(UserError, match=f"x: no setting '{name}' in '{group}'"):
        from_dict(raw, source="x")
