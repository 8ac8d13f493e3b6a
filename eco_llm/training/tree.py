"""State dictionaries as safetensors + JSON: tensors on one side, everything else on the other, no pickle."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def split_tensors(tree: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """Return a JSON-able copy of `tree`; its tensors go into `tensors` (on CPU, none sharing memory).

    Dictionaries keep their key types (optimizer states use integers), tuples stay tuples, floats survive exactly
    (JSON writes the shortest decimal that reads back to the same float64; NaN and infinities, which JSON lacks, are
    named). A tensor is called by its path, keys joined by dots.

    Raises:
        TypeError: something is neither plain data nor a tensor; saving it would need pickle.
    """
    if isinstance(tree, Tensor):
        path = name = prefix or "tensor"
        same = 1
        while name in tensors:  # {"a": {"b": t}, "a.b": u}: two paths, one spelling
            same += 1
            name = f"{path}#{same}"
        # A copy even on CPU: safetensors refuses views, and training must not move under the writer.
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        for k in tree:
            if not (k is None or isinstance(k, (bool, int, str))):
                raise TypeError(f"state entry {prefix!r} has the key {k!r}; keys are strings and integers")
        items = [[k, split_tensors(v, tensors, f"{prefix}.{k}" if prefix else str(k))] for k, v in tree.items()]
        return {"dict": items}
    if isinstance(tree, (list, tuple)):
        values = [split_tensors(v, tensors, f"{prefix}.{i}" if prefix else str(i)) for i, v in enumerate(tree)]
        return {"list" if isinstance(tree, list) else "tuple": values}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(float(tree))}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"state entry {prefix!r} is a {type(tree).__name__}; only plain data and tensors are saved")


def join_tensors(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `split_tensors`."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {k: join_tensors(v, tensors) for k, v in value}
    values = [join_tensors(v, tensors) for v in value]
    return values if kind == "list" else tuple(values)
