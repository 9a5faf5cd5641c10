"""Feature maps of full size: what they take, and where they are kept while a network runs."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from sdconv.errors import InputError, SdconvError, SdconvWarning
from sdconv.streaming.sizes import in_words


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
    def bytes(self) -> int:
        return self.height * self.width * self.channels * self.dtype.itemsize


class Place(Enum):
    """Where a map is: within the memory that the limit counts, or outside it."""

    MEMORY = "memory"
    # a memory-mapped file; on CUDA, where no folder is given, the host's memory
    SPILL = "spill"
    # the caller's picture or latents, and the result
    CALLER = "caller"


class Store:
    """The maps that are alive, each where the plan puts it.

    Files are unnamed from the start (``O_TMPFILE``, or unlinked at once), so that none outlives the
    process, however it ends; their space is reserved when they are made, and given back with the
    last tensor over them.

    Args:
        places: of every map. device: of the memory that the limit counts. folder: for files.
    """

    def __init__(
        self, places: Mapping[Map, Place], device: torch.device, folder: Path | None
    ) -> None:
        self._places, self._device, self._folder = places, device, folder
        self._tensors: dict[Map, Tensor] = {}
        self._files: dict[Map, mmap.mmap] = {}

    def put(self, key: Map, tensor: Tensor) -> None:
        """A tensor of the caller's, ``(H, W, C)``, as a map."""
        self._tensors[key] = tensor

    def tensor(self, key: Map) -> Tensor:
        """The map, ``(H, W, C)``; made, with any values, when it is first asked for."""
        if key not in self._tensors:
            self._tensors[key] = self._made(key)
        return self._tensors[key]

    def drop(self, key: Map) -> None:
        """Gives the map's memory or file back."""
        self._tensors.pop(key, None)
        self._files.pop(key, None)

    def rest(self, key: Map, first: int, last: int) -> None:
        """Rows that will not be used for a while: a file's pages leave the process (not the
        system's cache, which writes them to disk in its own time)."""
        if key not in self._files or not hasattr(mmap, "MADV_DONTNEED"):
            return
        row = key.bytes // key.height
        start = -(-max(first, 0) * row // mmap.PAGESIZE) * mmap.PAGESIZE
        length = min(last, key.height) * row // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._files[key].madvise(mmap.MADV_DONTNEED, start, length)

    def _made(self, key: Map) -> Tensor:
        shape = (key.height, key.width, key.channels)
        if self._places[key] is Place.MEMORY:
            return zeros(shape, key.dtype, self._device)
        if self._folder is None:
            return zeros(shape, key.dtype, torch.device("cpu"))
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                _reserve(file.fileno(), key.bytes)
                self._files[key] = mmap.mmap(file.fileno(), key.bytes)
        except OSError as error:
            raise SdconvError(
                "no file for a feature map can be made",
                where=self._folder,
                expected=f"room for {in_words(key.bytes)} more",
                got=error.strerror or error,
            ) from error
        return torch.frombuffer(self._files[key], dtype=key.dtype).view(shape)


def zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that goes back to the system as a whole when the tensor does: large blocks of many
    sizes, made and freed in turn, leave an allocator's heap full of holes."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    block = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(block, dtype=dtype).view(shape)


def trim_heap() -> None:
    """Gives back what glibc's allocator keeps of freed strips, up to 64 MiB; nothing elsewhere."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reserve(descriptor: int, size: int) -> None:
    # a hole in a file that cannot be filled later would end the process with a signal
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def checked_folder(folder: str | Path) -> Path:
    """The folder for spilled maps.

    Raises:
        InputError: it is no folder that can be written to.

    Warns:
        SdconvWarning: what is written there stays in memory (tmpfs).
    """
    path = Path(folder)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise InputError("no folder that can be written to", where="spill", got=str(folder))
    if _filesystem(path) in ("tmpfs", "ramfs"):
        words = f"{path} keeps its files in memory: spill to a folder on a disk"
        warnings.warn(SdconvWarning(words), stacklevel=3)
    return path


def check_room(folder: Path, size: int) -> None:
    """States the need before anything is computed.

    Raises:
        InputError: fewer than ``size`` bytes are free there.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            "too little room for the maps that do not fit into memory",
            where=f"spill={folder}",
            expected=f"{in_words(size)} free",
            got=in_words(free),
            fix="name a folder on a larger disk, or raise the memory limit",
        )


def _filesystem(folder: Path) -> str | None:
    """The kind of file system that ``folder`` is on, as Linux tells it."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    mounts = [line.split()[1:3] for line in lines]
    resolved = folder.resolve()
    held = [(len(place), kind) for place, kind in mounts if resolved.is_relative_to(place)]
    return max(held, default=(0, None), key=lambda found: found[0])[1]
