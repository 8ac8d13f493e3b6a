"""The executable that `make exe` built, where nothing else of Python is: `make exe-test`.

Where the system allows it (Linux, mount namespaces), the build is mounted read-only in another place, and this
checkout, this Python and its packages are hidden from it. Everywhere: an empty environment, no Python on PATH, no HOME,
another working directory, and at the end not a file of the build has changed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eco_llm.cli.doctor import _cpp_compiler
from eco_llm.cli.main import COMMANDS
from eco_llm.config import DataConfig
from eco_llm.data.sources import fingerprint
from eco_llm.perf.environment import source_digest

ROOT = Path(__file__).resolve().parents[2]
BUILD = os.environ.get("ECO_TRAIN_EXE")
pytestmark = [
    pytest.mark.skipif(BUILD is None, reason="ECO_TRAIN_EXE does not name a build: use `make exe-test`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

# The report's command lines, word for word.
SHORT_WINDOW = (
    "@train_sigma_args.txt --output-dir runs/sigma_main --steps 3 --no-resume --save-interval 1000"
    " --perf-profile-enable --perf-warmup-steps 1 --perf-measure-steps 2 --perf-profiler-steps 2"
    " --perf-device-time-mode auto --perf-sync-boundaries"
)
LONG_RUN = (
    "@train_sigma_args.txt --output-dir runs/sigma_main --steps 25 --no-resume --save-interval 1000 --log-interval 5"
)
# After them: all that makes the model small enough for a test. The corpus stays the default, `stdlib`.
SMALL = shlex.split(
    "--d-model 32 --n-layers 3 --mamba-ratio 2 --attention-ratio 1 --n-heads 2 --kv-latent-dim 16 --rope-head-dim 8"
    " --mamba-head-dim 64 --mamba-state-dim 16 --vocab-size 2048 --batch-size 2 --seq-len 24 --warmup-steps 2"
    " --eval-batches 2 --sample-tokens 0 --device cpu"
)

_SCRIPT = """
set -e
mount --bind "$1" "$2"
mount -o remount,bind,ro "$2"
shift 2
while [ "$1" != -- ]; do mount -t tmpfs none "$1"; shift; done
shift
exec "$@"
"""


def _namespace() -> list[str] | None:
    """The command that runs a script where it may mount, or None."""
    script = 'mount -t tmpfs none "$1" && mount --bind "$1" "$1"'
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        if (
            shutil.which("unshare")
            and not subprocess.run(
                [*command, "sh", "-c", script, "sh", str(Path(__file__).parent)], check=False, capture_output=True
            ).returncode
        ):
            return command
    return None


class Installed:
    """The build as a user on another machine has it."""

    def __init__(self, build: Path, folder: Path) -> None:
        self.work = folder / "work"  # no space: TorchInductor cannot compile in a path with one
        self.work.mkdir()
        # Two folders for PATH: a C++ compiler and its own tools; and openssl, with which compiling is quicker.
        self.compiler, self.tools = folder / "compiler", folder / "tools"
        for place, names in ((self.compiler, ("g++", "as", "ld")), (self.tools, ("g++", "as", "ld", "openssl"))):
            place.mkdir()
            for name in names:
                if found := shutil.which(name):
                    (place / name).symlink_to(found)
        self.nothing = folder / "nothing"
        self.nothing.mkdir()
        self.namespace = _namespace()
        self.place, self.before = build, []
        if self.namespace is not None:
            self.place = folder / "opt" / "eco_train"
            self.place.mkdir(parents=True)
            hidden = {ROOT, Path(sys.prefix), Path(sys.base_prefix)} - {Path("/usr"), Path("/usr/local")}
            outermost = [p for p in sorted(hidden) if not any(p != q and p.is_relative_to(q) for q in hidden)]
            self.before = [*self.namespace, "sh", "-c", _SCRIPT, "sh", build, self.place, *outermost, "--"]
        self.program = self.place / ("eco_train.exe" if sys.platform == "win32" else "eco_train")

    def run(self, *words: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the executable; on PATH are at most a C++ compiler and its tools."""
        environment = {"PATH": str(path or self.nothing), **variables}
        if sys.platform == "win32":  # without it, no program finds its libraries there
            environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
        command = ["env", "-i", *(f"{k}={v}" for k, v in environment.items()), self.program]
        if sys.platform == "win32":
            command = [self.program]
        return subprocess.run(
            [str(word) for word in [*self.before, *command, *words]],
            cwd=self.work,
            env=environment if not self.before else None,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=500,
            check=False,
        )

    def ok(self, *words: str, path: Path | None = None, **variables: str) -> str:
        """Standard output of a run that must end well."""
        done = self.run(*words, path=path, **variables)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def exe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    build = (ROOT / str(BUILD)).resolve()
    assert build.is_dir(), f"{build} has not been built: `make exe`"
    before = _state(build)
    installed = Installed(build, tmp_path_factory.mktemp("exe"))
    shutil.copy(build / "train_sigma_args.txt", installed.work)  # beside the program, for users to copy
    yield installed
    assert _state(build) == before  # it writes nothing where it is installed


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_environment_is_empty(exe: Installed) -> None:
    """The test's own check: what the executable sees is its folder, and nothing of the Python it was built with."""
    code = (
        "import json, os, sys; print(json.dumps([sorted(os.environ), sys.prefix, sys.path, os.getcwd(), sys.argv[1:]]))"
    )
    names, prefix, search, here, arguments = json.loads(exe.ok("-c", code, "a b"))
    assert {n for n in names if not n.startswith(("_PYI", "PYINSTALLER"))} <= {
        "PATH", "ECO_LLM_COMMIT", "LC_CTYPE", "PWD", "SYSTEMROOT"
    }  # fmt: skip
    assert Path(prefix).parent == exe.place
    assert all(Path(folder).is_relative_to(exe.place) for folder in search)
    assert (Path(here), arguments) == (exe.work, ["a b"])
    if exe.namespace is not None:
        gone = f"import os; print(os.listdir({str(ROOT)!r}), os.path.exists({sys.executable!r}))"
        assert exe.ok("-c", gone) == "[] False\n"
        denied = exe.run("-c", "import sys; open(sys.prefix + '/new', 'w')")
        assert "Read-only file system" in denied.stderr


def test_help_and_refusals(exe: Installed) -> None:
    assert exe.ok("--help").startswith("usage: eco_train")
    assert "--c3o-trust-norm-refresh-drift" in exe.ok("train", "--help")
    refused = exe.run("--no-such-flag")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("eco_train: error: unknown flag --no-such-flag")


@pytest.mark.parametrize("line", [SHORT_WINDOW, LONG_RUN], ids=["short window", "long run"])
def test_the_reports_command_lines_train(exe: Installed, line: str) -> None:
    """On the default corpus: the standard library of a Python that is not there."""
    exe.ok(*line.split(), *SMALL)
    run = exe.work / "runs" / "sigma_main"
    steps = 3 if "--perf-profile-enable" in line else 25
    assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) for row in rows(run))
    assert json.loads((run / "perf" / "window_10m_bottlenecks.json").read_text(encoding="utf-8"))["dominant_stage"]
    assert (run / "perf" / "baseline_throughput.json").exists() == (steps == 3)
    assert list((run / "tb").glob("events.*"))


def test_sample_and_evaluate(exe: Installed) -> None:
    assert exe.ok("sample", "--run", "runs/sigma_main", "--prompt", "import os", "--tokens", "5").startswith(
        "import os"
    )
    score = json.loads(exe.ok("evaluate", "--run", "runs/sigma_main", "--batches", "2", "--json"))
    assert score["step"] == 25
    assert 0 < score["val_loss"] < 12


def test_the_default_corpus_has_the_text_of_the_python_it_was_built_with(exe: Installed) -> None:
    code = "from eco_llm.config import DataConfig as D; from eco_llm.data.sources import fingerprint as f; "
    assert exe.ok("-c", code + "print(f(D(data=('stdlib',))))").strip() == fingerprint(DataConfig(data=("stdlib",)))
    refused = exe.run("--data", "python-env", *SMALL)
    assert refused.returncode == 2
    assert "carries no installed packages" in refused.stderr


def test_evidence_names_the_code_that_was_built(exe: Installed) -> None:
    found = exe.ok("-c", "from eco_llm.perf.environment import source_digest as s; print(s())").strip()
    assert found == source_digest(), "the build is not of this code: `make exe`"


def test_an_extra_that_was_left_out_is_refused_with_what_to_do(exe: Installed) -> None:
    (exe.work / "a.parquet").touch()
    refused = exe.run("--data", "a.parquet", *SMALL)
    assert refused.returncode == 2
    assert "this executable was built without it; use eco_train from Python" in refused.stderr


# -- compiling -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(_cpp_compiler() is None or sys.platform == "win32", reason="no C++ compiler to put on PATH")
def test_compile_on(exe: Installed) -> None:
    """Steps that are compiled, on the processor's own vector instructions, give the losses of steps that are not."""
    losses = {}
    few = ["--n-layers", "2", "--mamba-ratio", "1", "--eval-interval", "0", "--steps", "3"]
    for switch in ("--no-torch-compile", "--torch-compile"):
        run = f"runs/{switch.lstrip('-')}"
        exe.ok("@train_sigma_args.txt", *SMALL, *few, "--output-dir", run, switch, path=exe.tools)
        losses[switch] = [row["loss"] for row in rows(exe.work / run)]
        resolved = json.loads((exe.work / run / "config.json").read_text(encoding="utf-8"))["resolved"]
        assert resolved["torch_compile"] == (switch == "--torch-compile")
    assert losses["--torch-compile"] == pytest.approx(losses["--no-torch-compile"], rel=1e-4)
    assert list((exe.work / ".runtime_cache" / "inductor").rglob("*.so"))


@pytest.mark.skipif(_cpp_compiler() is None or sys.platform == "win32", reason="no C++ compiler to put on PATH")
def test_the_compiler_finds_the_vector_instructions_that_python_finds(exe: Installed) -> None:
    """TorchInductor tries them in a child `sys.executable -c`; without it, compiled code is many times slower."""
    code = "from torch._inductor.cpu_vec_isa import pick_vec_isa as p; print(p())"
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert exe.ok("-c", code, path=exe.tools) == here


def test_compile_without_a_compiler_says_what_to_do(exe: Installed) -> None:
    done = exe.run("@train_sigma_args.txt", *SMALL, "--output-dir", "runs/none", "--steps", "1", "--torch-compile")
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "compiling failed: use --no-torch-compile; `eco_train doctor` says what the compiler lacks" in said
    assert list((exe.work / "runs" / "none" / "errors").glob("crash_*.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="the pool that TorchInductor starts needs fork")
def test_torchs_compile_workers_start(exe: Installed) -> None:
    """The pool that compiles Triton kernels in children of `sys.executable .../compile_worker/__main__.py`."""
    code = (
        "import math\n"
        "from torch._inductor.compile_worker.subproc_pool import SubprocPool\n"
        "pool = SubprocPool(2)\n"
        "print([pool.submit(math.sqrt, x).result(timeout=120) for x in (4.0, 9.0)])\n"
        "pool.shutdown()"
    )
    assert exe.ok("-c", code) == "[2.0, 3.0]\n"


# -- a second Python -----------------------------------------------------------------------------------------


def test_multiprocessing(exe: Installed) -> None:
    """Every start method, from a file, as a user's script would; none of the children becomes another training."""
    script = exe.work / "a b" / "pool.py"
    script.parent.mkdir()
    script.write_text(
        "import multiprocessing as mp\n"
        "def square(x): return x * x\n"
        "if __name__ == '__main__':\n"
        "    for method in mp.get_all_start_methods():\n"
        "        with mp.get_context(method).Pool(2) as pool: assert pool.map(square, [1, 2, 3]) == [1, 4, 9]\n"
        "    print('done')\n",
        encoding="utf-8",
    )
    assert exe.ok("a b/pool.py") == "done\n"


@pytest.mark.skipif(sys.platform == "win32", reason="torch for Windows has no libuv store to meet at")
def test_torchrun(exe: Installed) -> None:
    script = exe.work / "ranks.py"
    script.write_text(
        "import torch, torch.distributed as d\n"
        "d.init_process_group('gloo')\n"
        "t = torch.ones(1)\n"
        "d.all_reduce(t)\n"
        "print('ranks', int(t), flush=True)\n"
        "d.destroy_process_group()\n",
        encoding="utf-8",
    )
    said = exe.ok("-m", "torch.distributed.run", "--nproc-per-node", "2", "ranks.py")
    assert said.count("ranks 2") == 2
    one = exe.ok("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "eco_llm", "--version")
    assert one.startswith("eco_train ")


def test_every_module_that_python_loads_is_in_the_build(exe: Installed) -> None:
    """What torch imports inside `try` is not missed by name: compare what is loaded, here and there."""
    code = (
        "import sys, torch, torch._dynamo, torch._inductor.compile_fx, torch._inductor.async_compile\n"
        "import torch.utils.cpp_extension, torch.utils.tensorboard, eco_llm.training.launch, eco_llm.cli.doctor\n"
        "print('\\n'.join(m for m in sys.modules if m.split('.')[0] in ('torch', 'eco_llm', 'tensorboard')))"
    )
    here = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(here.split()) - set(exe.ok("-c", code).split()) == set()


# -- the other commands --------------------------------------------------------------------------------------


def test_doctor(exe: Installed) -> None:
    """Its probes run in the executable as Python: with a compiler it compiles, without it says what to install."""
    bare = {check["name"]: check for check in json.loads(exe.ok("doctor", "--json"))["checks"]}
    assert bare["eco-llm"]["found"].endswith("the executable")
    assert (bare["C++ compiler"]["status"], bare["torch"]["status"]) == ("warn", "ok")
    assert "built without it" in bare["pyarrow"]["advice"]
    if exe.compiler.joinpath("g++").exists():
        said = exe.ok("doctor", path=exe.compiler)
        assert "ok    torch.compile: a function and its gradient compiled and ran on cpu" in said
        assert said.endswith("eco_train doctor: ready to train\n")


@pytest.mark.skipif("compare" not in COMMANDS, reason="this version has no compare")
def test_compare(exe: Installed) -> None:
    """Two live children that take turns, each the executable again."""
    common = ["@train_sigma_args.txt", *SMALL, "--output-dir", "runs/compare", "--pairs", "8", "--window-steps", "2"]
    said = exe.ok("compare", "--a", "--lr 2e-2", "--b", "--lr 2e-2", *common)
    report = json.loads((exe.work / "runs/compare/perf/latest_bottleneck_fix_report.json").read_text(encoding="utf-8"))
    assert report["verdict"] in said


@pytest.mark.skipif("sweep" not in COMMANDS, reason="this version has no sweep")
def test_sweep(exe: Installed) -> None:
    """One child a point."""
    measured = ["--perf-warmup-steps", "1", "--perf-measure-steps", "2"]
    exe.ok("sweep", "@train_sigma_args.txt", *SMALL, *measured, "--output-dir", "runs/sweep", "--batch-size", "1,2")
    assert (exe.work / "runs" / "sweep" / "perf" / "sweep.json").exists()
