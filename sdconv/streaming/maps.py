"""Feature maps of full size: what they take, and where they lie while a network runs."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdconv.streaming.arena import Arena, paged


@dataclass(frozen=True, eq=False)
class Map:
    """A map ``(height, width, channels)``; two maps are the same only if they are one object.

    Attributes:
        whole: it is read as a whole at every strip, and stays in memory.
    """

    height: int
    width: int
    channels: int
    dtype: torch.dtype
    whole: bool = False

    @property
    def row_bytes(self) -> int:
        return self.width * self.channels * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.height * self.row_bytes


@dataclass(frozen=True, eq=False)
class Layout:
    """Where maps lie among the bytes of an arena: those that are alive at once beside one another,
    others where earlier ones were.

    Attributes:
        starts: first byte of every map. memory: so many of the bytes are in memory, those after
            them outside it. size: of all. at_once: the memory is taken as a whole, not page by page
            as maps are written.
    """

    starts: Mapping[Map, int]
    memory: int
    size: int
    at_once: bool = False

    @property
    def spilled(self) -> int:
        """Bytes outside memory."""
        return self.size - self.memory

    def taken(self, keys: Iterable[Map]) -> int:
        """Bytes of memory that are taken once these maps have been written."""
        if self.at_once:
            return self.memory
        starts = sorted((self.starts[key], key.bytes) for key in keys if key in self.starts)
        taken = last = 0
        for start, size in starts:
            end = min(start + size, self.memory)
            taken += max(0, end - max(start, last))
            last = max(last, end)
        return taken

    @property
    def keeps_whole(self) -> bool:
        """Whether maps that must be in memory are."""
        ends = (start + key.bytes for key, start in self.starts.items() if key.whole)
        return max(ends, default=0) <= self.memory


def lay_out(spans: Mapping[Map, range], memory: int | None, *, parted: bool) -> Layout:
    """Puts maps as low as they can lie: those that must be in memory first, then large ones first,
    which leaves no gaps.

    Args:
        spans: the steps during which each is alive. memory: bytes in memory, None for as many as
            are needed. parted: no map may lie partly in memory, partly outside.
    """
    starts: dict[Map, int] = {}
    wall = None if memory is None else max(0, memory) // mmap.PAGESIZE * mmap.PAGESIZE
    for key in sorted(spans, key=lambda key: (not key.whole, -key.bytes, spans[key].start)):
        taken = [
            (start, start + other.bytes)
            for other, start in starts.items()
            if _meet(spans[key], spans[other])
        ]
        if parted and wall is not None:
            taken.append((wall, wall))
        starts[key] = _lowest(key.bytes, sorted(taken))
    size = paged(max((start + key.bytes for key, start in starts.items()), default=0))
    return Layout(starts, size if wall is None else min(wall, size), size, at_once=parted)


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _lowest(size: int, taken: list[tuple[int, int]]) -> int:
    """Where so many bytes find room between what is taken, from low to high."""
    start = 0
    for first, end in taken:
        if start + size <= first:
            break
        start = max(start, paged(end))
    return start


class Store:
    """The maps, each where the layout puts it.

    Args:
        layout: of those that no caller brings. device: of the memory that a limit counts.
        folder: for the file of what lies outside it, None for the host's memory.

    Raises:
        SdconvError: no file of that size can be made in the folder.
    """

    def __init__(self, layout: Layout, device: torch.device, folder: Path | None) -> None:
        self._starts = layout.starts
        self._arena = Arena(layout.memory, layout.spilled, device, folder)
        self._tensors: dict[Map, Tensor] = {}

    def put(self, key: Map, tensor: Tensor) -> None:
        """A tensor of the caller's, ``(H, W, C)``, as a map."""
        self._tensors[key] = tensor

    def tensor(self, key: Map) -> Tensor:
        """The map, ``(H, W, C)``, one object at every call; any values before it is written."""
        if key not in self._tensors:
            block = self._arena.block(self._starts[key], key.bytes)
            shape = (key.height, key.width, key.channels)
            self._tensors[key] = block.view(key.dtype).view(shape)
        return self._tensors[key]

    def rest(self, key: Map, first: int, last: int) -> None:
        """Rows that will not be used for a while: a file's pages leave the process (not the
        system's cache, which writes them to disk in its own time)."""
        if key in self._starts:
            start, row = self._starts[key], key.row_bytes
            self._arena.rest(start + max(first, 0) * row, start + min(last, key.height) * row)
