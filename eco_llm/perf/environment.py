"""What a measurement ran on: the `environment` block of every perf and evidence file.

Never imports torch: it is described if the caller has imported it. Works without git, GPU or installed
package. A user's home and working directory are written as `~` and `.`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from eco_llm.perf.nvml import NvmlDevice, NvmlUnavailableError
from eco_llm.version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]
# "amd64" names an architecture, which Intel's processors have too.
_VENDORS = (("intel", "intel"), ("amd(?!64)", "amd"), ("apple", "apple"), ("arm|aarch", "arm"))
_VERSIONS_OF = ("torch", "triton", "triton-windows", "numpy", "tokenizers", "safetensors")
_CODE = ("eco_llm", "benchmarks", ":(exclude)benchmarks/results", "pyproject.toml", "constraints.txt")


def collect(device: str = "cpu", argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe this machine, this code and this command, ready for JSON.

    Args:
        device: `cpu` or `cuda[:N]`: what the measurement ran on. The GPU is described through torch where it
            is imported and holds a CUDA context (none is created here), else through NVML.
        argv: the command line; `sys.argv` by default.
    """
    commit, dirty = _commit()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv if argv is None else argv),
        "eco_llm": __version__,
        "commit": commit,
        "dirty": dirty,
        "source_sha256": source_digest(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": _versions(),
        "device": device,
        "cpu": _cpu(),
        "gpu": _gpu(device) if device.startswith("cuda") else None,
    }


def command_line(argv: Sequence[str]) -> str:
    """`argv` as one shell line: the program by its name, home and working directory as `~` and `.`."""
    words = [Path(argv[0]).name if argv else ""]
    here, home = str(Path.cwd()), _home()
    for word in argv[1:]:
        for prefix, short in ((here, "."), (home, "~")):
            if len(prefix) > 1:
                word = re.sub(rf"(?<![^=@,]){re.escape(prefix)}(?=$|[/\\])", short, word)
        words.append(word)
    return shlex.join(words)


def _home() -> str:
    """The user's home; empty for a user without one, as an unnamed one in a container."""
    try:
        return str(Path.home())
    except RuntimeError:
        return ""


def source_digest(package: Path = _PACKAGE) -> str:
    """SHA-256 over the package's .py files, names and contents: which code this was, also without git.

    Line endings are normalised, so a Windows checkout has the same digest.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda p: p.relative_to(package).as_posix()):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def _commit() -> tuple[str | None, bool | None]:
    """(commit, whether the code differs from it), or (None, None) outside a git checkout of this project.

    ECO_LLM_COMMIT names the commit for copies that travel without their .git; whether they differ is unknown.
    """
    if named := os.environ.get("ECO_LLM_COMMIT"):
        return named, None
    root = _PACKAGE.parent
    if not (root / ".git").exists():  # installed somewhere: an enclosing repository would not be this project
        return None, None
    head = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--", *_CODE)
    return (head, None if status is None else bool(status)) if head else (None, None)


def _git(root: Path, *arguments: str) -> str | None:
    """git's output, stripped; None without git, without a commit, or after ten seconds."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=10,
            check=True,
            encoding="utf-8",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    """Installed versions; torch's own, with its CUDA suffix, where it is imported."""
    versions: dict[str, str] = {}
    for name in _VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None:
        versions["torch"] = str(torch.__version__)
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
    return versions


def _cpu() -> dict[str, Any]:
    model, vendor = _cpu_model()
    return {
        "model": model,
        "vendor": vendor,
        "logical_cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
    }


def available_cores() -> int:
    """Logical cores this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> tuple[str, str]:
    """(model name, vendor as one lower-case word)."""
    model = platform.processor() or platform.machine()
    hint = model
    if sys.platform == "linux":
        info = Path("/proc/cpuinfo")
        fields = re.findall(r"^(model name|vendor_id)\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M)
        found = dict(fields)
        model = found.get("model name", model)
        hint = f"{model} {found.get('vendor_id', '')}"
    elif sys.platform == "darwin":
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, encoding="utf-8", check=False
        )
        hint = model = done.stdout.strip() or model
    hint = f"{hint} {platform.machine()}".lower()
    for pattern, vendor in _VENDORS:
        if re.search(pattern, hint):
            return model, vendor
    return model, "unknown"


def _gpu(device: str) -> dict[str, Any] | None:
    """The measured GPU; None where neither torch nor NVML can say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return _gpu_of_torch(torch, device)
    try:
        with NvmlDevice.only() as gpu:
            memory = round(gpu.memory_total_bytes() / 2**30, 2)
            return {"name": gpu.name, "memory_gib": memory, "compute_capability": None, "driver": gpu.driver}
    except NvmlUnavailableError:
        return None


def _gpu_of_torch(torch: ModuleType, device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.device(device))
    try:
        with NvmlDevice.of_torch(properties) as gpu:
            driver: str | None = gpu.driver
    except NvmlUnavailableError:
        driver = None
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver,
    }
