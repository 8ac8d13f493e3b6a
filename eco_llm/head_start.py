"""Two savings at the start of a command: the GPU's driver wakes beside Python's imports; no collection stops those.

Torch-free, for it comes before torch. Figures: docs/LOG.md; `benchmarks/start_time.py` measures them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_WINDOWS = sys.platform == "win32"
_DRIVER, _NVML = ("nvcuda.dll", "nvml.dll") if _WINDOWS else ("libcuda.so.1", "libnvidia-ml.so.1")
_TORCH_ON_CUDA = "torch_cuda.dll" if _WINDOWS else "libtorch_cuda.so"


def wake_gpu(device: str, load: Callable[[str], Any] = ctypes.CDLL) -> threading.Thread | None:
    """Begin, in a thread, what torch would wait for: CUDA's driver, the context on `device`, NVML.

    The context is the device's primary one, which torch then finds made, and NVML counts its users, so nobody need know
    that this was called. Nothing is reported either: what fails here fails again, and is explained, where it is needed.
    ctypes lets go of the interpreter while it waits. The thread is no daemon: a process does not end while its driver
    begins.

    Args:
        device: as `--device` has it. None is returned where it can mean no CUDA device, or torch has no CUDA.
        load: opens a shared library by name; tests give another.
    """
    ordinal = _ordinal(device)
    if ordinal is None or not _torch_has_cuda():
        return None
    thread = threading.Thread(target=_wake, args=(ordinal, load), name="eco-wake-gpu")
    thread.start()
    return thread


def _wake(ordinal: int, load: Callable[[str], Any]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such library, or an older one
        cuda = load(_DRIVER)
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        if (
            cuda.cuInit(0) == 0
            and cuda.cuDeviceGet(ctypes.byref(handle), ordinal) == 0
            and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 0
        ):
            load(_NVML).nvmlInit_v2()


def _ordinal(device: str) -> int | None:
    """The CUDA device that `--device` names, counted as CUDA counts; None if it names another kind, or nothing."""
    if device in ("auto", "cuda"):
        return 0
    kind, _, index = device.partition(":")
    return int(index) if kind == "cuda" and index.isdecimal() else None


def _torch_has_cuda() -> bool:
    """Asked of the files: importing torch is what must not be waited for."""
    torch = find_spec("torch")
    return (
        torch is not None and torch.origin is not None and (Path(torch.origin).parent / "lib" / _TORCH_ON_CUDA).exists()
    )


@contextlib.contextmanager
def importing(package: str) -> Iterator[None]:
    """For the import of thousands of modules: no collection interrupts it, and none looks at them ever after.

    Their objects stay as long as the process, some hundred thousand, and collections that found nothing among them took
    a tenth of a start. Objects that are alive when the import is over are left out of later collections too; what is
    garbage by then is collected before. Where `package` is there already, nothing is done: then others have run.
    """
    if package in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
