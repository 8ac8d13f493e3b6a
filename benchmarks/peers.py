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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LOSS_ROWS = 4096
"""Tokens whose logits exist at one time in `chunked_loss`: 0.4 GiB of them in bf16 at 50,304 words."""

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


def recompute_blocks(model: Any) -> None:
    """Let every block of a nanoGPT keep its input alone, by PyTorch's own checkpointing."""
    from torch.utils.checkpoint import checkpoint

    for block in model.transformer.h:
        inner = block.forward
        block.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=False)


def chunked_loss(model: Any, *, rows: int = LOSS_ROWS, compiled: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a nanoGPT without ever holding all logits: what a careful user of it would write.

    Logits and cross-entropy are made for `rows` tokens at a time and made again in backward (checkpointing), so that
    between the two nothing of a chunk is kept but its input. Blocks are compiled as one, as a plain nanoGPT is, and the
    chunk on its own, once.

    Args:
        model: with nanoGPT's `transformer` (wte, wpe, drop, h, ln_f) and `lm_head`.
        rows: tokens of a chunk; the last may have fewer.
        compiled: whether torch.compile is used.

    Returns:
        f(inputs [B, T], targets [B, T]) -> mean loss, 0-dim, nats per token: the number that `model` itself returns.
    """
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    def hidden(inputs: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]: the model's forward up to the head, its lines in its order."""
        t = model.transformer
        x = t.drop(t.wte(inputs) + t.wpe(torch.arange(inputs.shape[1], device=inputs.device)))
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def part(x: Tensor, targets: Tensor) -> Tensor:
        """[rows, D], [rows] -> summed loss."""
        return F.cross_entropy(model.lm_head(x), targets, reduction="sum")

    if compiled:
        hidden, part = torch.compile(hidden), torch.compile(part)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        states, wanted = hidden(inputs).flatten(0, 1), targets.flatten()
        sums = [
            checkpoint(part, x, y, use_reentrant=False, preserve_rng_state=False)  # draws no random numbers
            for x, y in zip(states.split(rows), wanted.split(rows), strict=True)
        ]
        return torch.stack(sums).sum() / wanted.numel()

    return loss


def require_equal_loss(model: Any, inputs: Tensor, targets: Tensor, *, loss: float, gradient: float) -> None:
    """Gate: on this batch `chunked_loss` is the model's own loss, and has its gradient. Leaves no gradients.

    Run eagerly, with chunks that do not divide the batch.

    Args:
        model, inputs, targets: as for `chunked_loss`.
        loss: relative difference allowed.
        gradient: |difference| / |gradient| allowed, over all parameters together.

    Raises:
        GateError: more than that.
    """
    import torch
    from common import GateError, require_close

    def gradients(value: Tensor) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        value.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return found

    _, plain = model(inputs, targets)
    ours = chunked_loss(model, rows=inputs.numel() // 3 + 1, compiled=False)(inputs, targets)
    require_close(float(plain.detach()), float(ours.detach()), relative=loss, what="loss in chunks")
    expected, found = gradients(plain), gradients(ours)
    norms = torch._foreach_norm(torch._foreach_sub(expected, found)), torch._foreach_norm(expected)
    difference, norm = (float(torch.linalg.vector_norm(torch.stack(n).float())) for n in norms)
    if not difference <= gradient * norm:
        raise GateError(f"gradient of the loss in chunks differs: {difference / norm:.2e}, allowed {gradient:g}")


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
