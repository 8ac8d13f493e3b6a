"""`eco_train doctor`: can this machine train, and what would make it faster? One plain sentence for each
problem.

What can be tried is tried: a Triton kernel and a torch.compile'd function are really compiled and run, each
in a child process with its own empty caches and a time limit, so that a broken compiler can neither hang the
doctor nor leave anything behind.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json as jsonlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from rich.console import Console
from rich.table import Table

from eco_llm.cli.parse import parse
from eco_llm.frozen import installing, is_frozen
from eco_llm.perf import environment
from eco_llm.perf.nvml import NvmlDevice, NvmlUnavailableError
from eco_llm.runtime import without_openssl
from eco_llm.version import __version__

if TYPE_CHECKING:
    from types import ModuleType

Status = Literal["ok", "warn", "fail"]

PYTHON_MIN = (3, 11)
TORCH_MIN, TORCH_BELOW = (2, 11), (2, 14)  # the range in pyproject.toml; a test compares them
PROBE_SECONDS = 90.0

DESCRIPTION = "Check that this machine can train, by compiling and running something real, and say what to fix."

_GIB = 2.0**30
_NO_COMPILE = "train with --no-torch-compile"

# Child programs. Triton reads a kernel's source from its file, so they are written to files.
_TRITON_PROBE = """
import torch, triton, triton.language as tl

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)

x = torch.arange(63, device="cuda", dtype=torch.float32)
y = torch.full_like(x, float("nan"))
double[(1,)](x, y, 63, BLOCK=64)
assert torch.equal(y, 2 * x), "the kernel ran and gave wrong numbers"
"""

_COMPILE_PROBE = """
import sys, torch

x = torch.linspace(-1, 1, 63, device=sys.argv[1], requires_grad=True)
y = torch.compile(lambda x: (torch.sin(x) * x).sum())(x)
y.backward()
expected = torch.sin(x) + x * torch.cos(x)
assert torch.allclose(x.grad, expected, atol=1e-5), "the compiled function gave wrong gradients"
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fail` means that training cannot run; `warn` that something is slower or missing."""

    name: str
    status: Status
    found: str
    advice: str = ""
    """One sentence; empty when all is well."""


def diagnose(progress: Callable[[str], None] = lambda name: None) -> Iterator[Check]:
    """Look at everything, in the order a user can mend it; each finding comes as soon as it is known. `progress` hears
    the name of each part first.

    Takes a few seconds without a compiler to try, up to a minute or two with.
    """
    progress("system")
    yield from _system()
    progress("folders")
    yield from _folders()
    progress("packages")
    yield from _packages()
    progress("torch")
    torch, check = _import_torch()
    yield check
    if torch is None:
        return
    if not is_frozen():
        yield bytecode(torch.__spec__.cached if torch.__spec__ else None)
    progress("GPU")
    yield from _gpu(torch)
    if torch.cuda.is_available():
        progress("Triton (compiling a kernel)")
        yield from _triton()
    progress("torch.compile (compiling a function)")
    yield from _compile(torch)


@dataclass(frozen=True)
class DoctorCommand:
    """Command line of `eco_train doctor`."""

    json: bool = False
    """Print one JSON object instead of a table."""


def run(args: Sequence[str]) -> int:
    """Diagnose and print; 0 if this machine can train, 1 if it cannot."""
    return show(parse(DoctorCommand, args, prog="eco_train doctor", description=DESCRIPTION).json)


def show(json: bool) -> int:
    """Print the diagnosis as a table, or as JSON. Returns 0 if this machine can train, 1 if it cannot."""
    if json:
        checks = list(diagnose())
        trainable = all(check.status != "fail" for check in checks)
        device = "cuda" if _has_cuda() else "cpu"
        report = {
            "trainable": trainable,
            "checks": [dataclasses.asdict(check) for check in checks],
            "environment": environment.collect(device),
        }
        print(jsonlib.dumps(report, indent=2))
        return 0 if trainable else 1
    console = Console()
    if console.is_terminal:
        with console.status("looking …") as status:
            checks = list(diagnose(lambda name: status.update(f"{name} …")))
        _print_table(console, checks)
    else:  # line by line as they come: a log shows what a slow check is about
        checks = []
        for check in diagnose():
            checks.append(check)
            advice = f" -> {check.advice}" if check.advice else ""
            print(f"{check.status:4}  {check.name}: {check.found}{advice}", flush=True)
    failed = [check.name for check in checks if check.status == "fail"]
    verdict = f"cannot train yet: {', '.join(failed)}" if failed else "ready to train"
    print(f"eco_train doctor: {verdict}")
    return 1 if failed else 0


def _print_table(console: Console, checks: list[Check]) -> None:
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(show_edge=False, pad_edge=False)
    for column in ("", "check", "found", "advice"):
        table.add_column(column, overflow="fold")
    for check in checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(status, check.name, check.found.replace("[", r"\["), check.advice.replace("[", r"\["))
    console.print(table)


def _system() -> Iterator[Check]:
    yield Check("eco-llm", "ok", __version__ + (", the executable" if is_frozen() else ""))
    version = platform.python_version()
    if sys.version_info[:2] < PYTHON_MIN:
        yield Check("Python", "fail", version, "Install Python 3.11 or newer and make the environment again.")
    else:
        yield Check("Python", "ok", version)
    described = environment.collect()["cpu"]
    found = f"{described['model']}, {described['logical_cores']} logical cores"
    yield Check("CPU", "ok", found)
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f} GiB"
    if memory.available < 2 * _GIB:
        yield Check("memory", "warn", found, "Close other programs: the quickstart needs about 2 GiB.")
    else:
        yield Check("memory", "ok", found)


def _folders() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    found = f"{free:.1f} GiB free here"
    if free < 1:
        yield Check("disk", "fail", found, "Free at least 1 GiB: checkpoints and token files are written here.")
    elif free < 5:
        yield Check("disk", "warn", found, "Checkpoints of a large model may not fit: free some space.")
    else:
        yield Check("disk", "ok", found)
    yield _writable("this folder", Path.cwd(), "Change to a folder you may write to.")
    yield _writable(
        ".runtime_cache",
        Path.cwd() / ".runtime_cache",
        "Make .runtime_cache writable, or set TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR to another folder.",
    )


def _writable(name: str, folder: Path, advice: str) -> Check:
    """Write and remove a file in `folder`, or in the nearest parent that exists (nothing else is created)."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"eco-llm")
    except OSError as error:
        return Check(name, "fail", f"not writable ({error.strerror})", advice)
    return Check(name, "ok", "writable")


def _packages() -> Iterator[Check]:
    for name in ("numpy", "tokenizers", "safetensors", "tyro"):
        yield _package(name, "fail", _install(f"pip install {name}", "which training needs"))
    yield _package("tensorboard", "warn", _install("pip install tensorboard", "to see curves in a browser"))
    parquet = _install('pip install "eco-llm[parquet]"', "if your data is .parquet or .zst")
    yield _package("pyarrow", "warn", parquet)
    hub = _install('pip install "eco-llm[hf]"', "if you want --data hf:NAME")
    yield _package("datasets", "warn", hub)


def bytecode(where: str | None) -> Check:
    """Whether Python keeps what it compiled PyTorch's sources to, now that they were imported.

    Args:
        where: its file for the first of them.
    """
    if where and Path(where).exists():
        return Check("bytecode", "ok", "PyTorch's is kept")
    return Check(
        "bytecode",
        "warn",
        "PyTorch's is not kept: every start compiles its sources, for 2 seconds or more",
        "Unset PYTHONDONTWRITEBYTECODE, or set PYTHONPYCACHEPREFIX to a folder that you may write to.",
    )


def _install(command: str, why: str) -> str:
    how = installing(f"`{command}`")
    return f"{how[0].upper()}{how[1:]}, {why}." if is_frozen() else f"Run {how}, {why}."


def _package(name: str, missing: Status, advice: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, missing, "not installed", advice)
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:  # importable without metadata
        return Check(name, "ok", "installed")


def _import_torch() -> tuple[ModuleType | None, Check]:
    """Import torch and judge its version; None when it cannot be imported."""
    wanted = f"torch >= {TORCH_MIN[0]}.{TORCH_MIN[1]}, < {TORCH_BELOW[0]}.{TORCH_BELOW[1]}"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a missing or broken shared library
        return None, Check("torch", "fail", _last_line(str(error)), f"Install {wanted}.")
    version = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None
    pair = (int(numbers[1]), int(numbers[2]))
    if pair < TORCH_MIN:
        return torch, Check("torch", "fail", version, f"Install {wanted}.")
    if pair >= TORCH_BELOW:
        return torch, Check("torch", "warn", version, f"Newer than what is tested ({wanted}); it may not work.")
    return torch, Check("torch", "ok", version)


def _gpu(torch: ModuleType) -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield _no_gpu(torch)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        name = f"GPU cuda:{index}"
        memory = f"{properties.total_memory / _GIB:.1f} GiB"
        found = f"{properties.name}, {memory}, compute capability {capability}"
        if properties.major < 7:
            yield Check(name, "warn", found, "Triton needs compute capability 7.0 or more: train on CPU here.")
        else:
            yield Check(name, "ok", found)
        try:
            with NvmlDevice.of_torch(properties) as gpu:
                gpu.sample()
                yield Check(f"NVML cuda:{index}", "ok", f"driver {gpu.driver}")
        except NvmlUnavailableError as error:
            advice = _install("pip install nvidia-ml-py", "without which GPU utilisation stays unknown")
            yield Check(f"NVML cuda:{index}", "warn", str(error), advice)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Check("bf16", "ok", "supported by the GPU")
    else:
        yield Check("bf16", "warn", "only emulated", "Train with --dtype fp32: this GPU has no bf16 arithmetic.")


def _no_gpu(torch: ModuleType) -> Check:
    """Tell a machine without a GPU from one whose torch cannot use it."""
    small = "Training runs on the CPU: begin with `eco_train @presets/quickstart_cpu.txt`."
    try:
        with NvmlDevice.only() as gpu:
            name, driver = gpu.name, gpu.driver
    except NvmlUnavailableError:
        return Check("GPU", "warn", "no CUDA GPU", small)
    if torch.version.cuda is None:
        advice = "This torch is a CPU build: install a CUDA build (pytorch.org, Get Started) to use the GPU."
    else:
        advice = f"torch needs a driver for CUDA {torch.version.cuda} or newer: update the NVIDIA driver."
    return Check("GPU", "warn", f"{name} (driver {driver}) is not visible to torch", advice)


def _triton() -> Iterator[Check]:
    package = "triton-windows" if sys.platform == "win32" else "triton"
    if importlib.util.find_spec("triton") is None:
        advice = _install(f"pip install {package}", f"or train without the fast kernels and {_NO_COMPILE}")
        yield Check("Triton", "warn", "not installed", advice)
        return
    version = _package("triton", "warn", "").found
    problem = _probe(_TRITON_PROBE)
    if problem is None:
        yield Check("Triton", "ok", f"{version}, a kernel compiled and ran")
    else:
        advice = f"Triton needs a C compiler and matching {package}: mend it, or {_NO_COMPILE}."
        yield Check("Triton", "warn", f"{version}: {problem}", advice)


def _compile(torch: ModuleType) -> Iterator[Check]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiler = _cpp_compiler()
    if compiler is None:
        yield Check("C++ compiler", "warn", "not found", _compiler_advice())
        if device == "cpu":  # without one the compilation below can only fail
            return
    else:
        yield Check("C++ compiler", "ok", _compiler_version(compiler))
    if device == "cpu" and (spaced := _paths_with_spaces(torch)):
        advice = f"Move it to a path without a space, or set TORCHINDUCTOR_CACHE_DIR to one; until then {_NO_COMPILE}."
        yield Check("compiler paths", "warn", f"TorchInductor's C++ cannot have a space in {spaced[0]}", advice)
    problem = _probe(_COMPILE_PROBE, device)
    if problem is None:
        yield Check("torch.compile", "ok", f"a function and its gradient compiled and ran on {device}")
    else:
        yield Check("torch.compile", "warn", problem, f"Mend the compiler above, or {_NO_COMPILE}.")


def _paths_with_spaces(torch: ModuleType) -> list[str]:
    """Folders that TorchInductor puts on the compiler's command line without quotes (found with torch 2.13)."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(Path.cwd() / ".runtime_cache")
    installed = str(Path(torch.__file__ or "").parent)
    return [path for path in (cache, installed) if len(path.split()) > 1]


def _cpp_compiler() -> str | None:
    """Name of the C++ compiler that torch.compile would find: $CXX, or the platform's usual ones."""
    usual = ("cl", "clang-cl") if sys.platform == "win32" else ("g++", "clang++", "c++")
    named = os.environ.get("CXX")
    for name in (named,) if named else usual:
        if shutil.which(name):
            return Path(name).name
    return None


def _compiler_version(name: str) -> str:
    """What the compiler says of itself, or its name where it says nothing (Microsoft's cl knows no --version)."""
    try:
        done = subprocess.run([os.environ.get("CXX") or name, "--version"], capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return name
    said = done.stdout.decode(errors="replace").strip()
    return said.splitlines()[0] if said else name


def _compiler_advice() -> str:
    if sys.platform == "win32":
        what = 'Install "Desktop development with C++" (Visual Studio Build Tools) and use its developer prompt'
    elif sys.platform == "darwin":
        what = "Run `xcode-select --install`"
    else:
        what = "Install g++ (package g++ or gcc-c++)"
    return f"{what} to use torch.compile; until then {_NO_COMPILE}."


def _probe(program: str, *arguments: str, seconds: float = PROBE_SECONDS) -> str | None:
    """Run `program` in a fresh interpreter with empty compiler caches; None if it ended well, else why not."""
    with tempfile.TemporaryDirectory(prefix="eco-doctor-", ignore_cleanup_errors=True) as folder:
        script = Path(folder) / "probe.py"
        script.write_text(program, encoding="utf-8")
        # One compile thread: no worker pool that would outlive a killed child.
        env = {**os.environ, **without_openssl(), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)} | {
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, str(script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=env,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return f"did not finish in {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return _last_line(done.stderr) or f"exit code {done.returncode}"


def _last_line(text: str) -> str:
    """The line of a traceback that names the error: the last one that looks like `Error: …`, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Unsupported|Failed)\w*(:|$)", line)]
    line = (named or lines or [""])[-1]
    return line if len(line) <= 200 else line[:199] + "…"


def _has_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())
