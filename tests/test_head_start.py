"""Threads at a start ask the driver and Triton alone, fail in silence, and end before torch or a kernel needs them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eco_llm import head_start
from eco_llm.head_start import ready_triton, waking_gpu


class Libraries:
    """Stand-ins for the driver: note what is called, answer with `answers` or 0."""

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
def before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has yet to import torch, which is built for CUDA."""
    monkeypatch.setattr(head_start, "_torch_has_cuda", lambda: True)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")  # put back afterwards, and the user's word
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize(("device", "ordinal"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_device_that_training_will_use_is_woken_in_a_thread(device: str, ordinal: int) -> None:
    libraries = Libraries()
    with waking_gpu(device, libraries):
        pass
    name = "eco-wake-gpu"
    assert libraries.calls == [
        ("cuInit", 0, name), ("cuDeviceGet", ordinal, name), ("cuDevicePrimaryCtxRetain", name)
    ]  # fmt: skip
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"


@pytest.mark.usefixtures("before_torch")
def test_the_thread_is_waited_for_whatever_the_import_does() -> None:
    begun, end = threading.Event(), threading.Event()

    def load(library: str) -> Any:
        begun.set()
        assert end.wait(10)
        raise OSError

    threads: list[threading.Thread] = []

    def importing() -> None:
        with waking_gpu("auto", load):
            assert begun.wait(10)
            threads.extend(t for t in threading.enumerate() if t.name == "eco-wake-gpu")
            end.set()
            raise ImportError

    with pytest.raises(ImportError):
        importing()
    (thread,) = threads
    assert not thread.is_alive()
    assert not thread.daemon  # a process must not end inside the driver


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:", "cuda:x", "cuda:-1", "cuda:99999999999", "gpu", ""])
def test_other_devices_wake_nothing(device: str) -> None:
    libraries = Libraries()
    with waking_gpu(device, libraries):
        pass
    assert libraries.calls == []


@pytest.mark.usefixtures("before_torch")
def test_ranks_choose_their_devices_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    libraries = Libraries()
    with waking_gpu("auto", libraries):
        pass
    assert libraries.calls == []


def test_nothing_is_woken_for_a_torch_that_is_there() -> None:
    libraries = Libraries()
    with waking_gpu("auto", libraries):
        pass
    assert libraries.calls == []


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet"])
def test_a_driver_that_refuses_is_asked_no_further(fails: str) -> None:
    libraries = Libraries(**{fails: 100})
    with waking_gpu("auto", libraries):
        pass
    assert libraries.calls[-1][0] == fails


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize("error", [OSError("no such library"), AttributeError("no such function")])
def test_a_machine_without_a_driver_hears_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    def load(library: str) -> Any:
        raise error

    with waking_gpu("auto", load):
        pass
    assert died == []


def test_the_build_of_torch_is_told_from_its_files() -> None:
    assert head_start._torch_has_cuda() == (torch.version.cuda is not None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the C library's environment")
@pytest.mark.parametrize(
    "_", [pytest.param("cuda", marks=pytest.mark.gpu), "this build"]
)  # of torch, on either machine
def test_the_import_of_the_trainer_writes_no_environment(_: str) -> None:
    """The driver may be reading it meanwhile, in C, where nothing keeps a reader from a writer.

    Of C's environment this sees what is different afterwards, not what was written and put back meanwhile.
    """
    code = (
        "import ctypes, itertools, sys, numpy\n"
        "def environ():\n"  # C's own: libraries can write it without Python hearing
        "    words = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
        "    said = list(itertools.takewhile(bool, (words[i] for i in itertools.count())))\n"
        "    return ctypes.cast(words, ctypes.c_void_p).value, said\n"
        "before = environ()\n"
        "sys.addaudithook(lambda event, words: print(event, words) if event in {'os.putenv', 'os.unsetenv'} else 0)\n"
        "import eco_llm.training.launch\n"
        "assert environ() == before\n"
        "import os; os.environ['HEARD'] = '1'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert "HEARD" in done.stdout


def test_training_wakes_the_gpu_before_torch(tmp_path: Path, corpus: Path) -> None:
    code = (
        "import contextlib, sys, eco_llm.head_start as head_start\n"
        "@contextlib.contextmanager\n"
        "def waking(device):\n"
        "    print(device, 'numpy' in sys.modules, 'torch' in sys.modules)\n"
        "    yield\n"
        "    print('eco_llm.training.launch' in sys.modules)\n"
        "head_start.waking_gpu = waking\n"
        "from eco_llm.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = ["--device", "cuda:99", "--data", str(corpus), "--data-cache", str(tmp_path / "data")]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == ["cuda:99 True False", "True"]


# ---------------------------------------------------------------------------------------------------- Triton


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Triton of stand-ins; what is asked of it, in order."""
    asked: list[str] = []

    def answer(name: str, value: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            asked.append(name)
            return value

        return call

    active = SimpleNamespace(get_current_target=answer("target"))
    modules = {
        "triton.runtime.cache": SimpleNamespace(triton_key=answer("key")),
        "triton.runtime": SimpleNamespace(driver=SimpleNamespace(active=active)),
        "triton.compiler.compiler": SimpleNamespace(
            make_backend=answer("backend", SimpleNamespace(hash=answer("version")))
        ),
    }
    monkeypatch.setattr(head_start, "find_spec", lambda name: name)
    monkeypatch.setattr(head_start, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    return asked


def test_triton_is_asked_for_what_names_its_kernels(triton: list[str]) -> None:
    thread = ready_triton(torch.device("cuda"))
    assert thread is not None
    thread.join()
    assert triton == ["key", "target", "backend", "version"]
    assert not thread.daemon


def test_another_triton_is_left_to_itself(triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    monkeypatch.setattr(head_start, "importlib", SimpleNamespace(import_module={}.__getitem__))
    thread = ready_triton(torch.device("cuda"))
    assert thread is not None
    thread.join()
    assert triton == died == []


def test_no_triton_no_thread(triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ready_triton(torch.device("cpu")) is None
    monkeypatch.setattr(head_start, "find_spec", lambda name: None)
    assert ready_triton(torch.device("cuda")) is None
    assert triton == []


@pytest.mark.gpu
def test_torch_finds_the_context_made() -> None:
    code = (
        "import ctypes, eco_llm.head_start as head_start\n"
        "with head_start.waking_gpu('auto'):\n"
        "    pass\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "cuda = ctypes.CDLL(head_start._DRIVER)\n"
        "assert cuda.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0\n"
        "import torch\n"
        "print(active.value, torch.cuda.is_initialized(), torch.ones(3, device='cuda').sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "False", "3.0"], done.stderr


@pytest.mark.gpu
def test_the_first_kernel_finds_triton_ready() -> None:
    code = (
        "import torch, eco_llm.head_start as head_start\n"
        "head_start.ready_triton(torch.device('cuda')).join()\n"
        "from triton.runtime.cache import triton_key\n"
        "from triton.backends.nvidia.compiler import get_ptxas_version\n"
        "print(triton_key.cache_info().currsize, get_ptxas_version.cache_info().currsize)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "1"], done.stderr
