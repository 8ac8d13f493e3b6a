"""What goes into the frozen build besides what PyInstaller finds by itself, and what stays out."""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.util
import os
import py_compile
import subprocess
import sysconfig
from pathlib import Path

AS_FILES = ("eco_llm", "torch", "torchgen", "functorch", "triton")
"""Packages whose modules stay .py files on the disk, each with its byte code beside it."""

EXCLUDED = [
    # Extras and tools that may be installed where the build runs, and are no part of the product.
    "IPython", "_pytest", "datasets", "hypothesis", "matplotlib", "mypy", "numba", "onnx", "onnxruntime", "pandas",
    "pip", "pyarrow", "pydantic", "pydantic_core", "pytest", "ruff", "scipy", "tensorflow", "torchaudio", "torchvision",
    "transformers",
    # Parts of dependencies that serve what we do not: `tokenizers`' downloads, TensorBoard's web server and images,
    # graphical windows.
    "PIL", "grpc", "hf_xet", "httpx", "huggingface_hub", "tensorboard_data_server", "tkinter", "werkzeug",
    # torch's own tests. What is left of torch.testing is imported by torch itself.
    "torch.testing._internal.codegen", "torch.testing._internal.common_methods_invocations",
    "torch.testing._internal.distributed._shard", "torch.testing._internal.distributed._tensor",
    "torch.testing._internal.distributed.distributed_test", "torch.testing._internal.distributed.nn",
    "torch.testing._internal.distributed.rpc", "torch.testing._internal.generated", "torch.testing._internal.opinfo",
]  # fmt: skip

_METADATA = (
    "torch", "triton", "triton-windows", "numpy", "tokenizers", "safetensors", "tyro", "rich", "tensorboard", "psutil",
    "nvidia-ml-py", "filelock", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "typing_extensions", "fsspec",
    "setuptools", "protobuf", "absl-py",
)  # fmt: skip
"""Distributions whose metadata is kept: their versions (`doctor`, evidence files), entry points and licences."""

_CODE = ("eco_llm", "packaging", "presets", "train_sigma.py", "train_sigma_args.txt", "constraints.txt")

Data = tuple[str, str]
"""(file or folder, folder inside the build)."""


def hidden_imports(root: Path) -> list[str]:
    """Modules that are imported by name: every command, and the kernels, which wait for Triton."""
    found = [_module(path, root) for path in (root / "eco_llm").rglob("*.py")]
    return [*found, *(["triton"] if importlib.util.find_spec("triton") else [])]


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def data_files(root: Path, work: Path) -> list[Data]:
    """The standard library's sources, Python's headers, metadata of packages, the report's page, and the commit."""
    return [*_stdlib_sources(), *_python_headers(), *_metadata(), *_page(root), *_commit(root, work)]


def _stdlib_sources() -> list[Data]:
    """What `--data stdlib` reads, found as it finds them and put where it looks for them: its text stays the same."""
    from eco_llm.config import DataConfig
    from eco_llm.data.skips import Skips
    from eco_llm.data.sources import sources

    files = [str(source.path) for source in sources(DataConfig(data=("stdlib",)), Skips())]
    return [(name, _inside(Path(name).parent)) for name in files]


def _page(root: Path) -> list[Data]:
    """Template, style and script of report.html, which the package reads from beside its code."""
    folder = Path("eco_llm/proof/report/page")
    return [(str(path), str(folder)) for path in sorted((root / folder).iterdir())]


def _python_headers() -> list[Data]:
    """Python.h and its like (and on Windows the import library): what TorchInductor and Triton compile is linked to."""
    folders = {Path(sysconfig.get_path(kind)) for kind in ("include", "platinclude")}
    data = [(str(folder), _inside(folder)) for folder in folders]
    libraries = Path(sysconfig.get_config_var("installed_base")) / "libs"
    return [*data, *([(str(libraries), "libs")] if libraries.is_dir() else [])]


def _inside(folder: Path) -> str:
    """Where `sysconfig` of the frozen program, whose prefix is its own folder, looks for a folder of this Python."""
    for base in ("installed_base", "installed_platbase"):
        prefix = Path(sysconfig.get_config_var(base))
        if folder.is_relative_to(prefix):
            return folder.relative_to(prefix).as_posix()
    raise SystemExit(f"{folder} is outside this Python's prefix: build with another Python")


def _metadata() -> list[Data]:
    from PyInstaller.utils.hooks import copy_metadata

    found: list[Data] = []
    for name in _METADATA:
        try:
            found += copy_metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit(root: Path, work: Path) -> list[Data]:
    """The commit as a file, for the evidence files that the program writes; nothing from a changed or unknown tree."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *_CODE)
    if head is None or changes != "":
        return []
    work.mkdir(parents=True, exist_ok=True)
    (work / "commit.txt").write_text(head, encoding="utf-8")
    return [(str(work / "commit.txt"), ".")]


def compile_sources(folder: Path) -> None:
    """Byte code beside every source of AS_FILES, never checked against it: a copy or an archive changes the times of
    files, and a program that may not write where it is installed would compile all of torch at each start.
    """
    for package in AS_FILES:
        if (folder / package).is_dir() and not compileall.compile_dir(
            folder / package,
            quiet=1,
            workers=os.cpu_count() or 1,
            stripdir=folder,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        ):
            raise SystemExit(f"{package}: a source could not be compiled")
