"""How a run can end, and what an exception says about it."""

from __future__ import annotations

import re

from eco_llm.outcome import Outcome as Outcome  # its home is torch-free and below proof

# What PyTorch says when it runs out without its own exception type: the CPU allocator (Linux and macOS; Windows), the
# CUDA runtime, driver and Triton, and the workspaces of cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    r"(can't allocate|not enough) memory|out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)


class NonFiniteLoss(Exception):
    """Too many steps in a row had a NaN or infinite loss or gradient; the weights are those before them."""


def headline(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's exception and for the plain RuntimeError of other allocators."""
    import torch

    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def is_compilation_failure(error: BaseException) -> bool:
    """True if torch.compile's front end, its back end or Triton raised `error` or what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
