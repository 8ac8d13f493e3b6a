"""Which implementation of an op serves a tensor: the Triton kernels, or the reference in PyTorch's own ops.

The choice is named and never silent: `kernels_for` says which and why, the trainer prints it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

_forced_reference = False


class Kernels(NamedTuple):
    """The implementation that serves a device."""

    name: str
    """`triton` or `reference`."""
    why: str
    """One plain sentence."""


@functools.cache
def kernels_for(device: torch.device) -> Kernels:
    """The implementation for tensors of `device`, with the reason, for people."""
    if device.type != "cuda":
        return Kernels("reference", "Triton kernels need a CUDA device")
    if find_spec("triton") is None:
        return Kernels("reference", "Triton is not installed (on Windows: pip install triton-windows)")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Kernels("reference", "the Triton kernels need compute capability 8.0 (Ampere) or newer")
    if sys.platform.startswith("linux") and not _c_compiler():  # triton-windows brings one
        return Kernels("reference", "Triton needs a C compiler: install gcc, or name one in $CC")
    return Kernels("triton", "CUDA through Triton")


def _c_compiler() -> str | None:
    """What Triton would build its launchers with."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def forced_reference() -> bool:
    """Whether `reference_only` is on."""
    return _forced_reference


def uses_triton(tensor: Tensor) -> bool:
    """Whether ops on `tensor` take the Triton path now."""
    if _forced_reference:
        return False
    if torch.compiler.is_dynamo_compiling():
        from eco_llm.ops.traced_backend import has_triton  # imports the compiler, a second or more; here it is loaded

        return has_triton(tensor.device)
    return kernels_for(tensor.device).name == "triton"


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Every op takes its reference inside this context (parity tests, benchmarks). Not for compiled modules' reuse:
    a module compiled inside stays on the reference, one compiled outside stays on the kernels.
    """
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before
