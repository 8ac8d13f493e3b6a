"""Which window of tokens comes when: a pure function of (seed, epoch, position).

A window is T inputs and the same shifted by one, so T + 1 tokens; neighbours share one token. Each epoch shifts
the grid of windows by a random offset below T, so that no text is always cut at the same place, and visits the
windows in a random order. Both come from Philox's raw stream keyed by (seed, epoch): NumPy keeps that stream the
same in every version, and promises no such thing for `Generator.permutation`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eco_llm.errors import UserError


class Position(NamedTuple):
    """A place in the endless sequence of windows: `window` of `epoch` comes next."""

    epoch: int = 0
    window: int = 0


def require_length(n_tokens: int, seq_len: int, split: str) -> None:
    """Raise UserError when a split has no window of `seq_len`."""
    if n_tokens < seq_len + 1:
        kind = {"train": "training", "val": "validation"}.get(split, split)
        raise UserError(
            f"--seq-len {seq_len} is longer than the {kind} split ({n_tokens} tokens, and a window needs"
            f" {seq_len + 1}); give more text or a smaller --seq-len"
        )


class WindowOrder:
    """Order of the training windows of `n_tokens` tokens. Holds one epoch's permutation: 8 bytes per window."""

    def __init__(self, n_tokens: int, seq_len: int, seed: int, split: str = "train") -> None:
        require_length(n_tokens, seq_len, split)
        self._n, self._t, self._seed = n_tokens, seq_len, seed
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def starts(self, epoch: int) -> np.ndarray:
        """First token of every window of an epoch, in visiting order: int64 [windows].

        The number of windows may differ by one between epochs, with the offset.
        """
        if epoch != self._epoch:
            stream = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64))
            slack = self._n - 1 - self._t  # an offset up to this leaves at least one window
            offset = int(stream.random_raw()) % min(self._t, slack + 1)
            count = (self._n - 1 - offset) // self._t
            shuffled = np.argsort(stream.random_raw(count), kind="stable")
            self._starts = offset + self._t * shuffled
            self._epoch = epoch
        return self._starts

    def take(self, position: Position, count: int) -> tuple[np.ndarray, Position]:
        """The next `count` windows' first tokens (int64 [count]) and the position after them.

        An epoch that ends inside is followed by the next one at once, so no window is dropped and a small corpus
        fills any batch.
        """
        parts = []
        epoch, window = position
        while count:
            part = self.starts(epoch)[window : window + count]
            parts.append(part)
            count -= len(part)
            window += len(part)
            if window == len(self.starts(epoch)):
                epoch, window = epoch + 1, 0
        return np.concatenate(parts), Position(epoch, window)
