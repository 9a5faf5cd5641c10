"""Buffers for full-size feature maps: their sizes, and their addresses during a run."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdconv.streaming.arena import Arena, round_up_to_pages


@dataclass(frozen=True, eq=False)
class FeatureBuffer:
    """A buffer for one feature map, ``(height, width, channels)``; two are equal only if they are
    the same object.

    Attributes:
        resident: every strip reads all of it, so it must stay in memory.
        first_row: number of the first row in the whole feature map, if the buffer holds a part.
    """

    height: int
    width: int
    channels: int
    dtype: torch.dtype
    resident: bool = False
    first_row: int = 0

    @property
    def row_bytes(self) -> int:
        return self.width * self.channels * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.height * self.row_bytes


@dataclass(frozen=True, eq=False)
class MemoryLayout:
    """The addresses of buffers in an arena. Buffers that are alive at the same time do not overlap;
    others share memory.

    Attributes:
        starts: first byte of each buffer.
        memory: how many of the bytes are in memory; the rest are spilled.
        size: bytes in all.
        allocated_up_front: memory is taken as a whole, not page by page as buffers are written.
    """

    starts: Mapping[FeatureBuffer, int]
    memory: int
    size: int
    allocated_up_front: bool = False

    @property
    def spilled(self) -> int:
        """Bytes outside memory."""
        return self.size - self.memory

    def memory_in_use(self, written: Iterable[FeatureBuffer]) -> int:
        """Bytes of memory that are taken once these buffers have been written."""
        if self.allocated_up_front:
            return self.memory
        starts = sorted(
            (self.starts[buffer], buffer.bytes) for buffer in written if buffer in self.starts
        )
        used = last = 0
        for start, size in starts:
            end = min(start + size, self.memory)
            used += max(0, end - max(start, last))
            last = max(last, end)
        return used

    @property
    def keeps_resident(self) -> bool:
        """Whether all resident buffers are in memory."""
        ends = (start + buffer.bytes for buffer, start in self.starts.items() if buffer.resident)
        return max(ends, default=0) <= self.memory


def lay_out(
    lifetimes: Mapping[FeatureBuffer, range], memory: int | None, *, separate_spill: bool
) -> MemoryLayout:
    """Places each buffer at the lowest address that is free: resident ones first, then by size from
    the largest, which leaves hardly any gaps.

    Args:
        lifetimes: the steps during which each buffer is alive.
        memory: bytes in memory; None for as many as are needed.
        separate_spill: no buffer may lie partly in memory and partly outside.
    """
    starts: dict[FeatureBuffer, int] = {}
    limit = None if memory is None else max(0, memory) // mmap.PAGESIZE * mmap.PAGESIZE
    order = sorted(
        lifetimes,
        key=lambda buffer: (not buffer.resident, -buffer.bytes, lifetimes[buffer].start),
    )
    for buffer in order:
        taken = [
            (start, start + other.bytes)
            for other, start in starts.items()
            if _overlap(lifetimes[buffer], lifetimes[other])
        ]
        if separate_spill and limit is not None:
            taken.append((limit, limit))
        starts[buffer] = _lowest_gap(buffer.bytes, sorted(taken))
    size = round_up_to_pages(
        max((start + buffer.bytes for buffer, start in starts.items()), default=0)
    )
    in_memory = size if limit is None else min(limit, size)
    return MemoryLayout(starts, in_memory, size, allocated_up_front=separate_spill)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _lowest_gap(size: int, taken: list[tuple[int, int]]) -> int:
    """The lowest start of ``size`` free bytes; ``taken`` is sorted."""
    start = 0
    for first, end in taken:
        if start + size <= first:
            break
        start = max(start, round_up_to_pages(end))
    return start


class AllocatedBuffers:
    """The tensors of a run's buffers, each where the layout puts it.

    Args:
        layout: of the buffers that the caller does not provide.
        device: whose memory the limit counts.
        folder: for the file that holds the spilled bytes; None for the host's memory.

    Raises:
        SdconvError: no file of that size can be created in the folder.
    """

    def __init__(self, layout: MemoryLayout, device: torch.device, folder: Path | None) -> None:
        self._starts = layout.starts
        self._arena = Arena(layout.memory, layout.spilled, device, folder)
        self._tensors: dict[FeatureBuffer, Tensor] = {}

    def put(self, buffer: FeatureBuffer, tensor: Tensor) -> None:
        """Uses a tensor of the caller's, ``(H, W, C)``, as a buffer."""
        self._tensors[buffer] = tensor

    def tensor(self, buffer: FeatureBuffer) -> Tensor:
        """The buffer's tensor, ``(H, W, C)``, the same object at every call; uninitialised before
        it is written."""
        if buffer not in self._tensors:
            block = self._arena.block(self._starts[buffer], buffer.bytes)
            shape = (buffer.height, buffer.width, buffer.channels)
            self._tensors[buffer] = block.view(buffer.dtype).view(shape)
        return self._tensors[buffer]

    def release_rows(self, buffer: FeatureBuffer, first: int, last: int) -> None:
        """Drops the file's pages of rows ``first`` up to ``last`` from the process's memory.

        They stay in the system's cache, which writes them to disk later."""
        if buffer in self._starts:
            start, row = self._starts[buffer], buffer.row_bytes
            self._arena.release_pages(
                start + max(first, 0) * row, start + min(last, buffer.height) * row
            )
