"""Memory for feature maps, which may go on in a file."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.sizes import in_words

_POSIX = os.name == "posix"
# the same number on Linux, macOS and the BSDs
_MAP_FIXED = 0x10


def is_parted(device: torch.device) -> bool:
    """Whether a block must lie either in memory or outside: it can lie in both where one range of
    addresses holds both, in a process's own memory on POSIX."""
    return device.type != "cpu" or not _POSIX


def paged(size: int) -> int:
    """The bytes of as many whole pages as hold ``size``."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Arena:
    """Bytes that are numbered from 0: the first of them in memory, those after them outside it.

    It is made once for a run and handed from map to map, for what costs time is the first touch of
    a page. A file has no name from the start (``O_TMPFILE``, or unlinked at once), so that it does
    not outlive the process, however that ends; its space is reserved when it is made, and given
    back with the last tensor over it.

    Args:
        memory: bytes on ``device``, whole pages. spilled: bytes outside. folder: for these, None
            for the host's memory.

    Raises:
        SdconvError: no file of that size can be made there.
    """

    def __init__(
        self, memory: int, spilled: int, device: torch.device, folder: Path | None
    ) -> None:
        self._memory = memory
        self._file: mmap.mmap | None = None
        ahead = 0  # bytes of memory that the file's mapping begins with
        if spilled and folder is not None:
            ahead = 0 if is_parted(device) else memory
            self._file = _mapped(ahead, spilled, folder)
        self._before = memory - ahead
        self._blocks: list[Tensor] = []
        if self._before:
            self._blocks.append(_anonymous(memory, device))
        if self._file is not None:
            self._blocks.append(torch.frombuffer(self._file, dtype=torch.uint8))
        elif spilled:
            self._blocks.append(_anonymous(spilled, torch.device("cpu")))

    def block(self, start: int, size: int) -> Tensor:
        """Bytes ``start`` up to ``start + size``, uint8."""
        for block in self._blocks:
            if start < len(block):
                return block[start : start + size]
            start -= len(block)
        raise IndexError(start)

    def rest(self, first: int, last: int) -> None:
        """Those of bytes ``first`` up to ``last`` that are in the file leave the process."""
        if self._file is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = paged(max(first, self._memory)) - self._before
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - self._before - start
        if length > 0:
            self._file.madvise(mmap.MADV_DONTNEED, start, length)


def zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that goes back to the system as a whole when the tensor does: large blocks of many
    sizes, made and freed in turn, leave an allocator's heap full of holes."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _anonymous(math.prod(shape) * dtype.itemsize, device).view(dtype).view(shape)


def trim_heap() -> None:
    """Gives back what glibc's allocator keeps of freed strips, up to 64 MiB; nothing elsewhere."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _anonymous(size: int, device: torch.device) -> Tensor:
    """Bytes of memory, on a CPU zeros in a block of their own."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if _POSIX else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)


def _mapped(memory: int, spilled: int, folder: Path) -> mmap.mmap:
    """A file of ``spilled`` bytes, with so many bytes of memory before it.

    The mapping is of a file with a hole in front, which the memory is laid over: a system refuses
    to promise more memory than it has, but a file it maps at any length.
    """
    size = memory + spilled
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.truncate(file.fileno(), size)
            if hasattr(os, "posix_fallocate"):
                # a hole that cannot be filled later would end the process with a signal
                os.posix_fallocate(file.fileno(), memory, spilled)
            mapped = mmap.mmap(file.fileno(), size)
        if memory:
            _lay_memory(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), memory)
    except OSError as error:
        raise SdconvError(
            "no file for feature maps can be made",
            where=folder,
            expected=f"room for {in_words(spilled)} more",
            got=error.strerror or error,
        ) from error
    return mapped


def _lay_memory(address: int, size: int) -> None:
    """Memory of the process's own in place of what is mapped there."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    )
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    got = library.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
    if got != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
