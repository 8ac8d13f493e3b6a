"""Where a process runs: devices, compute types, caches, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eco_llm import runtime as runtime_module
from eco_llm.config import RuntimeConfig
from eco_llm.errors import UserError
from eco_llm.runtime import COMPILE_PAYS, Runtime, compiling_pays, set_cache_dirs, without_openssl

CPU = RuntimeConfig(device="cpu")


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, of which the second is current; nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = [torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0].index)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(runtime_module, "find_spec", lambda name: name)  # Triton is installed


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_compute_type_on_cpu(dtype: str, expected: torch.dtype) -> None:
    runtime = Runtime.detect(RuntimeConfig(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    assert (runtime.device, runtime.compute_dtype) == (torch.device("cpu"), expected)


@pytest.mark.usefixtures("no_cuda")
def test_auto_without_a_gpu_is_the_cpu() -> None:
    runtime = Runtime.detect(RuntimeConfig())
    assert runtime == Runtime(torch.device("cpu"), torch.float32, COMPILE_PAYS["cpu"])
    assert runtime.is_main


@pytest.mark.parametrize(("choice", "expected"), [("on", True), ("off", False), ("auto", COMPILE_PAYS["cpu"])])
def test_compilation_follows_the_flag(choice: str, expected: bool) -> None:
    assert Runtime.detect(RuntimeConfig(device="cpu", torch_compile=choice)).compile is expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device}.*no CUDA device"):
        Runtime.detect(RuntimeConfig(device=device))


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_chosen_by_number_or_is_the_current_one() -> None:
    assert Runtime.detect(RuntimeConfig(device="cuda")).device == torch.device("cuda", 1)
    auto = Runtime.detect(RuntimeConfig())
    assert (auto.device, auto.compute_dtype) == (torch.device("cuda", 1), torch.bfloat16)
    assert auto.compile is COMPILE_PAYS["cuda"]
    assert Runtime.detect(RuntimeConfig(device="cuda:0")).device == torch.device("cuda", 0)


@pytest.mark.usefixtures("two_gpus")
def test_what_a_gpu_can_do_is_asked_of_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch answers for the current one; and Triton launches on it, in programs that never train."""

    def supported(including_emulation: bool = True) -> bool:
        return torch.cuda.current_device() == 1

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert Runtime.detect(RuntimeConfig(device="cuda:0")).compute_dtype == torch.float32
    assert torch.cuda.current_device() == 0
    assert Runtime.detect(RuntimeConfig(device="cuda:1")).compute_dtype == torch.bfloat16
    assert torch.cuda.current_device() == 1


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("lack", ["Triton", "capability"])
def test_a_gpu_that_triton_does_not_serve_is_compiled_for_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    if lack == "Triton":  # as on Windows
        monkeypatch.setattr(runtime_module, "find_spec", lambda name: None)
    else:  # as on a GTX 1080
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not Runtime.detect(RuntimeConfig()).compile
    assert Runtime.detect(RuntimeConfig(torch_compile="on")).compile


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("index", [2, 128, 256, 257])  # torch.device("cuda:256") is cuda:0
def test_a_gpu_number_past_the_last_is_refused(index: int) -> None:
    with pytest.raises(UserError, match="there are 2 CUDA devices"):
        Runtime.detect(RuntimeConfig(device=f"cuda:{index}"))


@pytest.mark.parametrize("device", ["cuda:", "auto:", "cuda:99999999999", "gpu"])
def test_a_device_name_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(UserError, match="--device"):
        Runtime.detect(RuntimeConfig(device=device))


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert Runtime.detect(RuntimeConfig()).compute_dtype == torch.float32  # auto takes no emulation
    assert Runtime.detect(RuntimeConfig(dtype="bf16")).compute_dtype == torch.bfloat16  # asked for, and it works
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="--dtype bf16"):
        Runtime.detect(RuntimeConfig(dtype="bf16"))


@pytest.mark.parametrize("value", ["2", "0", "many"])
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        Runtime.detect(CPU)


@pytest.mark.parametrize("value", ["1", ""])
def test_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert Runtime.detect(CPU).world_size == 1


def test_the_seed_fixes_the_draws() -> None:
    runtime = Runtime.detect(CPU)
    runtime.setup(11)
    first = torch.rand(4)
    runtime.setup(12)
    other = torch.rand(4)
    runtime.setup(11)
    assert torch.equal(torch.rand(4), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_chosen_type(dtype: str, expected: torch.dtype) -> None:
    runtime = Runtime.detect(RuntimeConfig(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    a = torch.randn(3, 3)
    with runtime.autocast():
        assert (a @ a).dtype == expected
    assert (a @ a).dtype == torch.float32


def test_cache_folders_are_set_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    set_cache_dirs()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".runtime_cache" / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".runtime_cache" / "inductor")
    assert list(tmp_path.iterdir()) == []  # naming a folder does not make it
    set_cache_dirs(tmp_path / "elsewhere")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".runtime_cache" / "triton")


def test_compiling_does_without_openssl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert without_openssl() == {name: "0"}
    monkeypatch.setenv(name, "1")  # the user's word stands
    assert without_openssl() == {}
    monkeypatch.delenv(name)
    program = tmp_path / ("openssl.exe" if sys.platform == "win32" else "openssl")
    program.touch(mode=0o755)
    assert without_openssl() == {}


def test_the_usual_variables_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    set_cache_dirs(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".runtime_cache" / "inductor")


def test_inductor_obeys_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from eco_llm.runtime import set_cache_dirs; set_cache_dirs(pathlib.Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules;"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(tmp_path / ".runtime_cache" / "inductor"), done.stderr


@pytest.mark.gpu
def test_detect_and_setup_on_a_gpu() -> None:
    runtime = Runtime.detect(RuntimeConfig())
    assert runtime.device == torch.device("cuda", torch.cuda.current_device())
    assert runtime.compute_dtype == torch.bfloat16
    runtime.setup(5)
    first = torch.rand(4, device=runtime.device)
    runtime.setup(5)
    assert torch.equal(torch.rand(4, device=runtime.device), first)
    a = torch.randn(8, 8, device=runtime.device)
    with runtime.autocast():
        assert (a @ a).dtype == torch.bfloat16
    with pytest.raises(UserError, match="CUDA devices"):
        Runtime.detect(RuntimeConfig(device="cuda:256"))


@pytest.mark.slow
def test_a_graph_that_switches_autocast_off_is_cached_whole(tmp_path: Path) -> None:
    """What makes a warm start quick: without `prepare_compiler` PyTorch bypasses its cache for every block."""
    code = (
        "import torch; from torch._dynamo.utils import counters; from eco_llm.runtime import Runtime\n"
        "Runtime(torch.device('cpu'), torch.float32, compile=True).setup(0)\n"
        "@torch.compile(dynamic=False)\n"
        "def f(x):\n"
        "    with torch.autocast('cpu', enabled=False):\n"
        "        return (x * 2).sum()\n"
        "f(torch.ones(8, requires_grad=True)).backward()\n"
        "print({k: int(v) for k, v in counters['aot_autograd'].items() if 'cache' in k})\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        for _ in range(2)
    ]
    assert "'autograd_cache_miss': 1" in said[0]
    assert "'autograd_cache_hit': 1" in said[1]


@pytest.mark.parametrize(
    ("modes", "captured", "expected"),
    [
        (["none"], True, False), (["none", "recompute", "compress"], True, False), (["none", "coupled"], True, False),
        (["fixed-point", "recompute"], True, True), (["none"], False, True), (["coupled"], False, True),
    ],
    ids=str,
)  # fmt: skip
def test_a_captured_step_of_whole_blocks_gains_nothing_from_the_compiler(
    modes: list[str], captured: bool, expected: bool
) -> None:
    assert compiling_pays(modes, captured=captured) is expected


def test_training_uncompiled_imports_no_compiler() -> None:
    """A model with both mixers, C3O: made, stepped, saved and loaded. The import takes seconds of every start."""
    code = """
import sys, torch
from eco_llm.config import C3OConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.update import Update
from eco_llm.runtime import Runtime

runtime = Runtime.detect(RuntimeConfig(device=sys.argv[1], torch_compile="off"))
runtime.setup(0)
with torch.device(runtime.device):
    shape = SigmaConfig(d_model=64, n_layers=6, n_heads=1, vocab_size=300, kv_latent_dim=32, rope_head_dim=16)
    model = SigmaLLM(shape)
    tokens = torch.randint(0, 300, (2, 32))
settings = OptimizerConfig()
optimizer = build_optimizer(model.parameter_groups(0.1), settings, C3OConfig(), runtime.device)
update = Update(optimizer, settings)
with runtime.autocast():
    loss = model.loss(tokens, tokens)
update.backward(loss)
update.step(loss.detach())
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        done = subprocess.run([sys.executable, "-c", code, device], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "[]", device
