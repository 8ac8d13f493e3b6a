"""The rules of CONTRIBUTING that a machine can check: which way imports flow, and what stays torch-free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "eco_llm"

# layer → layers it may import from (besides the root modules config, errors, files, runtime, version)
ALLOWED = {
    "ops": {"ops"},
    "instant": {"instant", "ops"},
    "model": {"model", "instant", "ops"},
    "optim": {"optim", "ops"},
    "data": {"data"},
    "perf": {"perf"},
    "proof": {"proof", "perf"},
    "training": {"training", "model", "optim", "instant", "data", "perf"},
    "cli": {"cli", "training", "model", "instant", "data", "perf", "proof"},
}


def imports_of(path: Path) -> set[str]:
    """Layers of eco_llm that a module imports, wherever in the file."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    parts = [m.split(".") for m in modules if m.startswith("eco_llm.")]
    return {p[1] for p in parts if (PACKAGE / p[1]).is_dir()}


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_flow_one_way(layer: str) -> None:
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): imports_of(f) - ALLOWED[layer] for f in files}
    assert {f: layers for f, layers in wrong.items() if layers} == {}


def test_every_layer_has_a_rule() -> None:
    present = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert present == set(ALLOWED)


@pytest.mark.parametrize(
    "module",
    [
        "eco_llm", "eco_llm.config", "eco_llm.runtime", "eco_llm.cli.main", "eco_llm.cli.parse", "eco_llm.cli.train",
        "eco_llm.cli.plan", "eco_llm.instant.plan.search", "eco_llm.perf.memory",
        "eco_llm.data.sources", "eco_llm.data.tokenizer", "eco_llm.data.prepare", "eco_llm.training.run_directory",
        "eco_llm.proof.report", "eco_llm.proof.watch", "eco_llm.cli.sweep", "eco_llm.cli.compare",
        "eco_llm.proof.sweep", "eco_llm.proof.compare",
    ],
)  # fmt: skip
def test_instant_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_loop_stays_small() -> None:
    lines = (PACKAGE / "training" / "sigma_trainer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 400  # DESIGN: the loop is read in one sitting


def test_defaults_live_in_config_only() -> None:
    """The GPU profile's file repeats defaults for the reader, and contradicts those that a measurement on a GPU did."""
    from eco_llm.cli.args_file import expand
    from eco_llm.cli.parse import parse
    from eco_llm.config import TrainConfig, flatten

    profile = flatten(parse(TrainConfig, expand([f"@{ROOT / 'train_sigma_args.txt'}"]), prog="eco_train"))
    defaults = flatten(TrainConfig())
    assert {k: v for k, v in profile.items() if v != defaults[k]} == {
        "c3o_sphere": 1.0, "lr": 8e-3,  # they go together, and no other optimizer wants such a rate
        "weights_dtype": "bf16", "c3o_state_dtype": "bf16",  # for a GPU
        "c3o_trust_norm_refresh_drift": 0.02,
    }  # fmt: skip
