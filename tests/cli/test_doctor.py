"""doctor: each finding can go wrong, a failure gives exit code 1, and what it says it tried, it tried."""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eco_llm.cli import doctor
from eco_llm.cli.doctor import Check
from eco_llm.perf.nvml import NvmlUnavailableError

ROOT = Path(doctor.__file__).resolve().parents[2]


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda program, *arguments: None)


def named(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def test_torch_range_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = doctor.TORCH_MIN, doctor.TORCH_BELOW
    assert f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}" in project["dependencies"]
    assert project["requires-python"] == ">={}.{}".format(*doctor.PYTHON_MIN)


@pytest.mark.usefixtures("no_probes")
def test_this_machine_can_train_and_every_problem_has_one_sentence_of_advice() -> None:
    heard: list[str] = []
    checks = list(doctor.diagnose(heard.append))
    assert all(check.status != "fail" for check in checks)
    assert all(bool(check.advice) == (check.status != "ok") for check in checks)
    assert all(check.advice.endswith(".") for check in checks if check.advice)
    assert len({check.name for check in checks}) == len(checks)
    assert named(checks, "torch").found == str(torch.__version__)
    assert "torch" in heard


def test_importing_the_doctor_does_not_import_torch() -> None:
    code = "import sys, eco_llm.cli.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.usefixtures("no_probes")
def test_json_is_json_and_names_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.show(json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable"] is True
    assert {"name", "status", "found", "advice"} == set(report["checks"][0])
    assert report["environment"]["python"] in [check["found"] for check in report["checks"]]


def test_a_failure_gives_exit_code_1_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("disk", "fail", "0.1 GiB [free]", "Free some."), Check("GPU", "warn", "none", "Buy one.")]
    monkeypatch.setattr(doctor, "diagnose", lambda: iter(checks))
    assert doctor.show(json=True) == 1
    assert json.loads(capsys.readouterr().out)["trainable"] is False
    assert doctor.show(json=False) == 1
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "fail  disk: 0.1 GiB [free] -> Free some.",
        "warn  GPU: none -> Buy one.",
        "eco_train doctor: cannot train yet: disk",
    ]


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(doctor, "diagnose", lambda progress: iter([Check("disk", "ok", "5 [GiB]")]))
    assert doctor.show(json=False) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "5 [GiB]" in out


class Pipe(io.StringIO):
    """A stream that is no terminal and keeps what has been flushed."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def test_each_finding_is_printed_when_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal too: the line before a slow check must not wait for it."""
    pipe = Pipe()
    seen: list[str] = []

    def slow() -> Iterator[Check]:
        yield Check("disk", "ok", "5 GiB")
        seen.append(pipe.flushed)
        yield Check("torch.compile", "warn", "slow", "Wait.")

    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(doctor, "diagnose", slow)
    assert doctor.show(json=False) == 0
    assert seen == ["ok    disk: 5 GiB\n"]


def test_the_executable_is_told_that_nothing_can_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    advice = "This executable was built without it; use eco_train from Python, and there `pip install tensorboard`"
    assert named(list(doctor._packages()), "tensorboard").advice.startswith("Run `pip install tensorboard`")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert named(list(doctor._packages()), "tensorboard").advice.startswith(advice)
    assert named(list(doctor._system()), "eco-llm").found.endswith("the executable")


def test_the_compilers_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    assert doctor._compiler_version("python") == f"Python {platform.python_version()}"
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert doctor._compiler_version("cl") == "cl"


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert named(list(doctor._system()), "Python").status == "fail"


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, "fail"), (2, "warn"), (500, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, free_gib: float, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gib * 2**30))
    assert named(list(doctor._folders()), "disk").status == status


def test_unwritable_folder_fails_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(check.status == "ok" for check in doctor._folders() if check.name != "disk")
    assert list(tmp_path.iterdir()) == []

    def refuse(**kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = named(list(doctor._folders()), ".runtime_cache")
    assert (found.status, found.found) == ("fail", "not writable (Permission denied)")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    status = {check.name: check.status for check in doctor._packages()}
    assert (status["tokenizers"], status["pyarrow"], status["datasets"]) == ("fail", "warn", "warn")


@pytest.mark.parametrize(
    ("version", "status"), [("2.10.1+cu128", "fail"), ("2.11.0", "ok"), ("2.13.1", "ok"), ("2.14.0a0+git", "warn")]
)
def test_torch_version(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
    torch_found, check = doctor._import_torch()
    assert torch_found is not None
    assert check.status == status


def test_no_torch_is_a_failure_and_ends_the_torch_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    *_, last = doctor.diagnose()
    assert last.name == "torch"
    assert last.status == "fail"


def fake_torch(cuda: str | None, available: bool, major: int = 9, bf16: bool = True) -> Any:
    properties = SimpleNamespace(name="Fake", total_memory=8 * 2**30, major=major, minor=0)
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: 1,
            get_device_properties=lambda index: properties,
            is_bf16_supported=lambda including_emulation: bf16,
        ),
    )


class FakeGpu:
    @staticmethod
    @contextmanager
    def opened(*arguments: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(name="Fake", driver="580.1", sample=lambda: None)

    @staticmethod
    def missing(*arguments: object) -> None:
        raise NvmlUnavailableError("nvidia-ml-py is not installed")


@pytest.mark.parametrize(
    ("cuda", "nvml", "advice"),
    [
        (None, FakeGpu.missing, "Training runs on the CPU"),
        (None, FakeGpu.opened, "CPU build"),
        ("13.0", FakeGpu.opened, "update the NVIDIA driver"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, nvml: Any, advice: str) -> None:
    monkeypatch.setattr(doctor.NvmlDevice, "only", nvml)
    (check,) = doctor._gpu(fake_torch(cuda, available=False))
    assert check.status == "warn"
    assert advice in check.advice


def test_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.NvmlDevice, "of_torch", FakeGpu.missing)
    checks = list(doctor._gpu(fake_torch("13.0", available=True, major=6, bf16=False)))
    assert [check.status for check in checks] == ["warn", "warn", "warn"]
    monkeypatch.setattr(doctor.NvmlDevice, "of_torch", FakeGpu.opened)
    checks = list(doctor._gpu(fake_torch("13.0", available=True)))
    assert [check.status for check in checks] == ["ok", "ok", "ok"]
    assert named(checks, "NVML cuda:0").found == "driver 580.1"


def test_no_compiler_warns_and_is_not_tried_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_probe", lambda *a: pytest.fail("tried without a compiler"))
    (check,) = doctor._compile(fake_torch(None, available=False))
    assert check.status == "warn"
    assert "--no-torch-compile" in check.advice
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Build Tools" in doctor._compiler_advice()


def test_a_space_in_a_path_of_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(doctor, "_compiler_version", lambda name: "g++ 12")
    monkeypatch.setattr(doctor, "_probe", lambda *a: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch = fake_torch(None, available=False)
    torch.__file__ = "/opt/torch/__init__.py"
    assert [check.status for check in doctor._compile(torch)] == ["ok", "ok"]
    torch.__file__ = "/opt/my programs/torch/__init__.py"
    assert "/opt/my programs/torch" in named(list(doctor._compile(torch)), "compiler paths").found
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    assert str(tmp_path / "a b") in named(list(doctor._compile(torch)), "compiler paths").found


def test_failed_compilation_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(doctor, "_compiler_version", lambda name: "g++ 12")
    monkeypatch.setattr(doctor, "_probe", lambda *a: "CppCompileError: no header")
    torch = fake_torch(None, available=False)
    torch.__file__ = "/opt/torch/__init__.py"
    check = named(list(doctor._compile(torch)), "torch.compile")
    assert (check.status, check.found) == ("warn", "CppCompileError: no header")


def test_missing_triton_on_windows_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", "win32")
    (check,) = doctor._triton()
    assert "pip install triton-windows" in check.advice


def test_probe_reports_success_error_and_time_out() -> None:
    assert doctor._probe("import os; assert 'eco-doctor-' in os.environ['TRITON_CACHE_DIR']") is None
    assert doctor._probe("import tempfile; assert 'eco-doctor-' in tempfile.gettempdir()") is None
    problem = doctor._probe("raise RuntimeError('no compiler here')")
    assert problem == "RuntimeError: no compiler here"
    assert doctor._probe("import sys; sys.exit(7)") == "exit code 7"
    start = time.monotonic()
    assert doctor._probe("import time; time.sleep(60)", seconds=1.0) == "did not finish in 1 s"
    assert time.monotonic() - start < 20


def test_the_error_is_found_in_a_noisy_trace() -> None:
    noise = "Traceback …\ntorch._inductor.exc.InductorError: CppCompileError: C++ compile error\n\nSet TORCHDYNAMO=1\n"
    assert doctor._last_line(noise) == "torch._inductor.exc.InductorError: CppCompileError: C++ compile error"
    assert doctor._last_line("x" * 500) == "x" * 199 + "…"
    assert doctor._last_line("") == ""


@pytest.mark.slow
@pytest.mark.skipif(doctor._cpp_compiler() is None, reason="no C++ compiler")
def test_torch_compile_is_really_tried() -> None:
    assert doctor._probe(doctor._COMPILE_PROBE, "cpu") is None


def test_the_compile_probe_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient is caught: `torch.compile` replaced by something that computes another function."""
    sabotage = "import torch; torch.compile = lambda f: (lambda x: (x * 3).sum())\n"
    problem = doctor._probe(sabotage + doctor._COMPILE_PROBE, "cpu")
    assert problem is not None
    assert "wrong gradients" in problem


@pytest.mark.gpu
def test_a_gpu_machine_is_all_well() -> None:
    status = {check.name: (check.status, check.found) for check in doctor.diagnose()}
    for name in ("GPU cuda:0", "bf16", "Triton", "torch.compile"):
        assert status[name][0] == "ok", status[name]


def test_bytecode_that_is_not_kept_is_a_warning(tmp_path: Path) -> None:
    kept = tmp_path / "__init__.cpython-311.pyc"
    assert doctor.bytecode(str(kept)).status == "warn"
    assert "PYTHONDONTWRITEBYTECODE" in doctor.bytecode(None).advice
    kept.touch()
    assert doctor.bytecode(str(kept)).status == "ok"
