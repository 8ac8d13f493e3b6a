"""Rotary position embedding (RoPE, arXiv 2104.09864), half-split convention.

Channel i < R/2 is paired with channel i + R/2 and the pair turns by position · θ^(−2i/R). Other code pairs channels 2i
and 2i + 1 ("interleaved"); the two differ by a fixed permutation of the R rows of the projections that feed them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.ops.opaque import operator


def rotary_table(start: int, length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, dim / 2] float32, for positions start … start + length − 1."""
    from_zero = start == 0 and not isinstance(length, torch.SymInt)
    table = _from_zero(length, dim, theta, device) if from_zero else _made(start, length, dim, theta, device)
    cos, sin = table.unbind()
    return cos, sin


def _made(start: int, length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    frequencies = theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / -dim)
    angles = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


_MOST_KEPT = 4
_Key = tuple[int, int, float, torch.device]
_kept: dict[_Key, Tensor] = {}
_read_by_graphs: dict[_Key, Tensor] = {}
"""Those that a CUDA graph reads in every replay: they live as long as the process."""


def _from_memory(key: _Key) -> Tensor:
    if key not in _kept:
        if len(_kept) == _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = _made(0, *key)
    return _kept[key]


# An operator, for torch.compile writes what it sees into the kernels that rotate: power, cosine and sine once for every
# head and sequence, 15 µs a kernel at 4 × 512 tokens where the rotation is 2. A copy of what is kept, as operators'
# results must be their own; a model keeps no table, which would fix its longest sequence.
@operator("rotary_table")
def _from_zero(length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    key = (length, dim, theta, device)
    if not _capturing(device):
        return _from_memory(key).clone()
    if key not in _read_by_graphs:
        if key not in _kept:  # what is made in a graph's memory is there after a replay only: not for others
            return _made(0, *key)
        _read_by_graphs[key] = _kept[key]
    return _read_by_graphs[key].clone()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@_from_zero.register_fake
def _(length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    return torch.empty(2, length, dim // 2, dtype=torch.float32, device=device)
