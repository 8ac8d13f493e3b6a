"""instant_modes, depth_memory: rows mean what they say, the peer's loss in chunks is its loss, depth is added up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eco_llm.config import InstantConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
from eco_llm.errors import UserError
from eco_llm.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]


# ---- rows --------------------------------------------------------------------------------------------------------

MIXERS = SigmaConfig(n_layers=18).mixer_pattern


def test_rows_run_as_written_each_at_its_shapes(script: Any) -> None:
    modes = script("instant_modes")
    rows = modes.parse_rows(
        "none*3,recompute*15@16x1024,32x1024; compress 4 bits;nanoGPT chunked loss recompute @ 64x1024;auto@8x1024",
        "1x8192,2x8192", MIXERS, 8.0,
    )  # fmt: skip
    assert [(row.name, row.shape) for row in rows] == [
        ("none*3,recompute*15", "16x1024"), ("none*3,recompute*15", "32x1024"), ("compress 4 bits", "1x8192"),
        ("compress 4 bits", "2x8192"), ("nanoGPT chunked loss recompute", "64x1024"), ("auto", "8x1024"),
    ]  # fmt: skip
    assert [row.is_peer for row in rows] == [False] * 4 + [True, False]
    assert rows[0].instant().block_modes(MIXERS) == ("none",) * 3 + ("recompute",) * 15
    assert rows[2].instant() == InstantConfig(instant_mode="compress", instant_bits="4")
    assert (rows[2].batch, rows[2].length) == (1, 8192)


@pytest.mark.parametrize(
    ("rows", "cap", "message"),
    [
        ("none*3,recompute*14", 0.0, "is for 17 blocks, not for 18"),
        ("none*9,coupled*9", 0.0, "whole stack"),
        ("nonsense", 0.0, "is not one of"),
        ("nanoGPT fast", 0.0, "is not one of nanoGPT"),
        ("recompute 4 bits", 0.0, "only compress has bits"),
        ("auto", 0.0, "needs --cap-gib"),
        ("none@16x", 8.0, "is not sequences x tokens"),
        ("none@0x16", 8.0, "is not sequences x tokens"),
        ("none;none@1x8192", 8.0, "twice"),
        ("none;", 8.0, "is not one of"),
    ],
)
def test_rows_that_mean_nothing_are_refused(script: Any, rows: str, cap: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        script("instant_modes").parse_rows(rows, "1x8192", MIXERS, cap)


def test_a_run_under_a_cap_has_a_file_of_its_own(script: Any) -> None:
    name = script("instant_modes").evidence_name
    assert [name("", 0.0), name("", 8.0), name("", 7.5), name("x", 8.0)] == [
        "instant_modes", "instant_modes_8gib", "instant_modes_7_5gib", "instant_modes_x",
    ]  # fmt: skip
    with pytest.raises(UserError, match="lower-case"):
        name("../x", 0.0)


def test_auto_is_what_the_plan_gives_a_user(script: Any) -> None:
    modes = script("instant_modes")
    shape = SigmaConfig(d_model=768, n_layers=18, n_heads=12, vocab_size=50_304, mlp_hidden_dim=1600)
    found = modes.planned(shape, modes.Row("auto", 16, 1024), 8.0, graph=True)
    assert {"none", "recompute"} == set(found.block_modes(shape.mixer_pattern))
    assert modes.planned(shape, modes.Row("auto", 1, 1024), 8.0, graph=True).instant_mode == "none"
    with pytest.raises(UserError, match="GiB at least"):
        modes.planned(shape, modes.Row("auto", 512, 1024), 8.0, graph=True)


def test_the_table_is_by_shape_and_marks_the_fastest_under_a_cap(script: Any) -> None:
    modes = script("instant_modes")

    def sample(row: str, shape: str, speed: float, **more: Any) -> dict[str, Any]:
        memory = {"peak_gib": 5.0, "reserved_gib": 6.0}
        return {"row": row, "shape": shape, "tokens_per_s": speed, "commit": "abcdefghij", **memory, **more}

    samples = [
        sample("auto", "16x1024", 3000.0, modes="recompute*8,none*10"), sample("recompute", "8x1024", 2000.0),
        sample("nanoGPT recompute", "16x1024", 2500.0), {"row": "nanoGPT", "shape": "8x1024", "out_of_memory": True},
        {"row": "nanoGPT recompute", "shape": "8x1024", "out_of_memory": True, "reserved_before_gib": 0.83},
        sample("none", "1x8192", 100.0),
    ]  # fmt: skip
    table = modes.table(samples, 8.0)
    assert table["rows"] == [
        ["8x1024", "recompute", "2,000", "5.00", "6.00", "abcdefgh"],
        ["8x1024", "nanoGPT", "does not fit", "", "", ""],
        ["8x1024", "nanoGPT recompute", "? (0.83 GiB held before)", "", "", ""],
        ["16x1024", "auto: recompute*8,none*10", "**3,000**", "5.00", "6.00", "abcdefgh"],
        ["16x1024", "nanoGPT recompute", "**2,500**", "5.00", "6.00", "abcdefgh"],
        ["1x8192", "none", "**100**", "5.00", "6.00", "abcdefgh"],
    ]
    assert all(len(row) == len(table["header"]) for row in table["rows"])
    assert not any("**" in cell for row in modes.table(samples, 0.0)["rows"] for cell in row)
    assert modes.fastest(samples) == {
        "ours_t1024": ("16x1024", "auto"), "peer_t1024": ("16x1024", "nanoGPT recompute"),
        "ours_t8192": ("1x8192", "none"),
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("instant_modes", ["--peer", "x", "--rows", "none*3"], "is for 3 blocks"),
        ("instant_modes", ["--peer", "x"], "no CUDA device"),
        ("depth_memory", [], "needs a CUDA device"),
    ],
)
def test_refusals_are_one_line(name: str, flags: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not done.stdout


# ---- the peer's chunked loss -------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A stand-in with nanoGPT's names: `transformer` and `lm_head`, tied, loss from all logits."""

    def __init__(self) -> None:
        super().__init__()
        width, vocab = 16, 50
        blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2))
        parts = {
            "wte": nn.Embedding(vocab, width),
            "wpe": nn.Embedding(64, width),
            "drop": nn.Dropout(0.0),
            "h": blocks,
        }
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(width)})
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # type: ignore[assignment]

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        t = self.transformer
        x = t.drop(t.wte(inputs) + t.wpe(torch.arange(inputs.shape[1])))
        for block in t.h:  # type: ignore[union-attr]
            x = block(x)
        logits = self.lm_head(t.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Decoder().to(dtype)
    return model, torch.randint(50, (3, 63)), torch.randint(50, (3, 63))


@pytest.mark.parametrize("rows", [1, 17, 63, 189, 4096])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_in_chunks_is_the_peers_loss_with_its_gradients(script: Any, rows: int, recompute: bool) -> None:
    peers = script("peers")
    model, inputs, targets = drawn(torch.float64)
    _, plain = model(inputs, targets)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    if recompute:
        peers.recompute_blocks(model)
    loss = peers.chunked_loss(model, rows=rows, compiled=False)(inputs, targets)
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_chunk_keeps_its_logits_for_backward(script: Any) -> None:
    model, inputs, targets = drawn()
    kept: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        script("peers").chunked_loss(model, rows=40, compiled=False)(inputs, targets)
    assert kept
    assert not [shape for shape in kept if len(shape) == 2 and shape[0] <= 40 and shape[1] == 50]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(inputs, targets)
    assert torch.Size([189, 50]) in kept, "the plain loss keeps them: else this test sees nothing"


def test_the_gate_passes_equals_bites_and_leaves_no_gradients(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, error = script("peers"), script("common").GateError
    model, inputs, targets = drawn()
    peers.require_equal_loss(model, inputs, targets, loss=1e-6, gradient=1e-5)
    assert all(p.grad is None for p in model.parameters())
    real = peers.chunked_loss

    def wrong(scale: float, slope: float) -> None:
        def off(*args: Any, **kwargs: Any) -> Any:
            loss = real(*args, **kwargs)

            def changed(x: Tensor, y: Tensor) -> Tensor:
                value = loss(x, y)
                return value.detach() * scale + (value - value.detach()) * slope

            return changed

        monkeypatch.setattr(peers, "chunked_loss", off)

    wrong(1.01, 1.0)
    with pytest.raises(error, match="loss in chunks differs"):
        peers.require_equal_loss(model, inputs, targets, loss=1e-3, gradient=1e-2)
    wrong(1.0, 1.05)
    with pytest.raises(error, match="gradient of the loss in chunks differs"):
        peers.require_equal_loss(model, inputs, targets, loss=1e-3, gradient=1e-2)


# ---- depth -------------------------------------------------------------------------------------------------------


def test_unexplained_is_a_share_of_the_growth(script: Any) -> None:
    share = script("depth_memory").unexplained
    assert share((100, 300), (50, 250)) == 0.0
    assert share((100, 300), (50, 150)) == pytest.approx(0.5)
    assert share((100, 300), (50, 270)) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="did not grow"):
        share((300, 300), (50, 250))


@pytest.mark.parametrize("release", [False, True])
def test_what_is_counted_is_what_there_is(script: Any, release: bool) -> None:
    runtime = Runtime.detect(RuntimeConfig(device="cpu"))
    shape = SigmaConfig(
        d_model=32, n_layers=2, n_heads=2, vocab_size=320, mamba_ratio=1, mamba_head_dim=16, mamba_state_dim=16,
        kv_latent_dim=16, rope_head_dim=8,
    )  # fmt: skip
    steps, depth = script("steps"), script("depth_memory")
    side = steps.Ours(
        shape, steps.Batches(320, 2, 32, runtime.device).cycle(), runtime, compile_blocks=False, graph=False,
        instant=InstantConfig(instant_mode="coupled"), release=release, settings=OptimizerConfig(grad_clip=0.0),
    )  # fmt: skip
    side.step()
    found = depth.counted(side)
    weights = 4 * side.model.num_parameters()
    assert found["parameters"] == weights
    moments = sum(2 * 4 * 4096 * -(-p.numel() // 4096) for p in side.model.parameters())  # laid out in rows of 4096
    tensors = len(list(side.model.parameters()))
    assert moments < found["optimizer_state"] <= moments + 64 * tensors, (
        "two float32 moments, and a few numbers a tensor"
    )
    if release:
        units = [sum(p.nbytes for p in unit) for unit in side.model.update_units()]
        assert found["gradients"] == max(units) < weights
        return
    batch = next(steps.Batches(320, 2, 32, runtime.device).cycle())
    side.model.loss(batch.inputs, batch.targets).backward()
    assert found["gradients"] == sum(p.grad.nbytes for p in side.model.parameters())


def test_counting_sees_buffers_that_tensors_share_once(script: Any) -> None:
    buffer = torch.zeros(100)
    weight = nn.Parameter(torch.zeros(50))
    optimizer = SimpleNamespace(state={weight: {"a": buffer[:50], "b": buffer[50:], "n": 3}})
    side = SimpleNamespace(update=SimpleNamespace(optimizer=optimizer), model=nn.ParameterList([weight]))
    assert script("depth_memory").counted(side) == {"parameters": 200, "gradients": 200, "optimizer_state": 400}


def test_rows_of_an_earlier_run_stay_unless_measured_again(tmp_path: Path, script: Any) -> None:
    instant_modes, path = script("instant_modes"), tmp_path / "instant_modes_8gib.json"
    same = {"cap_gib": 8.0, "graph": True, "model": {"layers": 18}}
    rows = [instant_modes.Row("none", 8, 1024)]
    with pytest.raises(UserError, match="no instant_modes_8gib"):
        instant_modes.kept_rows(path, rows, same)
    samples = [
        {"shape": "8x1024", "row": "none"},
        {"shape": "8x1024", "row": "nanoGPT"},
        {"shape": "4x1024", "row": "none"},
    ]
    path.write_text(json.dumps({**same, "samples": samples, "not_run": ["none 8x1024", "auto 8x1024"]}))
    kept = instant_modes.kept_rows(path, rows, same)
    assert kept == (samples[1:], ["auto 8x1024"])
    with pytest.raises(UserError, match="another cap_gib and graph"):
        instant_modes.kept_rows(path, rows, {**same, "cap_gib": 12.0, "graph": False})
