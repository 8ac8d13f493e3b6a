"""Waking the GPU asks its driver alone, fails in silence and begins before torch; imports are not collected."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm import head_start
from eco_llm.head_start import importing, wake_gpu


class Libraries:
    """Stand-ins for the driver and NVML: note what is called, answer with `answers` or 0."""

    def __init__(self, **answers: int) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, library: str) -> Any:
        calls, answers = self.calls, self.answers

        class Library:
            def __getattr__(self, name: str) -> Any:
                def call(*arguments: Any) -> int:
                    calls.append((name, *(a for a in arguments if isinstance(a, int)), threading.current_thread().name))
                    return answers.get(name, 0)

                return call

        return Library()


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "_torch_has_cuda", lambda: True)


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(("device", "ordinal"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_device_that_training_will_use_is_woken_in_a_thread(device: str, ordinal: int) -> None:
    libraries = Libraries()
    thread = wake_gpu(device, libraries)
    assert thread is not None
    assert not thread.daemon  # a process must not end inside the driver
    thread.join()
    name = "eco-wake-gpu"
    assert libraries.calls == [
        ("cuInit", 0, name),
        ("cuDeviceGet", ordinal, name),
        ("cuDevicePrimaryCtxRetain", name),
        ("nvmlInit_v2", name),
    ]


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:", "cuda:x", "cuda:-1", "gpu", ""])
def test_other_devices_wake_nothing(device: str) -> None:
    libraries = Libraries()
    assert wake_gpu(device, libraries) is None
    assert libraries.calls == []


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_driver_that_refuses_is_asked_no_further(fails: str) -> None:
    libraries = Libraries(**{fails: 100})
    thread = wake_gpu("auto", libraries)
    assert thread is not None
    thread.join()
    assert libraries.calls[-1][0] == fails


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("error", [OSError("no such library"), AttributeError("no such function")])
def test_a_machine_without_a_driver_hears_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    def load(library: str) -> Any:
        raise error

    thread = wake_gpu("auto", load)
    assert thread is not None
    thread.join()
    assert died == []


def test_the_build_of_torch_is_told_from_its_files() -> None:
    assert head_start._torch_has_cuda() == (torch.version.cuda is not None)


def test_training_wakes_the_gpu_before_torch_and_refuses_as_ever(tmp_path: Path, corpus: Path) -> None:
    code = (
        "import sys, eco_llm.head_start as head_start\n"
        "head_start.wake_gpu = lambda device: print(device, 'torch' in sys.modules)\n"
        "from eco_llm.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "import gc; print('torch' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 10_000); sys.exit(code)\n"
    )
    run = tmp_path / "run"
    flags = ["--device", "cuda:99", "--data", str(corpus), "--data-cache", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--output-dir", str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == ["cuda:99 False", "True True True"]
    assert done.stderr.startswith("eco_train: error: --device cuda:99")
    assert not run.exists()


def test_imports_are_not_interrupted_and_then_left_alone() -> None:
    before = gc.get_freeze_count()
    try:
        with importing("a_package_that_is_not_there"):
            assert not gc.isenabled()
            kept = [[i] for i in range(100)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_what_is_garbage_by_then_is_collected_and_not_kept() -> None:
    class Garbage:
        pass

    gone: list[int] = []
    loop = Garbage()
    loop.itself = loop  # type: ignore[attr-defined]
    weakref.finalize(loop, gone.append, 1)
    gc.disable()
    try:
        del loop
        assert gone == []
        with importing("a_package_that_is_not_there"):
            assert gone == [1]
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
        gc.unfreeze()


def test_nothing_is_done_for_a_package_that_is_there() -> None:
    before = gc.get_freeze_count()
    with importing("torch"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_failed_import_leaves_collection_on() -> None:
    try:
        with pytest.raises(ModuleNotFoundError), importing("a_package_that_is_not_there"):
            __import__("a_package_that_is_not_there")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.gpu
def test_torch_finds_the_context_made() -> None:
    code = (
        "import ctypes, eco_llm.head_start as head_start\n"
        "head_start.wake_gpu('auto').join()\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "cuda = ctypes.CDLL(head_start._DRIVER)\n"
        "assert cuda.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0\n"
        "import torch\n"
        "print(active.value, torch.cuda.is_initialized(), torch.ones(3, device='cuda').sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "False", "3.0"], done.stderr
