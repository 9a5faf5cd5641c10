"""Memory for feature maps, which may continue in a file."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.sizes import format_bytes

_POSIX = os.name == "posix"
# the same value on Linux, macOS and the BSDs
_MAP_FIXED = 0x10


def has_separate_spill(device: torch.device) -> bool:
    """Whether memory and spilled bytes are separate address ranges, so that a block must lie in
    one of them. On POSIX, a process's own memory and a file can form a single range."""
    return device.type != "cpu" or not _POSIX


def round_up_to_pages(size: int) -> int:
    """``size`` bytes, rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Arena:
    """A range of bytes from 0 on: the first ``memory`` are in memory, and the rest are spilled.

    An arena is created once per image and reused from one feature map to the next, because the
    first touch of a page costs time. Its file never has a name (``O_TMPFILE``, or unlinked at
    once), so it cannot outlive the process, however that ends. The file's space is reserved on
    creation and freed with the last tensor that uses it.

    Args:
        memory: bytes on ``device``, in whole pages.
        spilled: bytes outside it.
        folder: for the spilled bytes; None for the host's memory.

    Raises:
        SdconvError: no file of that size can be created there.
    """

    def __init__(
        self, memory: int, spilled: int, device: torch.device, folder: Path | None
    ) -> None:
        self._memory = memory
        self._file: mmap.mmap | None = None
        ahead = 0  # bytes of memory at the start of the file's mapping
        if spilled and folder is not None:
            ahead = 0 if has_separate_spill(device) else memory
            self._file = _mapped_file(ahead, spilled, folder)
        self._before = memory - ahead
        self._blocks: list[Tensor] = []
        if self._before:
            self._blocks.append(_anonymous(memory, device))
        if self._file is not None:
            self._blocks.append(torch.frombuffer(self._file, dtype=torch.uint8))
        elif spilled:
            self._blocks.append(_anonymous(spilled, torch.device("cpu")))
            lock_pages(self._blocks[-1], device)

    def block(self, start: int, size: int) -> Tensor:
        """Bytes ``start`` up to ``start + size``, as uint8."""
        for block in self._blocks:
            if start < len(block):
                return block[start : start + size]
            start -= len(block)
        raise IndexError(start)

    def release_pages(self, first: int, last: int) -> None:
        """Drops the file's pages among bytes ``first`` up to ``last`` from the process's memory."""
        if self._file is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = round_up_to_pages(max(first, self._memory)) - self._before
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - self._before - start
        if length > 0:
            self._file.madvise(mmap.MADV_DONTNEED, start, length)


def mmap_zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in a memory mapping of their own, which the system gets back as soon as the tensor is
    freed. Large blocks of many sizes would fragment an allocator's heap."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _anonymous(math.prod(shape) * dtype.itemsize, device).view(dtype).view(shape)


def lock_pages(block: Tensor, device: torch.device) -> None:
    """Locks a block of the host's memory until it is freed, so that a GPU copies it at the full
    rate of the bus; does nothing for a CPU, or where the system forbids it."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = block.data_ptr()
    if int(runtime.cudaHostRegister(address, block.nbytes, 0)) == 0:
        weakref.finalize(block, runtime.cudaHostUnregister, address)
        return
    with suppress(RuntimeError):  # otherwise the next kernel would report the refusal
        torch.zeros(1, device=device)


def trim_heap(device: torch.device) -> None:
    """Returns freed memory that glibc's allocator keeps, up to 64 MiB, to the system, if that is
    the memory of the device; does nothing without glibc."""
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _anonymous(size: int, device: torch.device) -> Tensor:
    """``size`` bytes of memory; on a CPU zeros, in a mapping of their own."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if _POSIX else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)


def _mapped_file(memory: int, spilled: int, folder: Path) -> mmap.mmap:
    """Maps ``memory`` bytes of memory, followed by a file of ``spilled`` bytes, as one range.

    The file begins with a hole of ``memory`` bytes, and memory is mapped over it. One anonymous
    mapping of the whole length would fail: a system does not commit more memory than it has, but
    it maps a file of any length.
    """
    size = memory + spilled
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.truncate(file.fileno(), size)
            if hasattr(os, "posix_fallocate"):
                # if a hole could not be filled later, the process would end with SIGBUS
                os.posix_fallocate(file.fileno(), memory, spilled)
            mapped = mmap.mmap(file.fileno(), size)
        if memory:
            _map_memory_over(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), memory)
    except OSError as error:
        raise SdconvError(
            "cannot create a file for feature maps",
            where=folder,
            expected=f"{format_bytes(spilled)} of free space",
            got=error.strerror or error,
        ) from error
    return mapped


def _map_memory_over(address: int, size: int) -> None:
    """Replaces the mapping at ``address`` with private memory of the process."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    )
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    mapped = library.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if mapped != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
