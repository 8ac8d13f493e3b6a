"""Tile policy: how many tokens of a sequence one SSD chunk holds."""

from __future__ import annotations

from typing import Literal

# (shortest sequence of the row, chunk), first match from the bottom up. 256 is allowed only for T ≥ 1024. Edit the
# table when a measurement says so. Evidence: benchmarks/results/*/chunk_policy*.json and docs/LOG.md. On an H200 64 is
# the fastest at every length (Triton kernels: 1.3 to 2 times 256); in PyTorch's ops, on a CPU too, 64 and 128 are
# within noise of each other or 64 ahead.
CHUNK_TABLE: tuple[tuple[int, int], ...] = ((1, 64), (1024, 64))


def choose_chunk(seq_len: int, pinned: Literal["auto"] | int = "auto") -> int:
    """SSD chunk length, in tokens, for sequences of `seq_len` tokens.

    Args:
        seq_len: T ≥ 1.
        pinned: `"auto"` follows `CHUNK_TABLE`; a positive number is returned as it is.

    Raises:
        ValueError: `seq_len` or `pinned` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    if pinned != "auto":
        if pinned < 1:
            raise ValueError(f"chunk must be at least 1, got {pinned}")
        return pinned
    return next(chunk for shortest, chunk in reversed(CHUNK_TABLE) if seq_len >= shortest)
