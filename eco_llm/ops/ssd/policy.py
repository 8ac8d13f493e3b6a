"""Tile policy: how many tokens of a sequence one SSD chunk holds."""

from __future__ import annotations

from typing import Literal

# (shortest sequence of the row, chunk), first match from the bottom up. 256 is allowed only for T ≥ 1024.
# Edit the table when a measurement says so. Evidence: benchmarks/results/*/chunk_policy.json (64 and 128 within noise
# of each other at 512, 1024 and 4096 tokens, 256 slower at each, on an H200 and on a CPU; docs/LOG.md). A row of 256
# must wait until torch 2.11 is no longer supported: its compiler fails on a scan of 256 (CUDA; 2.13 has the fix).
CHUNK_TABLE: tuple[tuple[int, int], ...] = ((1, 128), (1024, 128))


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
