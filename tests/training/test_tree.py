"""State dictionaries to tensors + JSON and back, exactly."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eco_llm.training.tree import join_tensors, split_tensors


def through_json(tree: Any) -> Any:
    """`tree` after the round trip, by way of strict JSON text."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(split_tensors(tree, tensors), allow_nan=False)
    return join_tensors(json.loads(text), tensors)


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, tensors and floats to the bit."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return all(map(same, a, b)) and len(a) == len(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


def test_an_optimizer_state() -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2)}, 7: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "foreach": None, "amsgrad": False, "params": [0, 7]}],
    }
    assert same(through_json(state), state)


@pytest.mark.parametrize(
    "value",
    [
        0.1, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1e22,
        2**127 + 1, -(2**63), True, None, "", "é\u2028\0", "nan", [], (), {}, [()], {"": {"": {}}},
        {"tensor": "x"}, {"float": "nan"}, {"dict": [["a", 1]]}, {0: 1, "0": 2}, {None: 1, True: 2}, ((1,), [2, (3,)]),
    ],
)  # fmt: skip
def test_plain_values_are_exact(value: Any) -> None:
    assert same(through_json(value), value)
    assert same(through_json({"a": [value]}), {"a": [value]})


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TREES = st.recursive(
    PLAIN | st.integers(0, 9).map(lambda i: torch.full((2,), float(i))),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(
            st.sampled_from(["", "a", "b", "a.b", "a#2", "0", "."]) | st.integers(0, 2), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES)
def test_any_tree_comes_back(tree: Any) -> None:
    assert same(through_json(tree), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2)},
        {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
        {0: torch.tensor(1), "0": torch.tensor(2)},
        {"a": [torch.tensor(1)], "a.0": torch.tensor(2)},
        {"": {"a": torch.tensor(1)}, "a": torch.tensor(2)},
        {"": torch.tensor(1), "tensor": torch.tensor(2)},
        {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "a.b#2": torch.tensor(3)},
        {"a.b#2": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a.b": torch.tensor(3)},
    ],
)
def test_paths_that_are_spelt_alike_stay_apart(tree: Any) -> None:
    assert same(through_json(tree), tree)


def test_names_are_the_paths() -> None:
    tensors: dict[str, Tensor] = {}
    split_tensors({"state": {0: {"m": torch.zeros(1)}}, "list": [torch.zeros(2)]}, tensors, "optimizer")
    assert list(tensors) == ["optimizer.state.0.m", "optimizer.list.0"]


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_types_and_shapes(dtype: torch.dtype) -> None:
    base = (torch.arange(24) % 2).to(dtype).reshape(4, 6)
    for t in (base, base[1, 2], base[:0], base[:, :0], base.t(), base[1:3, ::2], base[:1].expand(3, 6)):
        assert same(through_json({"t": t}), {"t": t})


def test_odd_bit_patterns() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -1, 1, -(2**31)], dtype=torch.int32)  # NaN with payload, ∞, denormal
    assert same(through_json(bits.view(torch.float32)), bits.view(torch.float32))
    assert same(through_json(torch.tensor([1 + 2j]).conj()), torch.tensor([1 - 2j]))


def test_copies_share_nothing() -> None:
    base = torch.arange(6.0)
    tree = {"a": base, "b": base, "tail": base[4:], "parameter": torch.nn.Parameter(base)}
    tensors: dict[str, Tensor] = {}
    skeleton = split_tensors(tree, tensors)
    pointers = {t.untyped_storage().data_ptr() for t in [base, *tensors.values()]}
    assert len(pointers) == 5
    assert tensors["tail"].untyped_storage().nbytes() == 8  # a view does not drag its base along
    assert not any(t.requires_grad for t in tensors.values())
    base.zero_()  # training moves on under the writer
    again = join_tensors(skeleton, tensors)
    assert torch.equal(again["b"], torch.arange(6.0))
    assert torch.equal(again["tail"], torch.tensor([4.0, 5.0]))


def test_an_ordered_dictionary_is_a_dictionary_in_order() -> None:
    assert list(through_json(OrderedDict(z=1, a=2)).items()) == [("z", 1), ("a", 2)]


@pytest.mark.parametrize(
    "value", [b"bytes", {1, 2}, object(), torch.float32, complex(1), torch.device("cpu"), range(3)]
)
def test_what_needs_pickle_is_refused_by_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"'a\.0\.b'.*" + type(value).__name__):
        split_tensors({"a": [{"b": value}]}, {})


@pytest.mark.parametrize("key", [(1, 2), b"k", 0.5, torch.float32])
def test_keys_that_json_would_change_are_refused(key: Any) -> None:
    with pytest.raises(TypeError, match="'a' has the key"):
        split_tensors({"a": {key: 1}}, {})


@pytest.mark.gpu
def test_device_tensors_come_back_on_the_host() -> None:
    t = torch.randn(5, 7, device="cuda", dtype=torch.bfloat16)
    again = through_json({"t": t.t()})["t"]
    assert again.device.type == "cpu"
    assert same(again, t.t().cpu())
