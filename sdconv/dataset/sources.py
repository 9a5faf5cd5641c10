"""Where a data set's images are: a folder, webdataset tars, or a list of paths. Only names,
sizes and dates are read here."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from sdconv.errors import InputError, SdconvError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .avifs .tif .tiff .bmp .dib .gif .ppm .pgm .pbm "
    ".pnm .jp2 .j2k .jpc .jpf .jpx".split()
)
PATH_FIELDS = ("path", "file_name", "filename", "image", "image_path")
"""The names of a list's column of paths; the first that is there is taken."""


@dataclass(frozen=True)
class Item:
    """One image file.

    Attributes:
        name: short and without its suffix; several items may share it.
        path: of the file, or of the tar that it is in; relative to the source's root.
        member: its name in the tar.
        offset: of its first byte in the tar; 0 for a file.
        bytes: its length; -1 for a file that is not there.
        mtime_ns: when the file, or the tar, was last changed.
    """

    name: str
    path: str
    member: str | None
    offset: int
    bytes: int
    mtime_ns: int

    @property
    def identity(self) -> tuple[str, str | None]:
        """What tells it from the other items."""
        return self.path, self.member

    @property
    def full_name(self) -> str:
        """A name that no other item has."""
        return as_key(self.path if self.member is None else f"{self.path}/{self.member}")


@dataclass(frozen=True)
class Source:
    """The images of a source, sorted by path, and the folder that their paths are relative to."""

    root: Path
    items: list[Item]


def find_images(source: str | Path, skip: Path | None = None) -> Source:
    """Lists the images of a source.

    Args:
        source: a folder, which is searched recursively; a folder of tars, a tar or a pattern such
            as ``"{000..099}.tar"`` in webdataset's form; a ``.jsonl`` or ``.parquet`` list of paths
            (in one of the ``PATH_FIELDS``, relative to the list), with a ``key`` if you like.
        skip: a folder that is not searched.

    A member that is in a tar twice counts once, the last, as it does for tar; so does a line of a
    list that is there twice.

    Raises:
        InputError: it does not exist, is something else, or has no images; or a list has an entry
            without a path, with a key that cannot be one, or two entries of one key.
        SdconvError: it cannot be read, or a package that reads it is missing.
    """
    path = Path(source)
    try:
        root, items = _find(path, str(source), skip)
        items = list({item.identity: item for item in items}.values())
        items.sort(key=lambda item: (item.path, item.member or ""))
    except OSError as error:
        raise SdconvError(
            f"cannot be read ({error.strerror or error})", where=error.filename or path
        ) from error
    if not items:
        raise InputError(
            "there are no images",
            where=source,
            expected="files ending in " + ", ".join(sorted(IMAGE_SUFFIXES)),
            hint="name a folder, a .tar of webdataset, or a .jsonl or .parquet list of paths",
        )
    return Source(root, items)


def open_item(root: Path, path: str, offset: int, length: int, in_tar: bool) -> BinaryIO:
    """Opens an image file, or the part of a tar that is one."""
    file = (root / path).open("rb")
    return io.BufferedReader(_Part(file, offset, length)) if in_tar else file


def _find(path: Path, text: str, skip: Path | None) -> tuple[Path, list[Item]]:
    if path.is_dir():
        files = list(_files_in(path, skip))
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if images:
            return path, [_file_item(path, file) for file in images]
        return path, _in_tars(path, [file for file in files if file.suffix == ".tar"])
    if path.suffix == ".tar":
        return path.parent, _in_tars(path.parent, _expanded(path, text))
    if not path.exists():
        raise InputError("does not exist", where=path, hint="check the path")
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(
            "not a source of images",
            where=path,
            expected="a folder, a .tar, a .jsonl or a .parquet file",
        )
    return path.parent, _listed(path, readers[path.suffix](path))


def _files_in(folder: Path, skip: Path | None) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    skipped = None if skip is None else skip.resolve()

    def searched(path: Path) -> bool:
        if path.name.startswith(".") or (skipped is not None and path.resolve() == skipped):
            return False
        if not path.is_symlink():
            return True
        above = [one for one in path.parents if one == folder or folder in one.parents]
        # a link to a folder that it is in would be followed for ever
        return not any(one.resolve().is_relative_to(path.resolve()) for one in above)

    for name, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        here = Path(name)
        folders[:] = [one for one in folders if searched(here / one)]
        yield from (here / file for file in files if not file.startswith("."))


def _file_item(root: Path, file: Path, key: str | None = None) -> Item:
    path = os.path.relpath(file, root).replace(os.sep, "/")
    name = key or as_key(str(PurePosixPath(path).with_suffix("")))
    try:
        about = file.stat()
    except (OSError, ValueError):  # a list may name files that are not there
        return Item(name, path, None, 0, -1, 0)
    return Item(name, path, None, 0, about.st_size, about.st_mtime_ns)


def as_key(path: str) -> str:
    """A path as a key: below a folder, and in UTF-8 even where the file's name is not."""
    return in_utf8("/".join(part for part in path.split("/") if part not in ("", ".", "..")))


def in_utf8(name: str) -> str:
    """A file's name with the bytes in it that are not UTF-8 spelled out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _in_tars(root: Path, tars: Iterable[Path]) -> list[Item]:
    items = []
    for tar in tars:
        changed, path = tar.stat().st_mtime_ns, tar.relative_to(root).as_posix()
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    name = PurePosixPath(member.name)
                    if member.isfile() and name.suffix.lower() in IMAGE_SUFFIXES:
                        # webdataset's key ends at the first dot of the file's name
                        key = as_key(str(name.with_name(name.name.split(".")[0] or name.name)))
                        place = (member.offset_data, member.size, changed)
                        items.append(Item(key, path, member.name, *place))
                _check_end(tar, archive.offset)
        except tarfile.TarError as error:
            raise SdconvError(
                f"not a tar that can be read ({error})", where=tar, hint="download it again"
            ) from error
    return items


def _check_end(tar: Path, offset: int) -> None:
    """Refuses a tar whose members end before its file does, which tarfile takes for its end."""
    with tar.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if offset > length or (block and block != bytes(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged or cut off at byte {min(offset, length)} of {length}")


def _expanded(path: Path, text: str) -> list[Path]:
    if "{" not in text:
        return [path]
    from webdataset.shardlists import expand_urls

    return [Path(one) for one in expand_urls(text)]


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    got = line.strip()[:80].decode("utf-8", "backslashreplace")
                    raise InputError("not JSON", where=f"{path}, line {number}", got=got) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise SdconvError(
            "parquet files need the pyarrow package",
            where=path,
            hint="pip install 'sdconv[dataset]'",
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise InputError(f"not a parquet file ({error})", where=path) from error
    names = file.schema_arrow.names
    wanted = [name for name in (*PATH_FIELDS, "key") if name in names]
    if not set(wanted) & set(PATH_FIELDS):
        raise InputError(
            "no column has paths",
            where=path,
            expected="one of " + ", ".join(PATH_FIELDS),
            got=", ".join(names) or "no columns",
        )
    number = 0
    for batch in file.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _listed(path: Path, rows: Iterable[tuple[int, Any]]) -> list[Item]:
    """The files that a list names."""
    items: list[Item] = []
    keys: dict[str, str] = {}  # those that the list gives -> path
    for number, row in rows:
        given, key = _entry(f"{path}, entry {number}", row)
        items.append(item := _file_item(path.parent, path.parent / given, key))
        if key is not None and keys.setdefault(key, item.path) != item.path:
            raise InputError(
                "two images have one key",
                where=f"{path}, entry {number}",
                expected="a key of its own for each image, or none",
                got=f"{key!r}, which {keys[key]} has",
            )
    named = {item.identity: item.name for item in items}
    for item in items:
        if named[item.identity] != item.name:
            raise InputError(
                "an image has two keys",
                where=f"{path}: {item.path}",
                expected="one entry for each image",
                got=f"{item.name} and {named[item.identity]}",
            )
    return items


def _entry(where: str, row: Any) -> tuple[str, str | None]:
    """The path and the key of an entry of a list."""
    row = {"path": row} if isinstance(row, str) else row
    fields = row if isinstance(row, dict) else {}
    given = next((fields[name] for name in PATH_FIELDS if name in fields), None)
    if not isinstance(given, str) or PurePosixPath(given).name in ("", ".."):
        raise InputError(
            "an entry has no path",
            where=where,
            expected="one of " + ", ".join(PATH_FIELDS),
            got=repr(row)[:80],
        )
    if fields.get("key") is None:
        return given, None
    key = str(fields["key"])
    if key != as_key(key) or not key.isprintable() or not key:
        raise InputError(
            "this cannot be a key",
            where=where,
            expected="a relative path without '..', in printable characters",
            got=repr(key),
        )
    return given, key


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own; it closes the file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
