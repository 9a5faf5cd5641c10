"""A pool for the memory of feature maps on a CPU, and scratch memory for each thread.

An operating system clears every page before a process first touches it, and C libraries return
large blocks at once, so that a network pays for fresh pages at every feature map. Within `use_pool`
the memory of a freed feature map is reused for the next one. If no free block is large enough, the
largest one grows, and the others are returned to the system.

At the end, blocks are offered to the system (``MADV_FREE``): it takes their pages when it needs
memory, and until then the next pool finds them as they are. Tools count them as the process's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# smaller blocks are left to the allocator, which reuses them
_LARGE = 8 << 20
# bytes of a page, and how much farther than whole pages the planes of `Scratch.planes` are apart
_PAGE, _SPREAD = 4096, 256


class _Offered:
    """Blocks that no pool uses, which the system may empty."""

    def __init__(self) -> None:
        self._blocks: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self) -> list[mmap.mmap]:
        """All of them, which are the caller's from then on."""
        with self._lock:
            blocks, self._blocks = self._blocks, []
        return blocks

    def add(self, blocks: list[mmap.mmap], idle: Sequence[mmap.mmap] = ()) -> None:
        """Offers the largest blocks that stay within the limit, and returns the others; those that
        are ``idle`` have been offered already."""
        with self._lock:
            known, kept = {id(block) for block in (*self._blocks, *idle)}, list[mmap.mmap]()
            for block in sorted((*self._blocks, *idle, *blocks), key=len, reverse=True):
                fits = sum(map(len, kept)) + len(block) <= _limit()
                if fits and (id(block) in known or _offered(block)):
                    kept.append(block)
            self._blocks = kept


def _limit() -> int:
    """The most bytes to offer: an eighth of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def _offered(block: mmap.mmap, start: int = 0) -> bool:
    """Offers a block's pages to the system, from ``start`` bytes on; False if this one does not
    know how."""
    try:
        block.madvise(mmap.MADV_FREE, start)
    except (AttributeError, OSError):
        return False
    return True


_offer = _Offered()
if hasattr(os, "register_at_fork"):
    # the lock may be held by a thread that the child does not have
    os.register_at_fork(after_in_child=_offer.__init__)  # type: ignore[misc]


class _Pool:
    """Blocks of memory that feature maps use one after the other."""

    def __init__(self) -> None:
        self._free = _offer.take()
        # those that no feature map has used since they were offered
        self._idle = {id(block) for block in self._free}
        self._used: dict[int, tuple[mmap.mmap, int]] = {}
        self._open = True

    def allocate(self, size: int) -> Tensor:
        """Uninitialised bytes, which return to the pool with the last tensor that views them."""
        block = self._fitting(size)
        self._used[id(block)] = (block, size)
        buffer = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(buffer, self._recycle, block).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def close(self) -> None:
        """Offers the free blocks to the system, and of those in use what their feature maps do not
        use; these are returned as soon as they are free."""
        self._open = False
        for block, size in list(self._used.values()):
            if size < len(block):
                _offered(block, -(-size // _PAGE) * _PAGE)
        idle = [block for block in self._free if id(block) in self._idle]
        _offer.add([block for block in self._free if id(block) not in self._idle], idle)
        self._free = []

    def _fitting(self, size: int) -> mmap.mmap:
        if not self._free:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        fitting = [block for block in self._free if len(block) >= size]
        block = min(fitting, key=len) if fitting else max(self._free, key=len)
        self._free.remove(block)
        if not fitting:
            self._free.clear()  # before more is allocated
            self._idle.clear()
            block.resize(size)
        self._idle.discard(id(block))
        return block

    def _recycle(self, block: mmap.mmap) -> None:
        del self._used[id(block)]
        if self._open:
            self._free.append(block)


class _Thread(threading.local):
    pool: _Pool | None = None


_thread = _Thread()


@contextmanager
def use_pool() -> Iterator[None]:
    """Makes this thread's `empty_nhwc` tensors come from a pool.

    Only Linux can resize a block; elsewhere this does nothing.
    """
    if _thread.pool is not None or sys.platform != "linux":
        yield
        return
    _thread.pool = pool = _Pool()
    try:
        yield
    finally:
        _thread.pool = None
        pool.close()


def empty_nhwc(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised feature map on the CPU, ``(B, C, H, W)`` in channels-last order."""
    shape = (batch, height, width, channels)
    size = math.prod(shape) * dtype.itemsize
    if _thread.pool is None or size <= _LARGE:
        out = torch.empty(shape, dtype=dtype, device="cpu")
    else:
        out = _thread.pool.allocate(size).view(dtype).view(shape)
    return out.permute(0, 3, 1, 2)


class Scratch(threading.local):
    """Working memory that each thread keeps from call to call, one buffer per name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        # the last view of each buffer
        self._views: dict[str, tuple[tuple[int, ...], torch.dtype, Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, which overlaps any earlier one of that name."""
        last = self._views.get(name)
        if last is not None and last[0] == shape and last[1] is dtype:
            return last[2]
        size = dtype.itemsize * math.prod(shape)
        with torch.inference_mode(False):  # so that calls outside of it can write into the view
            view = self.block(name, size)[:size].view(dtype).view(shape)
        self._views[name] = (shape, dtype, view)
        return view

    def planes(self, name: str, count: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`take` of ``(count, *shape)`` with gaps between the planes, so that a core's first cache
        holds the same few rows of all planes: of addresses that are whole pages apart, it holds
        only a few."""
        size = math.prod(shape)
        step = size + (_SPREAD - size * dtype.itemsize) % _PAGE // dtype.itemsize
        planes = self.take(name, (count, step), dtype)
        return planes.as_strided((count, *shape), (step, shape[1], 1))

    def block(self, name: str, size: int) -> Tensor:
        """At least ``size`` bytes, which overlap any earlier ones of that name."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return buffer

    def release(self) -> None:
        """Frees this thread's buffers."""
        self._buffers.clear()
        self._views.clear()


scratch = Scratch()


def release_memory() -> None:
    """Returns what is kept between calls to the system: this thread's scratch memory, and the
    blocks of the pools."""
    scratch.release()
    _offer.take()


def dense_rows(x: Tensor) -> Tensor | None:
    """One feature map ``(C, H, W)`` as rows ``(H, W, C)`` without a copy; None if its memory layout
    requires one."""
    rows = x.permute(1, 2, 0)
    return rows if rows.is_contiguous() else None


def rows_of(x: Tensor, first: int, end: int, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Rows ``first`` up to ``end`` of ``(C, H, W)`` as ``(rows, W, C)``, in ``dtype`` if it is
    given: a view where possible, else a copy in the scratch buffer ``name``."""
    part = x[:, first:end]
    rows = dense_rows(part)
    dtype = x.dtype if dtype is None else dtype
    return copied_rows(part, dtype, name) if rows is None or x.dtype is not dtype else rows


def copied_rows(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``(C, H, W)`` as rows ``(H, W, C)`` in the scratch buffer ``name``."""
    rows = x.permute(1, 2, 0)
    return scratch.take(name, tuple(rows.shape), dtype).copy_(rows)


def copied_borders(rows: Tensor, starts: Sequence[int]) -> Tensor:
    """Two rows for each part of ``(rows, W, C)`` but the first: the row before it and its first
    row, ``(2 parts, W, C)``, in scratch memory."""
    out = scratch.take("borders", (2 * len(starts), *rows.shape[1:]), rows.dtype)
    for i, start in enumerate(starts):
        out[2 * i : 2 * i + 2].copy_(rows[start - 1 : start + 1])
    return out
