from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eco_llm.data.order import Position, WindowOrder, require_length
from eco_llm.errors import UserError

SIZES = st.tuples(st.integers(2, 400), st.integers(1, 63)).filter(lambda s: s[0] > s[1])


@given(SIZES, st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_an_epoch_visits_every_window_of_its_grid_once(size: tuple[int, int], seed: int, epoch: int) -> None:
    n, t = size
    starts = WindowOrder(n, t, seed).starts(epoch)
    offset = starts.min()
    assert 0 <= offset < t
    assert sorted(starts) == list(range(offset, n - t, t))
    assert starts.max() + t + 1 <= n  # the last target exists
    assert n - (starts.max() + t + 1) < t  # and no further window would fit


@given(SIZES, st.integers(0, 1000), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_taking_in_any_portions_gives_the_concatenated_epochs(
    size: tuple[int, int], seed: int, counts: list[int]
) -> None:
    order, position, taken = WindowOrder(*size, seed), Position(), []
    for count in counts:
        # A fresh order each time: nothing but (seed, position) matters.
        starts, position = WindowOrder(*size, seed).take(position, count)
        assert len(starts) == count
        taken.append(starts)
    joined = np.concatenate(taken)
    expected = np.concatenate([order.starts(e) for e in range(position.epoch + 1)])
    assert joined.tolist() == expected[: len(joined)].tolist()
    assert position.window < len(order.starts(position.epoch))


def test_epochs_and_seeds_differ() -> None:
    a = WindowOrder(10_000, 63, 1)
    first = a.starts(0).copy()
    assert first.tolist() != sorted(first)
    assert first.tolist() != a.starts(1).tolist()
    assert first.tolist() != WindowOrder(10_000, 63, 2).starts(0).tolist()
    assert len({int(a.starts(e).min()) for e in range(20)}) > 5  # the grid moves


def test_the_order_is_fixed_for_ever() -> None:
    """Resuming an old run on a newer NumPy must read the same windows."""
    assert WindowOrder(100, 10, 7).starts(3).tolist() == [14, 44, 84, 64, 24, 54, 74, 34, 4]


def test_a_split_that_is_too_short_is_a_clear_error() -> None:
    require_length(513, 512, "train")
    with pytest.raises(UserError, match=r"--seq-len 512 is longer than the training split \(123 tokens"):
        require_length(123, 512, "train")
    with pytest.raises(UserError, match=r"validation split \(512 tokens, and a window needs 513\)"):
        WindowOrder(512, 512, 0, "val")
