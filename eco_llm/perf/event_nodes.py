"""The event-record nodes of a captured CUDA graph, and how each replay is given events of its own.

A graph records the same events at every launch, and overwrites the times that the launch before left in them. The
driver can exchange a node's event between launches; those already queued keep theirs (CUDA driver API,
cuGraphExecEventRecordNodeSetEvent). PyTorch has no binding for it, so it is called through ctypes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

_EVENT_RECORD = 7  # CU_GRAPH_NODE_TYPE_EVENT_RECORD


class EventNodes:
    """The nodes that record given events, in the events' order.

    Args:
        graph: address of the captured graph (CUgraph), which must outlive this object.
        executable: address of the graph instantiated from it (CUgraphExec).
        events: addresses of the events (CUevent) that were recorded under capture, each once.
        driver: the CUDA driver library; tests give another.

    Raises:
        RuntimeError: the driver refuses, or an event has no node.
    """

    def __init__(self, graph: int, executable: int, events: Sequence[int], *, driver: Any = None) -> None:
        self._driver = driver or _load_driver()
        self._executable = ctypes.c_void_p(executable)
        found = {event: node for node in self._nodes(graph) if (event := self._event_of(node)) is not None}
        if missing := [event for event in events if event not in found]:
            raise RuntimeError(f"{len(missing)} of {len(events)} events have no node in the captured graph")
        self._nodes_in_order = [ctypes.c_void_p(found[event]) for event in events]

    def bind(self, events: Sequence[int]) -> None:
        """Let launches from now on record `events` instead; about a microsecond each. Never waits."""
        for node, event in zip(self._nodes_in_order, events, strict=True):
            self._call("cuGraphExecEventRecordNodeSetEvent", self._executable, node, ctypes.c_void_p(event))

    def _nodes(self, graph: int) -> list[int]:
        handle, count = ctypes.c_void_p(graph), ctypes.c_size_t(0)
        self._call("cuGraphGetNodes", handle, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        self._call("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
        return [node for node in nodes if node is not None]

    def _event_of(self, node: int) -> int | None:
        """The event that a node records; None for a node of another kind."""
        kind, event = ctypes.c_int(-1), ctypes.c_void_p()
        self._call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        if kind.value != _EVENT_RECORD:
            return None
        self._call("cuGraphEventRecordNodeGetEvent", ctypes.c_void_p(node), ctypes.byref(event))
        return event.value

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._driver, name)(*args)
        if status != 0:
            raise RuntimeError(f"{name} failed with CUDA error {status}")


def _load_driver() -> Any:
    """The driver's library, which the process has loaded already: PyTorch computes through it."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
