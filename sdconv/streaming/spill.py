"""The folder for feature maps that exceed the memory limit."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from sdconv.errors import InputError, SdconvWarning
from sdconv.sizes import format_bytes


def spill_folder(folder: str | Path) -> Path:
    """Checks a folder for spilled feature maps.

    Raises:
        InputError: it is not a folder, or not writable.

    Warns:
        SdconvWarning: its file system is in memory (tmpfs), so spilling saves none.
    """
    _check_writable(folder)
    path = Path(folder)
    if _filesystem(path) in ("tmpfs", "ramfs"):
        words = f"{path} keeps its files in memory: spill to a folder on a disk"
        warnings.warn(SdconvWarning(words), stacklevel=3)
    return path


def check_disk_space(folder: Path, size: int) -> None:
    """Checks that ``size`` bytes can be spilled, before anything is computed.

    Raises:
        InputError: fewer are free there, or the folder no longer exists.
    """
    _check_writable(folder)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            "not enough disk space for the feature maps that do not fit into memory",
            where=f"spill={folder}",
            expected=f"{format_bytes(size)} free",
            got=format_bytes(free),
            hint="name a folder on a larger disk, or raise the memory limit",
        )


def _check_writable(folder: object) -> None:
    path = Path(folder) if isinstance(folder, str | os.PathLike) else None
    if path is None or not path.is_dir() or not os.access(path, os.W_OK):
        raise InputError("not a writable folder", where="spill", got=str(folder))


def _filesystem(folder: Path) -> str | None:
    """The type of file system that holds ``folder``, from Linux's mount table; None elsewhere."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    mounts = [line.split()[1:3] for line in lines]
    resolved = folder.resolve()
    matches = [(len(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(matches, default=(0, None), key=lambda match: match[0])[1]
