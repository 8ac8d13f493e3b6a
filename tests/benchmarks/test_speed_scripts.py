"""Speed claims: peers load without their packages, both sides count alike, gates bite, verdicts can say no."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


GPT = """
from dataclasses import dataclass
import torch, torch.nn as nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 32
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(dict(wte=self.wte, wpe=nn.Embedding(config.block_size, config.n_embd)))
        self.layers = nn.ModuleList(nn.Linear(config.n_embd, 12 * config.n_embd) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)
        print("number of parameters: many")

    def get_num_params(self):
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: False")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        x = self.wte(idx)
        for layer in self.layers:
            x = x + layer(x).unflatten(-1, (12, -1)).mean(-2)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A stand-in for a checkout of nanoGPT: its interface, not its text."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "model.py").write_text(GPT, encoding="utf-8")
    (folder / "train.py").write_text("", encoding="utf-8")
    return folder


def test_nanogpt_is_loaded_from_a_path_and_kept_quiet(
    script: Any, peer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = script("peers")
    model = peers.nanogpt_model(peers.load_nanogpt(peer), n_layer=2)
    assert model.get_num_params() == 32 * 8 + 2 * (8 * 96 + 96)
    assert capsys.readouterr().out == ""
    assert peers.describe(peer, ["model.py"])["commit"] is None
    with pytest.raises(peers.PeerError, match=r"no model\.py"):
        peers.load_nanogpt(peer.parent)


def test_a_mamba_module_loads_without_its_packages_init(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = script("peers")
    for folder in ("", "ops", "ops/triton", "utils"):
        package = tmp_path / "mamba_ssm" / folder
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("raise ImportError('a compiled extension is missing')\n", encoding="utf-8")
    kernels = "from mamba_ssm.utils.torch import answer\nfrom mamba_ssm.ops.triton.other import more\n"
    (tmp_path / "mamba_ssm/ops/triton/ssd.py").write_text(kernels, encoding="utf-8")
    (tmp_path / "mamba_ssm/ops/triton/other.py").write_text("more = 1\n", encoding="utf-8")
    (tmp_path / "mamba_ssm/utils/torch.py").write_text("answer = 42\n", encoding="utf-8")
    try:
        assert peers.load_mamba_module(tmp_path, "ops.triton.ssd").answer == 42
        with pytest.raises(peers.PeerError, match="no mamba_ssm/ops/nothing"):
            peers.load_mamba_module(tmp_path, "ops.nothing")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            del sys.modules[name]


def test_every_side_gets_the_same_tokens(script: Any) -> None:
    steps = script("steps")
    batches = steps.Batches(64, 2, 16, torch.device("cpu"))
    first, second = batches.cycle(), batches.cycle()
    for _ in range(5):
        a, b = next(first), batches.to_device(second)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.inputs[:, 1:], a.targets[:, :-1])
    assert not torch.equal(next(first).inputs, a.inputs)


def test_equal_width_is_the_nearest_and_counts_are_alike(script: Any) -> None:
    steps = script("steps")
    from eco_llm.config import SigmaConfig
    from eco_llm.model.sigma_llm import SigmaLLM

    shape = SigmaConfig(
        d_model=64, n_layers=6, n_heads=2, vocab_size=320, mamba_state_dim=16, kv_latent_dim=32, rope_head_dim=8
    )

    def count(width: int) -> int:
        return SigmaLLM(dataclasses.replace(shape, mlp_hidden_dim=width)).num_parameters()

    goal = count(192) + 1000
    best = steps.equal_mlp_width(shape, goal)
    assert best == min((64 * i for i in range(1, 9)), key=lambda w: abs(count(w) - goal)) == 192
    # A pure-attention SigmaLLM and a plain decoder of the same linear layers count the same FLOPs.
    plain = dataclasses.replace(shape, mamba_ratio=0)
    model = SigmaLLM(plain)
    decoder = nn.ModuleList([m for m in model.modules() if isinstance(m, nn.Linear)])
    decoder.append(nn.Linear(64, 320, bias=False))
    assert steps.gpt_flops_per_token(decoder, 6, 64, 128) == model.flops_per_token(128)


def test_our_step_is_the_trainers_and_learns(script: Any) -> None:
    steps = script("steps")
    from eco_llm.config import RuntimeConfig, SigmaConfig
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(RuntimeConfig(device="cpu"))
    shape = SigmaConfig(
        d_model=32, n_layers=2, n_heads=2, vocab_size=320, mamba_ratio=1, mamba_head_dim=16, mamba_state_dim=16,
        kv_latent_dim=16, rope_head_dim=8,
    )  # fmt: skip
    batches = steps.Batches(320, 2, 32, runtime.device)
    ours = steps.Ours(shape, batches.cycle(), runtime, compile_blocks=False)
    losses = [float(ours.step()) for _ in range(12)]
    assert abs(losses[0] - np.log(320)) < 0.05 * np.log(320)
    assert losses[-1] < losses[0]


def run_script(name: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_against_nanogpt_compares_equal_models_and_refuses_others(peer: Path, tmp_path: Path) -> None:
    tiny = ["--peer", str(peer), "--device", "cpu", "--shape", "2x32", "--eager", "--rounds", "2", "--vocab", "320"]
    done = run_script("against_nanogpt", *tiny, "--width", "128", "--layers", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2x32 nanoGPT compiled" in done.stdout
    assert "no evidence is written" in done.stdout
    done = run_script("against_nanogpt", *tiny, "--width", "64", "--layers", "1", cwd=tmp_path)
    assert done.returncode != 0
    assert "parameters differ" in done.stderr


def test_parity_verdict_separates_noise_from_bias(script: Any) -> None:
    parity = script("loss_parity")
    rng = np.random.default_rng(0)
    truth = 5.0 - np.linspace(0, 2, 500)

    def curve(shift: float = 0.0) -> np.ndarray:
        return np.asarray(truth + shift + rng.normal(0, 0.02, 500))

    references = [curve(), curve(), curve()]
    assert parity.verdict(curve(), references)["difference_over_noise"] <= parity.FACTOR
    biased = parity.verdict(curve(0.05), references)
    assert biased["difference_over_noise"] > parity.FACTOR
    assert biased["tail_difference"] == pytest.approx(0.05, abs=0.01)
    assert parity.verdict(truth, [truth, truth])["difference_over_noise"] == 0.0
    with pytest.raises(script("common").GateError, match="finite"):
        parity.verdict(np.full(500, np.nan), references)


def test_mixer_gate_and_floor(script: Any) -> None:
    mixer = script("mamba_mixer")
    exact = [torch.randn(5, 3) for _ in mixer.NAMES]
    near = [t * 1.01 for t in exact]
    assert max(mixer.gate("x", near, exact, 0.03).values()) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(script("common").GateError, match="dB"):
        mixer.gate("x", [*near[:4], exact[4] * 2, *near[5:]], exact, 0.03)
    with pytest.raises(script("common").GateError, match="ddt"):
        mixer.gate("x", [*near[:2], exact[2] * torch.nan, *near[3:]], exact, 0.03)
    floor = mixer.ssd_floor(16, 1024, 24, 64, 128, 128)
    assert floor["forward_flops"] == 16_384 * (4 * 1536 * 128 + 128 * (128 + 1536))
    assert floor["forward_bytes"] == 16_384 * (2 * 1536 * 2 + 2 * 128 * 2 + 4 * 24)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<…>", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_3", "norms"),
        ("triton_poi_fused_mul_silu_4", "elementwise"),
        ("_update_kernel", "optimizer"),
        ("_address_kernel", "optimizer"),
        ("_stored_norm_kernel", "optimizer"),
        ("walk_kernel", "SSD"),
        ("something new", "other"),
    ],
)
def test_kernels_are_classified(script: Any, kernel: str, name: str) -> None:
    assert script("roofline").class_of(kernel) == name


def test_roofline_floor_counts_what_the_model_counts(script: Any) -> None:
    from eco_llm.config import SigmaConfig
    from eco_llm.model.sigma_llm import SigmaLLM

    shape = SigmaConfig(
        d_model=64, n_layers=6, n_heads=2, vocab_size=320, mamba_state_dim=16, kv_latent_dim=32, rope_head_dim=8
    )
    model = SigmaLLM(shape)
    floors = script("roofline").floors(shape, 2, 128, 64, model.num_parameters())
    flops = sum(floors[name][1] for name in ("matrix products", "attention", "SSD"))
    assert flops == 2 * 128 * model.flops_per_token(128)
    classes = {name for name, _ in script("roofline").CLASSES}
    assert set(floors) <= classes


def test_fp8_padding(script: Any) -> None:
    assert [script("fp8_matmul").padded(n) for n in (768, 3352, 1)] == [768, 3360, 16]
