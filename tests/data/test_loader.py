from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from eco_llm.data import loader as module
from eco_llm.data.loader import IGNORED, Batch, TokenLoader, evaluation_batches
from eco_llm.data.order import WindowOrder
from eco_llm.data.shards import PreparedData
from eco_llm.errors import UserError

T, B = 63, 3


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "eco-llm-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert not threads()
    yield
    gc.collect()
    assert not threads()


def make(data: PreparedData, **other: Any) -> TokenLoader:
    return TokenLoader(data, **{"batch_size": B, "seq_len": T, "seed": 5, **other})


def take(loader: TokenLoader, n: int) -> torch.Tensor:
    """[n, 2, B, T]"""
    return torch.stack([torch.stack(next(loader)) for _ in range(n)])


def everything(data: PreparedData, split: str) -> np.ndarray:
    array = data.tokens(split)
    out = np.empty(len(array), dtype=np.int64)
    array.read(0, out)
    return out


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_are_the_windows_of_the_order(prepared: PreparedData, prefetch: int) -> None:
    tokens = everything(prepared, "train")
    order = WindowOrder(len(tokens), T, 5)
    n = 2 * len(order.starts(0)) // B  # into the second epoch
    with make(prepared, prefetch=prefetch) as loader:
        batches = take(loader, n)
        assert loader.epoch >= 1
    starts = np.concatenate([order.starts(e) for e in range(3)])[: n * B].reshape(n, B)
    expected = np.stack([[tokens[s : s + T + 1] for s in row] for row in starts])
    assert batches.dtype == torch.int64
    assert torch.equal(batches[:, 0], torch.from_numpy(expected[..., :-1]))
    assert torch.equal(batches[:, 1], torch.from_numpy(expected[..., 1:]))


def test_a_batch_is_contiguous_and_its_own(prepared: PreparedData) -> None:
    with make(prepared) as loader:
        first = next(loader)
        kept = first.inputs.clone()
        assert first.inputs.is_contiguous()
        assert first.targets.is_contiguous()
        assert first.inputs.shape == first.targets.shape == (B, T)
        take(loader, 10)
        assert torch.equal(first.inputs, kept)  # later batches do not reuse its memory
        moved = first.to("cpu")
        assert isinstance(moved, Batch)


@pytest.mark.parametrize("steps", [0, 1, 7, 150])
def test_resuming_continues_exactly_though_the_thread_had_run_ahead(prepared: PreparedData, steps: int) -> None:
    with make(prepared) as loader:
        uninterrupted = take(loader, steps + 20)
    with make(prepared, prefetch=8) as loader:
        for _ in range(steps):
            next(loader)
        if steps:
            assert loader._thread is not None
            deadline = time.monotonic() + 10
            while not loader._thread._queue.full() and time.monotonic() < deadline:
                time.sleep(0.001)
            assert loader._thread._queue.full()  # batches made and not handed out
        state = json.loads(json.dumps(loader.state_dict()))
    with make(prepared, prefetch=0) as slow, make(prepared) as fast:
        for resumed in (slow, fast):
            next(resumed)  # a cursor also replaces one that has moved
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert torch.equal(take(resumed, 20), uninterrupted[steps:])


@pytest.mark.parametrize(
    "other",
    [{"seq_len": T - 1}, {"batch_size": B + 1}, {"world_size": 2}, {"seed": 6}, {"split": "val"}],
    ids=lambda d: next(iter(d)),
)
def test_a_cursor_of_another_run_is_refused(prepared: PreparedData, other: dict[str, Any]) -> None:
    state = make(prepared).state_dict()
    with pytest.raises(UserError, match=f"the checkpoint's {next(iter(other))} is "):
        make(prepared, **other).load_state_dict(state)
    with pytest.raises(UserError, match="the checkpoint's data is "):
        make(prepared).load_state_dict(state | {"data": "0" * 32})


def test_ranks_share_no_window_and_together_read_what_one_process_would(prepared: PreparedData) -> None:
    with make(prepared, batch_size=4) as one:
        whole = take(one, 30)
        state = one.state_dict()
    with (
        make(prepared, batch_size=2, world_size=2, rank=0) as a,
        make(prepared, batch_size=2, world_size=2, rank=1) as b,
    ):
        halves = [take(a, 30), take(b, 30)]
        assert a.state_dict() == b.state_dict()
        assert {k: a.state_dict()[k] for k in ("epoch", "window")} == {k: state[k] for k in ("epoch", "window")}
    assert torch.equal(torch.stack(halves, dim=3).flatten(2, 3), whole)
    with pytest.raises(ValueError, match="rank 2 of world_size 2"):
        make(prepared, rank=2, world_size=2)


def test_an_error_in_the_thread_is_raised_here_and_stays(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._Source.make
    made = []

    def fail_on_third(self: Any, position: Any) -> Any:
        made.append(position)
        if len(made) == 3:
            raise OSError("the disk is gone")
        return real(self, position)

    monkeypatch.setattr(module._Source, "make", fail_on_third)
    with make(prepared) as loader:
        take(loader, 2)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(loader)


def test_an_abandoned_or_closed_loader_leaves_no_thread_and_can_go_on(prepared: PreparedData) -> None:
    loader = make(prepared, prefetch=2)
    first = take(loader, 2)
    assert len(threads()) == 1
    loader.close()
    assert not threads()
    loader.close()
    rest = take(loader, 2)
    with make(prepared, prefetch=0) as slow:
        assert torch.equal(take(slow, 4), torch.cat([first, rest]))
    del loader  # without close
    gc.collect()
    assert not threads()


def test_a_corpus_smaller_than_a_batch_fills_it_from_later_epochs(prepared: PreparedData) -> None:
    n = len(prepared.tokens("val"))
    with TokenLoader(prepared, "val", batch_size=8, seq_len=n - 2, seed=0) as loader:
        batch = next(loader)
        assert batch.inputs.shape == (8, n - 2)
        assert loader.epoch == 8
    with pytest.raises(UserError, match="longer than the validation split"):
        TokenLoader(prepared, "val", batch_size=8, seq_len=n, seed=0)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("seq_len", [1, T, 100_000])
def test_evaluation_scores_every_token_once(prepared: PreparedData, seq_len: int, world_size: int) -> None:
    tokens = everything(prepared, "val")
    size = 64 if seq_len == 1 else B
    runs = [
        list(
            evaluation_batches(
                prepared.tokens("val"),
                batch_size=size,
                seq_len=seq_len,
                max_batches=10**6,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(run) for run in runs}) == 1
    targets = [b.targets[row] for group in zip(*runs, strict=True) for row in range(size) for b in group]
    inputs = [b.inputs[row] for group in zip(*runs, strict=True) for row in range(size) for b in group]
    flat_targets, flat_inputs = torch.cat(targets), torch.cat(inputs)
    real = flat_targets != IGNORED
    assert flat_targets[real].tolist() == tokens[1:].tolist()
    assert flat_inputs[real].tolist() == tokens[:-1].tolist()
    assert not flat_inputs[~real].any()
    assert all(b.inputs.shape == b.targets.shape == (size, seq_len) for run in runs for b in run)


def test_a_bounded_evaluation_is_the_same_each_time_and_spread_over_the_split(prepared: PreparedData) -> None:
    def run() -> torch.Tensor:
        batches = evaluation_batches(prepared.tokens("val"), batch_size=2, seq_len=16, max_batches=4)
        return torch.stack([torch.stack(b) for b in batches])

    first = run()
    assert torch.equal(first, run())
    assert first.shape == (4, 2, 2, 16)
    tokens = torch.from_numpy(everything(prepared, "val"))
    n_windows = -(-(len(tokens) - 1) // 16)
    windows = [i * n_windows // 8 for i in range(8)]
    assert windows[-1] > 0.8 * n_windows
    expected = torch.stack([tokens[w * 16 : w * 16 + 16] for w in windows])
    assert torch.equal(first[:, 0].flatten(0, 1), expected)


@pytest.mark.gpu
def test_pinned_batches_reach_the_gpu_without_a_sync(prepared: PreparedData) -> None:
    with make(prepared, pin_memory=True) as fast, make(prepared, prefetch=0) as slow:
        torch.cuda.set_sync_debug_mode("error")
        try:
            moved = [next(fast).to("cuda") for _ in range(20)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for batch in moved:
            expected = next(slow)
            assert torch.equal(batch.inputs.cpu(), expected.inputs)
            assert torch.equal(batch.targets.cpu(), expected.targets)
