"""PyTorch's CUDA caching allocator in miniature (c10/cuda/CUDACachingAllocator.cpp, default settings).

Requests are rounded up to 512 bytes. Those up to 1 MiB are cut from segments of 2 MiB, those under 10 MiB from
segments of 20 MiB, larger ones get segments of their own in steps of 2 MiB. The smallest free block that fits is taken,
and split unless what would be left is at most 1 MiB (in the small pool: under 512 bytes); neighbours that are free are
merged. What `torch.cuda.memory_allocated` counts is blocks, rests that were not split off included, so a step of a
small model takes several percent more than its tensors' bytes. Segments are what `memory_reserved` counts; only
`empty_cache` gives them back here (the real one also does so before it fails for want of memory).

A CUDA graph's private pool is another `pool` of the same allocator. With `expandable_segments:True` in
`PYTORCH_CUDA_ALLOC_CONF` a pool is one segment that grows at its end (20 MiB at a time; small blocks 2), and every rest
is split off.
"""

from __future__ import annotations

from bisect import bisect_left, insort

_MIB = 2**20
_UNIT = 512
_SMALL = _MIB


class Block:
    """A piece of a segment; `free` pieces may be handed out again."""

    __slots__ = ("after", "at", "before", "free", "home", "size")

    def __init__(self, home: list[tuple[int, int, Block]], at: int, size: int) -> None:
        self.home, self.at, self.size = home, at, size
        self.before: Block | None = None
        self.after: Block | None = None
        self.free = False


class CachingAllocator:
    """Counts what a sequence of `take` and `give` would allocate and reserve, bytes."""

    def __init__(self, expandable: bool = False) -> None:
        self._expandable = expandable
        self._tails: dict[int, Block] = {}  # of growing segments, by the identity of their free list
        self.allocated = 0
        """Bytes of blocks, now."""
        self._held = 0
        self.reserved = 0
        """Bytes of segments, at most."""
        self._free: dict[tuple[str, bool], list[tuple[int, int, Block]]] = {}
        self._end = 0  # addresses ascend; only their order matters

    def take(self, size: int, pool: str = "") -> Block:
        """A block for `size` bytes."""
        size = max(_UNIT, -(-size // _UNIT) * _UNIT)
        small = size <= _SMALL
        home = self._free.setdefault((pool, small), [])
        i = bisect_left(home, (size, -1))
        block = home.pop(i)[2] if i < len(home) else self._segment(home, size)
        rest = block.size - size
        if rest >= _UNIT if small or self._expandable else rest > _SMALL:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        return block

    def give(self, block: Block) -> None:
        """Free a block.

        Raises:
            ValueError: it is free already; the sequence is wrong.
        """
        if block.free:
            raise ValueError("a block was freed twice")
        self.allocated -= block.size
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                del block.home[bisect_left(block.home, (neighbour.size, neighbour.at))]
                self._join(block, neighbour)
        self._keep(block)

    def empty_cache(self) -> None:
        """Give back segments of which nothing is in use; of growing ones every free piece, never to be used again."""
        for home in self._free.values():
            gone = [x for x in home if self._expandable or (x[2].before is None and x[2].after is None)]
            for entry in gone:
                home.remove(entry)
                entry[2].free = False
                self._held -= entry[0]

    def _segment(self, home: list[tuple[int, int, Block]], size: int) -> Block:
        if self._expandable:
            return self._grown(home, size)
        if size <= _SMALL:
            length = 2 * _MIB
        elif size < 10 * _MIB:
            length = 20 * _MIB
        else:
            length = -(-size // (2 * _MIB)) * 2 * _MIB
        self._held += length
        self.reserved = max(self.reserved, self._held)
        block = Block(home, self._end, length)
        self._end += length
        return block

    def _grown(self, home: list[tuple[int, int, Block]], size: int) -> Block:
        """The end of a pool's segment, made long enough."""
        tail = self._tails.get(id(home))
        if tail is not None and tail.free:
            del home[bisect_left(home, (tail.size, tail.at))]
        else:
            block = Block(home, 0 if tail is None else tail.at + tail.size, 0)
            block.before = tail
            if tail is not None:
                tail.after = block
            tail = self._tails[id(home)] = block
        step = 2 * _MIB if size <= _SMALL else 20 * _MIB
        length = -(-(size - tail.size) // step) * step
        tail.size += length
        self._held += length
        self.reserved = max(self.reserved, self._held)
        return tail

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.home, block.at + size, block.size - size)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        elif self._expandable:
            self._tails[id(block.home)] = rest
        block.after, block.size = rest, size
        self._keep(rest)

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(block.home, (block.size, block.at, block))

    def _join(self, block: Block, neighbour: Block) -> None:
        block.size += neighbour.size
        if neighbour is block.before:
            block.at, block.before = neighbour.at, neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block
            elif self._expandable:
                self._tails[id(block.home)] = block
