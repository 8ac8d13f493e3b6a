"""What a start would wait for and Python need not do, in threads beside it: the GPU's driver begins, Triton gets ready.

Both let go of the interpreter while they work. Nothing is reported: what fails here fails again, and is explained,
where it is needed. The threads are no daemons: a process does not end while its driver begins. Torch-free, for the
first comes before torch. Figures: docs/LOG.md; `benchmarks/start_time.py` measures them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WINDOWS = sys.platform == "win32"
_DRIVER = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
_TORCH_ON_CUDA = "torch_cuda.dll" if _WINDOWS else "libtorch_cuda.so"


@contextlib.contextmanager
def waking_gpu(device: str, load: Callable[[str], Any] = ctypes.CDLL) -> Iterator[None]:
    """For the import of torch: CUDA's driver begins meanwhile and makes the device's primary context (0.4 s, H200).

    Torch finds that context made and uses it. The driver reads the environment, and C has no lock for that, so nothing
    may write it meanwhile: NumPy's import does and therefore comes first, torch's does not (tests/test_head_start.py),
    and what `torch.cuda` of torch 2.11 sets before it begins is set here. At the end the thread is waited for.

    Args:
        device: as `--device` has it. Nothing is done where it can mean no CUDA device, or torch has no CUDA, or the
            process is one of several whose device is chosen by a rank.
        load: opens a shared library by name; tests give another.
    """
    ordinal = _ordinal(device)
    if ordinal is None or "torch" in sys.modules or "WORLD_SIZE" in os.environ or not _torch_has_cuda():
        yield
        return
    importlib.import_module("numpy")
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=_wake, args=(ordinal, load), name="eco-wake-gpu")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _wake(ordinal: int, load: Callable[[str], Any]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such library, or no such function in it
        cuda = load(_DRIVER)
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(handle), ordinal) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)


def _ordinal(device: str) -> int | None:
    """The CUDA device that `--device` names, counted as CUDA counts; None if it names another kind, or nothing."""
    if device in ("auto", "cuda"):
        return 0
    kind, _, index = device.partition(":")
    return int(index) if kind == "cuda" and index.isdecimal() and len(index) < 4 else None


def _torch_has_cuda() -> bool:
    """Asked of the files: importing torch is what must not be waited for."""
    spec = PathFinder.find_spec("torch")
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "lib" / _TORCH_ON_CUDA).exists()


def ready_triton(device: torch.device) -> threading.Thread | None:
    """Begin what Triton does before its first kernel on this machine; join the thread before that.

    A compiled kernel's name in its cache holds a hash of the whole of Triton, 400 MB (0.4 s), and the version that its
    assembler gives when asked. Triton keeps both for the process once known. It has no lock for that: a kernel launched
    meanwhile would find them out again.

    Returns:
        None where there is no Triton, or the device is none of CUDA's.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    thread = threading.Thread(target=_ready_triton, name="eco-ready-triton")
    thread.start()
    return thread


def _ready_triton() -> None:
    with contextlib.suppress(Exception):
        importlib.import_module("triton.runtime.cache").triton_key()
        target = importlib.import_module("triton.runtime").driver.active.get_current_target()
        importlib.import_module("triton.compiler.compiler").make_backend(target).hash()
