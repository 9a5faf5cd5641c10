"""Folders that are written completely, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdconv.errors import SdconvError


def remove_folder(folder: Path) -> None:
    """Remove a folder that was being written to, until it stays removed: after an interruption
    zarr's threads run on for a moment, and create it again."""
    if not folder.exists():
        return
    start = time.monotonic()
    gone = start
    while time.monotonic() < min(gone + 0.5, start + 10):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            gone = time.monotonic()
        time.sleep(0.02)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``out`` at the end, and removed after an error.

    Raises:
        SdconvError: an error about a file in the folder, under the name ``out``.
    """
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}.", suffix=".part"))
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)
        _put_in_place(part, out)
    except SdconvError as error:
        if str(part) not in str(error):
            raise
        raise SdconvError(
            "cannot be written, and nothing is left of it",
            where=out,
            got=error.__cause__ or error,
            hint="make room, or choose a folder on another disk",
        ) from error
    finally:
        remove_folder(part)


def _put_in_place(part: Path, out: Path) -> None:
    """Give a complete folder its name, or move its contents into a folder that is not empty."""
    if not out.is_dir() or not any(out.iterdir()):
        part.rename(out)
        return
    for new in list(part.iterdir()):
        if (old := out / new.name).is_dir():
            shutil.rmtree(old)
        new.replace(old)
    part.rmdir()
