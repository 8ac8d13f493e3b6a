"""What of torch goes into the build; stands in for PyInstaller's own hook, which leaves its headers out and imports
every module of torch to find the next.
"""

from pathlib import Path

from collected import EXCLUDED
from PyInstaller.utils.hooks import PY_DYLIB_PATTERNS, collect_data_files, collect_dynamic_libs, get_package_paths

BASE, PACKAGE = (Path(folder) for folder in get_package_paths("torch"))

hiddenimports = []
for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(BASE).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if all(part.isidentifier() for part in parts) and not any(
        module == name or module.startswith(name + ".") for name in EXCLUDED
    ):
        hiddenimports.append(module)
warn_on_missing_hiddenimports = False

# Headers: TorchInductor's C++ for CPUs includes some 100 of them (torch/csrc/inductor/cpp_prefix.h and what it needs).
# ATen/ops declares every operator in 7,000 small files that only ahead-of-time compilation reads.
datas = collect_data_files(
    "torch",
    excludes=["bin/**", "lib/**", "share/**", "test/**", "include/ATen/ops/**", "**/*.pyi", "**/*.cmake"],
)
# On Windows TorchInductor links what it compiles to these; the other .lib are static, large, and torch's own.
_LINKED = ("c10*.lib", "torch.lib", "torch_cpu.lib", "torch_cuda.lib", "torch_python.lib", "sleef.lib")
datas += [(str(library), "torch/lib") for pattern in _LINKED for library in (PACKAGE / "lib").glob(pattern)]
_TEST_LIBRARIES = ("torchbind_test", "jitbackend_test", "backend_with_compiler", "aoti_custom_ops")
binaries = [
    (library, folder)
    for library, folder in collect_dynamic_libs("torch", search_patterns=[*PY_DYLIB_PATTERNS, "*.so.*"])
    if Path(library).parent.name != "test" and not Path(library).name.removeprefix("lib").startswith(_TEST_LIBRARIES)
]
# `import torch` looks for it (not on Windows, which has none).
binaries += [(str(program), "torch/bin") for program in (PACKAGE / "bin").glob("torch_shm_manager")]
# A CUDA build for Linux has its libraries in packages of NVIDIA's, from whose folders torch loads them.
binaries += [(str(library), str(library.parent.relative_to(BASE))) for library in (BASE / "nvidia").rglob("lib*.so*")]
# A second copy of a library beside the program confuses torch about where the others are.
bindepend_symlink_suppression = ["**/torch/lib/*.so*", "**/nvidia/**/*.so*"]
