"""Batches of tokens: training in an endless resumable order, validation once and in sequence.

B = sequences of one rank, T = tokens of one sequence. A global batch is world_size · B windows; rank r takes every
world_size-th of them from the r-th, so ranks never share a window and agree on the cursor without talking.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from eco_llm.data.order import Position, WindowOrder
from eco_llm.data.shards import PreparedData, TokenArray
from eco_llm.errors import UserError

IGNORED = -100  # a target that the loss leaves out


class Batch(NamedTuple):
    """`inputs` and `targets`, int64 [B, T], contiguous; `targets[b, t]` is the token after `inputs[b, t]`."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """This batch on `device`; from pinned memory the copy does not wait for the device."""
        return Batch(*(t.to(device, non_blocking=t.is_pinned()) for t in self))


def _batch(shape: tuple[int, int], pin_memory: bool) -> tuple[Batch, np.ndarray, np.ndarray]:
    """An uninitialised batch and NumPy views of its two halves."""
    both = torch.empty((2, *shape), dtype=torch.int64, pin_memory=pin_memory)
    views = both.numpy()
    return Batch(both[0], both[1]), views[0], views[1]


class _Source:
    """Makes the batch at a position. Stateless but for caches, so that a thread may own it."""

    def __init__(
        self,
        tokens: TokenArray,
        order: WindowOrder,
        shape: tuple[int, int],
        rank: int,
        world_size: int,
        pin_memory: bool,
    ) -> None:
        self._tokens, self._order, self._shape = tokens, order, shape
        self._rank, self._world_size, self._pin = rank, world_size, pin_memory
        self._window = np.empty(shape[1] + 1, dtype=np.int64)

    def make(self, position: Position) -> tuple[Batch, Position]:
        """This rank's batch at a global position, and the position after the global batch."""
        starts, after = self._order.take(position, self._shape[0] * self._world_size)
        batch, inputs, targets = _batch(self._shape, self._pin)
        for row, start in enumerate(starts[self._rank :: self._world_size]):
            self._tokens.read(int(start), self._window)
            inputs[row] = self._window[:-1]
            targets[row] = self._window[1:]
        return batch, after


class _Prefetcher:
    """A thread that keeps up to `depth` batches ready. An exception in it is raised by `get`, there and ever after."""

    def __init__(self, source: _Source, position: Position, depth: int) -> None:
        self._queue: queue.Queue[tuple[Batch, Position] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        # Daemon: a consumer that dies must not keep the process alive. The thread holds no reference to its owner, so
        # an abandoned loader is collected and its finalizer ends the thread.
        self._thread = threading.Thread(
            target=self._run,
            args=(source, position, self._queue, self._stop),
            name="eco-llm-prefetch",
            daemon=True,
        )
        self._thread.start()

    @staticmethod
    def _run(source: _Source, position: Position, ready: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                item = source.make(position)
                position = item[1]
                ready.put(item)
        except BaseException as error:
            ready.put(error)

    def get(self) -> tuple[Batch, Position]:
        """The next batch and the position after it; waits for the thread."""
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # the thread may be waiting for room
            except queue.Empty:
                self._thread.join(0.001)


class TokenLoader(Iterator[Batch]):
    """Endless training batches in the order of `WindowOrder`, resumable at any batch.

    Args:
        data: a prepared data set.
        batch_size: B, sequences of this rank.
        seq_len: T.
        seed: decides the order, together with the epoch.
        rank, world_size: this process among those that share the data.
        prefetch: batches made ahead by a thread; 0 makes each when it is asked for, with identical results.
        pin_memory: put batches in page-locked memory, for copies to a GPU that do not block.

    Raises:
        UserError: the split is too short for one window.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str = "train",
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}")
        tokens = data.tokens(split)
        self._order = WindowOrder(len(tokens), seq_len, seed, split)
        self._source = _Source(tokens, self._order, (batch_size, seq_len), rank, world_size, pin_memory)
        self._identity: dict[str, int | str] = {
            "data": data.manifest.fingerprint(),
            "split": split,
            "seed": seed,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "world_size": world_size,
        }
        self._depth = prefetch
        self._position = Position()
        self._thread: _Prefetcher | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __next__(self) -> Batch:
        if self._depth == 0:
            batch, self._position = self._source.make(self._position)
            return batch
        if self._thread is None:
            self._thread = _Prefetcher(self._source, self._position, self._depth)
            self._finalizer = weakref.finalize(self, self._thread.close)
        batch, self._position = self._thread.get()
        return batch

    @property
    def epoch(self) -> int:
        """Epoch of the next batch's first window, from 0."""
        return self._position.epoch

    def state_dict(self) -> dict[str, int | str]:
        """The cursor: what has been handed out, whatever the thread has made beyond it. Plain values, for JSON.

        The same on every rank.
        """
        return {"epoch": self._position.epoch, "window": self._position.window, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch handed out when `state` was taken.

        Raises:
            UserError: the cursor belongs to other data or another batch shape, where it means nothing.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"cannot continue in the data: the checkpoint's {name} is {state.get(name)}, this run's is {value}"
                )
        self.close()
        self._position = Position(int(state["epoch"]), int(state["window"]))

    def close(self) -> None:
        """End the prefetch thread. The loader stays usable, from where it was."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = self._thread = None

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_batches(
    tokens: TokenArray,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Validation batches: the same at every call, every token a target at most once.

    Windows of T follow one another through the split; if `max_batches` global batches cannot hold them all,
    windows are taken at even distances over the whole split, because documents lie there in the order of their
    names. Places that no text fills (the end of the last window, the last rows) hold input 0 and target -100, so
    that every batch of every rank has the same shape [B, T]; weigh batch losses by their count of real targets.

    Yields:
        Batch on the CPU; as many on each rank.
    """
    n_windows = -(-(len(tokens) - 1) // seq_len)
    per_step = batch_size * world_size
    n_taken = min(n_windows, max_batches * per_step)
    chosen = np.arange(n_taken, dtype=np.int64) * n_windows // n_taken
    for first in range(0, n_taken, per_step):
        batch, inputs, targets = _batch((batch_size, seq_len), pin_memory)
        inputs.fill(0)
        targets.fill(IGNORED)
        for row, window in enumerate(chosen[first : first + per_step][rank::world_size]):
            start = int(window) * seq_len
            text = np.empty(min(seq_len + 1, len(tokens) - start), dtype=np.int64)
            tokens.read(start, text)
            inputs[row, : len(text) - 1] = text[:-1]
            targets[row, : len(text) - 1] = text[1:]
        yield batch
