"""Checkpoints: `checkpoints/step_00000500/{model,optimizer}.safetensors + state.json`, whole or not there.

A checkpoint is written into a temporary folder, every file is flushed to the disk, and the folder is renamed;
a crash at any moment leaves the earlier ones untouched. `state.json` is written last and carries the size and
CRC-32 of the tensor files and the CRC-32 of its own content, so that a damaged checkpoint is noticed and the one
before it used, with a message.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eco_llm.files import fsync_dir, fsync_file, rename, write_json
from eco_llm.training.tree import join_tensors, split_tensors

FORMAT = 1
_PARTIAL = ".partial-"
_REPLACED = f"{_PARTIAL}replaced-"
_DROPPED = f"{_PARTIAL}dropped-"


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose files are missing, truncated or altered; the message says which."""


@dataclass(frozen=True)
class Checkpoint:
    """One loaded checkpoint."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    trainer: dict[str, Any]
    """Loader cursor, random generator state, counters: whatever `save` was given."""


def save(
    folder: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`; return its path.

    Checkpoints past `step` go too: a run stands before them only because they were damaged and passed over.
    `model` (flat, tensors only) and `optimizer` are state dictionaries; `trainer` is plain data and tensors.

    Raises:
        TypeError: a state holds what only pickle could save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / folder_name(step)
    partial = folder / f"{_PARTIAL}{final.name}"
    discard_partial(folder)
    partial.mkdir()

    rest: dict[str, Tensor] = {}
    skeleton = {
        "optimizer": split_tensors(optimizer, rest, "optimizer"),
        "trainer": split_tensors(trainer, rest, "trainer"),
    }
    weights: dict[str, Tensor] = {}
    split_tensors(model, weights)
    if weights.keys() != model.keys():
        raise TypeError("the model's state is not a flat dictionary of tensors")
    files = {}
    for name, tensors in (("model.safetensors", weights), ("optimizer.safetensors", rest)):
        save_file(tensors, partial / name)
        fsync_file(partial / name)
        files[name] = {"bytes": (partial / name).stat().st_size, "crc32": _crc32(partial / name)}
    state = {"format": FORMAT, "step": step, "files": files, **skeleton}
    write_json(partial / "state.json", {**state, "crc32": _crc32_of(state)})

    if final.exists():  # a damaged one that was passed over on resume, now reached again
        rename(final, folder / f"{_REPLACED}{final.name}")
    rename(partial, final)
    fsync_dir(folder)
    present = listing(folder)
    newest = present.index(final) + 1
    for old in present[: max(0, newest - keep)] + present[newest:]:
        rename(old, folder / f"{_DROPPED}{old.name}")  # so that a removal cut short leaves nothing listed
    discard_partial(folder)
    return final


def listing(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = (p for p in folder.glob("step_*") if p.is_dir() and p.name[5:].isdecimal())
    return sorted(found, key=step_of)  # names alone would put step 1000000000 before 99999999


def folder_name(step: int) -> str:
    """Name of a step's checkpoint folder; they sort by step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Step number of a checkpoint folder, from its name."""
    return int(path.name[5:])


def discard_partial(folder: Path) -> None:
    """Clear up after an interrupted `save`; only the process that holds the run's lock may call this.

    A checkpoint that made way for a new one of its step, which then never got the name, gets it back.
    """
    for left in folder.glob(f"{_PARTIAL}*"):
        final = folder / left.name.removeprefix(_REPLACED)
        if left.name.startswith(_REPLACED) and not final.exists():
            rename(left, final)
        else:
            # Windows removes no file that someone has open; what was dropped can wait for the next call.
            shutil.rmtree(left, ignore_errors=left.name.startswith(_DROPPED))


def load(path: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Read and verify one checkpoint (tensors on CPU).

    Raises:
        DamagedCheckpoint: a file is missing, has another size or checksum, or is not what it should be.
    """
    state = _read_state(path / "state.json")
    model = _read_tensors(path / "model.safetensors", state)
    rest = _read_tensors(path / "optimizer.safetensors", state) if with_optimizer else {}
    return Checkpoint(
        step=state["step"],
        model=model,
        optimizer=join_tensors(state["optimizer"], rest) if with_optimizer else None,
        trainer=join_tensors(state["trainer"], rest) if with_optimizer else {},
    )


def random_state() -> dict[str, Tensor]:
    """State of torch's generators, to be put back by `set_random_state`."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore torch's generators; a run moved to another kind of device keeps what applies to it."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, crc32 = state["format"], state.pop("crc32", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    if version != FORMAT:
        raise DamagedCheckpoint(f"{path} has format {version}, this version reads {FORMAT}")
    if crc32 != _crc32_of(state):
        raise DamagedCheckpoint(f"{path} does not match its checksum")
    return cast(dict[str, Any], state)


def _read_tensors(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    expected = state["files"][path.name]
    try:
        if path.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(f"{path} has been truncated or extended")
        if _crc32(path) != expected["crc32"]:
            raise DamagedCheckpoint(f"{path} does not match its checksum")
        # Copies: `load_file`'s tensors are the mapped file, which could not be removed under Windows, nor would its
        # space be free elsewhere, for as long as anything holds one of them.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error


def _crc32_of(state: dict[str, Any]) -> int:
    """Checksum of plain data, the same before writing and after reading: JSON keeps order and every float64."""
    return zlib.crc32(json.dumps(state, allow_nan=False).encode())


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc
