"""Where tests of the Triton kernels run, and what several of them need."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cpu" if INTERPRETED else "cuda"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = KERNEL_DEVICE) -> Tensor:
    """Normal numbers that depend on the seed alone, not on type or device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is within `tolerance` of the largest element."""
    assert actual.isfinite().all()
    error = (actual.detach().double() - expected.detach().double()).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


TRITON_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def compile_instead_of_running(
    monkeypatch: pytest.MonkeyPatch, launchers: ModuleType, *kernels: str, capability: int
) -> list[tuple[str, Any]]:
    """Launches of `kernels` by `launchers` are compiled for a card, which need not be there, and run nowhere.

    Numbers count as divisible by 16 where they are, but for arguments that are not specialized, as in a launch. Unlike
    there tensors always do, wherever they begin, and an int of 1 is not made a constant.

    Returns:
        A list that fills with (kernel's name, what Triton compiled).
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    built: list[tuple[str, Any]] = []

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> object:
            def launch(*args: object, **given: object) -> None:
                options = {
                    name: given.pop(name)
                    for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
                    if name in given
                }
                signature, attributes = {}, {}
                for i, (parameter, value) in enumerate(zip(self.kernel.params, args, strict=False)):
                    tensor = isinstance(value, Tensor)
                    kind = f"*{TRITON_TYPES[value.dtype]}" if tensor else "fp32" if isinstance(value, float) else "i32"
                    signature[parameter.name] = kind
                    even = isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0
                    if tensor or even:
                        attributes[(i,)] = [["tt.divisibility", 16]]
                signature |= dict.fromkeys(given, "constexpr")
                source = ASTSource(self.kernel, signature, dict(given), attributes)
                compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                built.append((self.kernel.__name__, compiled))

            return launch

    for name in kernels:
        monkeypatch.setattr(launchers, name, Spy(getattr(launchers, name)))
    return built
