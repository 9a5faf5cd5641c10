"""Checks a path before its content is read, and reads small JSON files.

Every reader in this package uses these functions, so that an error of the operating system becomes
the same CheckpointError everywhere.
"""

from __future__ import annotations

import errno
import json
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdconv.errors import CheckpointError, InputError, MissingFileError, SdconvError
from sdconv.hub.names import weights_named

LARGEST_TEXT = 100_000_000
"""The most bytes of a header, index or pickle program that are read; safetensors' own limit."""

AGAIN = "download or copy the file again, and compare its size with the one on its page"

_IMAGE = "an image is an argument of its own; `sdconv encode` makes latents of it"
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "is a git-lfs pointer, not the weights it stands for",
        "run `git lfs pull` in its repository, or download the file itself from its page",
    ),
    (b"<!doctype html", "is a web page saved under a weights' name", "download the file itself"),
    (b"<html", "is a web page saved under a weights' name", "download the file itself"),
    (b"<?xml", "is an XML answer of a server, not weights", "download the file itself"),
    (b"gguf", "is a GGUF file", "sdconv reads safetensors files and torch checkpoints only"),
    (
        b"pk\x03\x04",
        "is a zip archive, as torch.save writes them",
        "if it is a torch checkpoint, open it with sdconv.load under a name that ends in .ckpt",
    ),
    (
        b"\x80",
        "is a pickle",
        "if it is a torch checkpoint, open it with sdconv.load under a name that ends in .ckpt",
    ),
    (b"\x93numpy", "is a numpy array", "sdconv reads safetensors files and torch checkpoints"),
    (b"\x89hdf", "is an HDF5 file", "convert it to safetensors with the library that wrote it"),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it first"),
    (b"7z\xbc\xaf", "is a 7-zip archive", "unpack it first"),
    (b"\xff\xd8\xff", "is a JPEG image, not a file of tensors", _IMAGE),
    (b"\x89png", "is a PNG image, not a file of tensors", _IMAGE),
    (b"gif8", "is a GIF image, not a file of tensors", _IMAGE),
    (b"riff", "is a WebP image or another RIFF file, not a file of tensors", _IMAGE),
    (b"ii*\0", "is a TIFF image, not a file of tensors", _IMAGE),
    (b"mm\0*", "is a TIFF image, not a file of tensors", _IMAGE),
    (b"%pdf", "is a PDF, not weights", "name the file or folder that holds the weights"),
)


def as_path(path: object) -> Path:
    """``path`` as a ``Path``.

    Raises:
        InputError: it is not a ``str`` or a ``Path``, or it is empty.
    """
    if not isinstance(path, str | Path) or path == "":
        raise InputError("not a path", expected="a str or a pathlib.Path", got=short(path))
    return Path(path)


def weights_path(path: object) -> Path:
    """The path of weights, also for a name: of a network that ships with sdconv, or of weights that
    were fetched from the hub. A path that exists is never taken for a name.

    Raises:
        MissingFileError: a name, whose weights are not on this machine.
        InputError: it is not a ``str`` or a ``Path``, or it is empty.
    """
    given = as_path(path)
    with os_errors(given):
        exists = given.exists()
    # a Path of Windows has turned the slash of owner/name round
    name = path if isinstance(path, str) else given.as_posix()
    return given if exists else weights_named(name) or given


def regular_file(path: str | Path) -> tuple[Path, int]:
    """The path and the size in bytes of a regular file that is not empty.

    Raises:
        CheckpointError: it does not exist, cannot be read, is not a regular file, or is empty.
        InputError: ``path`` is not a path.
    """
    file = as_path(path)
    with os_errors(file):
        status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(
            "is a folder",
            where=file,
            expected="one file",
            hint="name a file in it; sdconv.load and `sdconv inspect` take folders too",
        )
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            "is not a regular file",
            where=file,
            expected="a file on a disk",
            got=stat.filemode(status.st_mode),
            hint="copy its content to a file",
        )
    if not status.st_size:
        raise CheckpointError("is empty", where=file, expected="weights", got="0 bytes", hint=AGAIN)
    return file, status.st_size


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Translates an OSError about ``path`` into a CheckpointError."""
    try:
        yield
    except SdconvError:  # some are an OSError or a ValueError too
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            "does not exist",
            where=path,
            expected="weights on this machine (nothing is downloaded here)",
            hint=f"check the name; the working folder is {_working_folder()}",
        ) from error
    except PermissionError as error:
        raise CheckpointError(
            "may not be read",
            where=path,
            expected="permission to read it and to enter every folder above it",
            got=error.strerror,
            hint="ask its owner, or copy it to a folder that you may read",
        ) from error
    except NotADirectoryError as error:
        raise MissingFileError(
            "does not exist",
            where=path,
            got="a file where the path names a folder",
            hint="check the path",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        looped = isinstance(error, OSError) and error.errno == errno.ELOOP
        raise CheckpointError(
            "cannot be read",
            where=path if isinstance(error, OSError) else repr(str(path)),
            got="symbolic links that form a loop" if looped else error,
            hint="check the path and the disk",
        ) from error


def foreign(path: Path, head: bytes) -> CheckpointError | None:
    """The error for a file of another kind, recognised by its first bytes; None if unrecognised."""
    if head[8:9] == b"{":  # a safetensors header after its length
        return None
    start = head.lstrip().lower()
    for magic, what, hint in _FOREIGN:
        if start.startswith(magic):
            return CheckpointError(what, where=path, got=f"first bytes {head[:16]!r}", hint=hint)
    return None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Turns a JSON object's pairs into a dict, for ``object_pairs_hook``.

    Raises:
        KeyError: a name occurs twice; its argument is that name.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise KeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """The content of a small JSON file with one object, such as ``config.json``.

    Raises:
        CheckpointError: it cannot be read, is too long, is not a JSON object, or has a name twice.
    """
    file, size = regular_file(path)
    if size > LARGEST_TEXT:
        raise CheckpointError(
            "is too long", where=file, expected=f"{LARGEST_TEXT} bytes", got=f"{size} bytes"
        )
    with os_errors(file):
        raw = file.read_bytes()
    try:
        fields = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except KeyError as error:
        raise CheckpointError(
            f"names {short(error.args[0])} twice",
            where=file,
            expected="every name once",
            hint=AGAIN,
        ) from error
    except (ValueError, RecursionError) as error:
        raise foreign(file, raw[:64]) or CheckpointError(
            "is not JSON", where=file, expected="a JSON object", got=error, hint=AGAIN
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(
            "is not a JSON object", where=file, expected="an object", got=short(fields), hint=AGAIN
        )
    return fields


def short(value: object) -> str:
    """A short and printable representation, also of what a hostile file contains."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlist, _REPR.maxdict = 120, 120, 10, 4


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "gone"
