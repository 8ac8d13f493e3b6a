"""Where a process runs: rank, world size, device, compute type, compiler caches. The one place that asks.

The cache half is torch-free and must run before torch is imported: Triton and Inductor read their folders from
the environment at import. The device half imports torch when called.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eco_llm.config import RuntimeConfig
from eco_llm.errors import UserError
from eco_llm.host_memory import keep_freed_memory
from eco_llm.imports import importing

if TYPE_CHECKING:
    import torch

# Row S13: whether compiling the blocks measured faster, by device type. A step is faster on both; on a CPU the whole
# of a short run is not. Evidence: benchmarks/results/*/compile_on_off*.json and quickstart*.json; the tables are in
# docs/configuration.md.
COMPILE_PAYS = {"cpu": False, "cuda": True}
PARTS_ARE_FUSED_BY_COMPILER = frozenset({"fixed-point"})
"""Memory modes whose blocks are compiled all the same: this one calls a block's halves one by one, whose norms and sums
are PyTorch's own."""


def compiling_pays(modes: Iterable[str], *, captured: bool) -> bool:
    """Whether compiled blocks make a step faster on a GPU, with our Triton kernels and blocks of these memory modes.

    Of most modes not if a CUDA graph launches it: every pass over activations is a kernel of ours already, and
    compiling took most of a start. Launched one by one, fewer calls are faster calls.
    """
    return not captured or not PARTS_ARE_FUSED_BY_COMPILER.isdisjoint(modes)


def set_cache_dirs(root: Path | None = None) -> None:
    """Keep compiled kernels between runs in `.runtime_cache/` (row S12); the usual variables override.

    Relative to the current directory, like every path a user gives. Call before importing torch.
    """
    base = (root or Path.cwd()) / ".runtime_cache"
    os.environ.setdefault("TRITON_CACHE_DIR", str(base / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / "inductor"))
    os.environ.update(without_openssl())


def without_openssl() -> dict[str, str]:
    """Environment in which torch.compile needs no `openssl`, on a machine that has none; else empty.

    TorchInductor starts that program to hash the headers that it compiles beforehand, and fails without.
    """
    name = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
    return {} if shutil.which("openssl") or name in os.environ else {name: "0"}


def torch_dtype(name: Literal["fp32", "bf16"]) -> torch.dtype:
    """The type that a setting names."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


@dataclass(frozen=True)
class Runtime:
    """One process's place in the world and how it computes."""

    device: torch.device
    compute_dtype: torch.dtype
    compile: bool
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes the run directory."""
        return self.rank == 0

    @staticmethod
    def detect(config: RuntimeConfig) -> Runtime:
        """Resolve `auto` settings against this machine, and make a GPU the current one.

        Raises:
            UserError: the named device does not exist, cannot compute in the named type, or several processes
                were launched (data parallel training is not built yet; two silent copies would be worse).
        """
        import torch

        world_size = os.environ.get("WORLD_SIZE") or "1"
        if world_size != "1":
            raise UserError(f"{world_size} processes were launched (WORLD_SIZE); this version trains on one device")
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"--device {config.device!r} is not one of auto, cpu, cuda, cuda:N") from None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError(
                    f"--device {config.device}: this PyTorch sees no CUDA device; `eco_train doctor` says why"
                )
            # From the name: torch.device keeps 8 bits of an index, and takes cuda:256 for cuda:0.
            index = int(name[5:]) if name.startswith("cuda:") else torch.cuda.current_device()
            if index >= torch.cuda.device_count():
                raise UserError(f"--device {config.device}: there are {torch.cuda.device_count()} CUDA devices")
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)  # what follows asks the current one, and Triton launches on it
            if config.dtype == "bf16" and not torch.cuda.is_bf16_supported():
                raise UserError("--dtype bf16: this GPU cannot compute in bfloat16; use --dtype fp32")
            if config.weights_dtype == "bf16" and not torch.cuda.is_bf16_supported():
                raise UserError("--weights-dtype bf16: this GPU does not know bfloat16; use --weights-dtype fp32")
        if config.dtype == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if bf16 else torch.float32
        else:
            dtype = torch_dtype(config.dtype)
        compile_blocks = {"on": True, "off": False}.get(config.torch_compile)
        if compile_blocks is None:
            compile_blocks = COMPILE_PAYS[device.type] and (device.type == "cpu" or _triton_serves(device))
        return Runtime(device, dtype, compile_blocks)

    def setup(self, seed: int) -> None:
        """Seed every generator and pick the matrix-product modes; call once, before the model is built."""
        import torch

        torch.manual_seed(seed)  # also seeds every CUDA device
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            # fp32 products that are left under bf16 compute (optimizer, norms) need no full fp32 multiplier.
            torch.backends.cuda.matmul.allow_tf32 = self.compute_dtype != torch.float32
        if self.compile:
            prepare_compiler()
        else:
            _leave_compiler_out()

    def autocast(self, *, keep_casts: bool = True) -> contextlib.AbstractContextManager[object]:
        """The context for forward passes: autocast to bf16, or nothing for fp32.

        PyTorch keeps casts of weights until the context ends, for products that use one twice; with `keep_casts` False
        it makes them where they are used.
        """
        import torch

        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=keep_casts)


def _leave_compiler_out() -> None:
    """Let optimizers be made and called without the import of torch._dynamo, 2 to 5 seconds of a start.

    Their base class asks for it at the first call of methods that are not to be compiled, in order to say so. Here each
    is told that this was done. What compiles later, compiles no optimizer.
    """
    import torch

    wrapper = torch._disable_dynamo.__code__.co_filename
    for method in vars(torch.optim.Optimizer).values():
        if getattr(getattr(method, "__code__", None), "co_filename", None) == wrapper:
            method.__wrapped__.__dict__.setdefault("__dynamo_disable", method.__wrapped__)


def prepare_compiler() -> None:
    """Import it, and let PyTorch keep compiled forward and backward graphs between runs although they switch
    autocast off inside.

    Its cache of whole graphs passes over any function that it does not know, `_enter_autocast` among them; then every
    start traces and partitions anew what it has the kernels for. Caching these two is sound: their arguments are
    constants of the graph, and the graph, like the autocast state around it, is part of the key.
    """
    import torch

    with importing("torch._inductor", freeze=False):  # its caller's objects are there already
        import torch._inductor.compile_fx  # the whole compiler, which the first `torch.compile` needs
        import torch._inductor.config as inductor

    inductor.unsafe_marked_cacheable_functions = {
        **inductor.unsafe_marked_cacheable_functions,
        "torch.amp.autocast_mode._enter_autocast": torch.__version__,
        "torch.amp.autocast_mode._exit_autocast": torch.__version__,
    }


def _triton_serves(device: torch.device) -> bool:
    """Whether torch.compile can begin on this GPU: torch for Windows brings no Triton, nor does Triton serve Pascal."""
    import torch

    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
