"""EventNodes against a driver made of dictionaries, and against the real one where there is a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from eco_llm.perf.event_nodes import EventNodes
from eco_llm.perf.phases import CudaMark

GRAPH, EXECUTABLE = 0x1000, 0x2000


class Driver:
    """Nodes 1, 2, …: an event's address, or None for a node of another kind."""

    def __init__(self, *events: int | None, refuse: str = "") -> None:
        self.recorded: dict[int, int | None] = dict(enumerate(events, start=1))
        self.refuse = refuse

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name == self.refuse:
            return lambda *args: 999
        return object.__getattribute__(self, name)

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:
        assert graph.value == GRAPH
        if nodes is not None:
            for i, node in enumerate(self.recorded):
                nodes[i] = node
        count._obj.value = len(self.recorded)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = 0 if self.recorded[node.value] is None else 7
        return 0

    def cuGraphEventRecordNodeGetEvent(self, node: Any, event: Any) -> int:
        event._obj.value = self.recorded[node.value]
        return 0

    def cuGraphExecEventRecordNodeSetEvent(self, executable: Any, node: Any, event: Any) -> int:
        assert executable.value == EXECUTABLE
        assert isinstance(event, ctypes.c_void_p)
        self.recorded[node.value] = event.value
        return 0


def test_events_are_exchanged_in_the_order_given() -> None:
    driver = Driver(None, 0xB, None, 0xA, 0xC)
    nodes = EventNodes(GRAPH, EXECUTABLE, [0xA, 0xB, 0xC], driver=driver)
    nodes.bind([0x1A, 0x1B, 0x1C])
    assert driver.recorded == {1: None, 2: 0x1B, 3: None, 4: 0x1A, 5: 0x1C}
    nodes.bind([0x2A, 0x2B, 0x2C])
    assert driver.recorded == {1: None, 2: 0x2B, 3: None, 4: 0x2A, 5: 0x2C}
    with pytest.raises(ValueError):
        nodes.bind([0x3A])


def test_a_lost_event_and_a_refusal_are_errors() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 events have no node"):
        EventNodes(GRAPH, EXECUTABLE, [0xA, 0xB], driver=Driver(None, 0xA))
    with pytest.raises(RuntimeError, match="cuGraphGetNodes failed with CUDA error 999"):
        EventNodes(GRAPH, EXECUTABLE, [0xA], driver=Driver(0xA, refuse="cuGraphGetNodes"))


@pytest.mark.gpu
def test_every_replay_has_times_of_its_own() -> None:
    """Ten replays queued behind one another, each with events of its own: none overwrites another's."""
    device = torch.device("cuda", torch.cuda.current_device())
    cycles = 4_000_000  # about 2 ms
    torch.cuda._sleep(cycles)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    inside = [CudaMark(device, in_graph=True) for _ in range(2)]
    with torch.cuda.graph(graph):
        torch.cuda._sleep(cycles)
        inside[0].record()
        torch.cuda._sleep(2 * cycles)
        inside[1].record()
        torch.cuda._sleep(cycles)
    graph.instantiate()
    nodes = EventNodes(graph.raw_cuda_graph(), graph.raw_cuda_graph_exec(), [mark.handle for mark in inside])
    steps = []
    for _ in range(10):
        marks = [CudaMark(device) for _ in range(4)]
        nodes.bind([marks[1].handle, marks[2].handle])
        marks[0].record()
        graph.replay()
        marks[3].record()
        steps.append(marks)
    torch.cuda.synchronize()
    for before, (a, b, c, d) in zip([None, *steps], steps, strict=False):
        first, second, third = b.seconds_since(a), c.seconds_since(b), d.seconds_since(c)
        assert first > 0
        assert second == pytest.approx(2 * third, rel=0.2)
        if before is not None:
            assert a.seconds_since(before[3]) >= 0
            assert b.seconds_since(before[2]) > second / 2  # not the same event
