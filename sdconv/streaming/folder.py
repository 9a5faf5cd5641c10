"""The folder that maps beyond the memory limit are written to."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from sdconv.errors import InputError, SdconvWarning
from sdconv.sizes import in_words


def checked_folder(folder: str | Path) -> Path:
    """The folder for spilled maps.

    Raises:
        InputError: it is no folder that can be written to.

    Warns:
        SdconvWarning: what is written there stays in memory (tmpfs).
    """
    _check(folder)
    path = Path(folder)
    if _filesystem(path) in ("tmpfs", "ramfs"):
        words = f"{path} keeps its files in memory: spill to a folder on a disk"
        warnings.warn(SdconvWarning(words), stacklevel=3)
    return path


def check_room(folder: Path, size: int) -> None:
    """States the need before anything is computed.

    Raises:
        InputError: fewer than ``size`` bytes are free there, or the folder is gone.
    """
    _check(folder)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            "too little room for the maps that do not fit into memory",
            where=f"spill={folder}",
            expected=f"{in_words(size)} free",
            got=in_words(free),
            hint="name a folder on a larger disk, or raise the memory limit",
        )


def _check(folder: object) -> None:
    path = Path(folder) if isinstance(folder, str | os.PathLike) else None
    if path is None or not path.is_dir() or not os.access(path, os.W_OK):
        raise InputError("no folder that can be written to", where="spill", got=str(folder))


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
