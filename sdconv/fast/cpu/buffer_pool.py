"""Memory of large maps, handed from one map of a pass to the next.

A system clears every page before a process first touches it, and C libraries give large blocks back
at once, so that a pass pays for fresh pages at every map. Within `handed_on`, maps that are gone
leave their memory to the next ones; what none takes goes back, at the end all of it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# an allocator reuses smaller blocks itself
_LARGE = 8 << 20


class _Blocks:
    """Blocks of memory that no map lies in."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._open = True

    def take(self, size: int) -> Tensor:
        """Bytes with anything in them, which come back here when the last tensor over them goes."""
        block = self._fitting(size)
        buffer = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(buffer, self._give_back, block).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def close(self) -> None:
        """Gives all of it back, and later what maps still lie in."""
        self._open = False
        self._free.clear()

    def _fitting(self, size: int) -> mmap.mmap:
        fitting = [block for block in self._free if len(block) >= size]
        if not fitting:
            self._free.clear()  # before more is taken
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = min(fitting, key=len)
        self._free.remove(block)
        if len(block) > size:
            block.resize(size)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        if self._open:
            self._free.append(block)


class _Thread(threading.local):
    blocks: _Blocks | None = None


_thread = _Thread()


@contextmanager
def handed_on() -> Iterator[None]:
    """Within it, this thread's `blank` maps hand their memory on. Only Linux can cut a block that
    is too large; elsewhere nothing changes."""
    outer = _thread.blocks
    if outer is not None or sys.platform != "linux":
        yield
        return
    _thread.blocks = blocks = _Blocks()
    try:
        yield
    finally:
        _thread.blocks = None
        blocks.close()


def blank(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """A map on the CPU with anything in it, ``(B, C, H, W)`` in channels-last order."""
    shape = (batch, height, width, channels)
    size = math.prod(shape) * dtype.itemsize
    if _thread.blocks is None or size <= _LARGE:
        made = torch.empty(shape, dtype=dtype)
    else:
        made = _thread.blocks.take(size).view(dtype).view(shape)
    return made.permute(0, 3, 1, 2)
