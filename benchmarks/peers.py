"""The systems we are compared with, loaded from checkouts whose paths a benchmark is given; nothing is vendored.

nanoGPT (MIT, github.com/karpathy/nanoGPT): its `model.py`, as it is. mamba (Apache-2.0, github.com/state-spaces/mamba):
its Triton SSD kernels, without executing the package's `__init__`, which imports compiled extensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

NANOGPT = "https://github.com/karpathy/nanoGPT"
MAMBA = "https://github.com/state-spaces/mamba"


class PeerError(Exception):
    """The path is not a checkout of the peer; one line."""


def describe(path: Path, files: list[str]) -> dict[str, Any]:
    """What the evidence file says about a peer: the commit if the checkout has one, and a digest of the files used."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + b"\0" + (path / name).read_bytes().replace(b"\r\n", b"\n") + b"\0")
    commit = None
    if (path / ".git").exists():  # else git would answer for the repository around it
        git = ["git", "-C", str(path), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "files": files, "sha256": digest.hexdigest()}


def load_nanogpt(path: Path) -> types.ModuleType:
    """nanoGPT's model.py as a module.

    Raises:
        PeerError: there is none at `path`.
    """
    source = path / "model.py"
    if not source.is_file():
        raise PeerError(f"--peer {path}: no model.py there; clone {NANOGPT} and give its folder")
    spec = importlib.util.spec_from_file_location("nanogpt_model", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def nanogpt_model(module: types.ModuleType, **config: Any) -> Any:
    """A GPT of that size; what it prints while being built is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**config))


def load_mamba_module(path: Path, name: str) -> types.ModuleType:
    """`mamba_ssm.<name>` from a checkout (say "ops.triton.ssd_combined"), the packages' `__init__` files not executed.

    Raises:
        PeerError: no such file at `path`, or `mamba_ssm` is already imported from elsewhere.
    """
    package = path / "mamba_ssm"
    file = package.joinpath(*name.split(".")).with_suffix(".py")
    if not file.is_file():
        raise PeerError(f"--peer {path}: no {file.relative_to(path).as_posix()} there; clone {MAMBA}, give its folder")
    parts = ["mamba_ssm"]
    for part in [*name.split(".")[:-1], None]:
        dotted = ".".join(parts)
        folder = str(path.joinpath(*parts))
        known = sys.modules.get(dotted)
        if known is None:
            stub = types.ModuleType(dotted)
            stub.__path__ = [folder]  # makes it a package: its modules are found, its __init__ never runs
            sys.modules[dotted] = stub
        elif folder not in list(getattr(known, "__path__", [])):
            raise PeerError(f"--peer {path}: {dotted} is already imported from elsewhere")
        if part is not None:
            parts.append(part)
    if "mamba_ssm.utils" not in sys.modules:
        utils = types.ModuleType("mamba_ssm.utils")
        utils.__path__ = [str(package / "utils")]
        sys.modules["mamba_ssm.utils"] = utils
    return importlib.import_module(f"mamba_ssm.{name}")
