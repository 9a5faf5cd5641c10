"""Maps written into a zarr folder as they come, and each read again by itself.

Each place has a group, named by its percent-encoded name, of arrays ``0``, ``1``...: a new one
begins where the shape or the dtype of the maps changes. An array's first axis goes over calls; its
attributes name the place, the dtype that torch has for it, and the calls. A call is written there
after its map is, so that what a killed run leaves is complete as far as the calls go.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.calls import Call

if TYPE_CHECKING:
    from zarr import Array

FORMAT = "sdconv_maps"
VERSION = 1
# what one read has to take from the disk, at most: bytes of a chunk before it is compressed
_CHUNK = 4 << 20
# dtypes that numpy lacks, and integers of their size
_AS_INTEGERS = {torch.bfloat16: torch.int16} | {
    getattr(torch, f"float8_{kind}"): torch.int8
    for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
}


class Store:
    """A folder that maps are written into as they come; made with the first of them.

    Args:
        path: of the folder.
        pipeline: the maps are a pipeline's.

    Raises:
        SdconvError: there is something at that path; the zarr package is missing.
    """

    def __init__(self, path: Path, *, pipeline: bool) -> None:
        zarr_for(path)
        if path.exists():
            raise SdconvError(
                "there is something already, and maps overwrite nothing",
                where=path,
                expected="a path where nothing is",
                hint="choose another path, or remove what is there",
            )
        # the working folder may change before the maps are read again
        self.path = path.absolute()
        self._pipeline = pipeline
        self._begun = False
        # by place: the array that is written to, and its number
        self._open: dict[str, tuple[Array[Any], int]] = {}

    def append(self, name: str, call: Call, x: Tensor) -> Callable[[], Tensor]:
        """Writes a map, and gives what reads it again.

        Raises whatever hinders it; what was written before stays as it is.
        """
        values = _as_numpy(x)
        array, number = self._array(name, x, values)
        calls: Any = array.attrs["calls"]
        row = len(calls)
        array.resize((row + 1, *values.shape))
        array[row] = values
        # the map is complete only now
        array.attrs["calls"] = [*calls, _written(call)]
        folder = self._folder(name, number)
        return lambda: read_map(folder, row)

    def begin(self) -> None:
        """Makes the folder, if it is not there yet."""
        if not self._begun:
            zarr = zarr_for(self.path)
            self.path.mkdir(parents=True)
            about = {FORMAT: VERSION, "pipeline": self._pipeline}
            zarr.create_group(self.path, zarr_format=3, attributes=about)
            self._begun = True

    def _array(self, name: str, x: Tensor, values: Any) -> tuple[Array[Any], int]:
        """The array that takes maps like this one, and its number."""
        array, number = self._open.get(name, (None, -1))
        if array is None or array.shape[1:] != values.shape or array.dtype != values.dtype:
            array, number = self._new(name, number + 1, x, values), number + 1
            self._open[name] = array, number
        return array, number

    def _new(self, name: str, number: int, x: Tensor, values: Any) -> Array[Any]:
        zarr = zarr_for(self.path)
        self.begin()
        if number == 0:
            zarr.create_group(self._folder(name, number).parent, zarr_format=3)
        made: Array[Any] = zarr.create_array(
            self._folder(name, number),
            shape=(0, *values.shape),
            chunks=(1, *_chunk(values.shape, values.itemsize)),
            dtype=values.dtype,
            # all-zero chunks too: what is not there was not written
            config={"write_empty_chunks": True},
            compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
            attributes={
                "name": name,
                "order": list(self._open).index(name) if number else len(self._open),
                "dtype": str(x.dtype).removeprefix("torch."),
                "calls": [],
            },
        )
        return made

    def _folder(self, name: str, number: int) -> Path:
        return self.path / quote(name, safe="") / str(number)


def save(entries: Iterable[tuple[str, Call, Tensor]], path: Path, *, pipeline: bool) -> None:
    """Writes maps into a folder that gets its name only once it is complete.

    Args:
        entries: the places' names, the calls, the maps. path: of the folder. pipeline: they are a
            pipeline's.

    Raises:
        SdconvError: there is something at that path; it cannot be written; zarr is missing.
    """
    Store(path, pipeline=pipeline)  # checks
    with said(path, "cannot be written", hint="make room, or choose another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            store = Store(part / "maps", pipeline=pipeline)
            store.begin()
            for name, call, x in entries:
                store.append(name, call, x)
            store.path.rename(path)
        finally:
            remove(part)


def remove(folder: Path) -> None:
    """Removes a folder that was being written to, until it stays away: after an interruption
    zarr's threads go on for a moment, and make it anew."""
    if not folder.exists():
        return
    start = time.monotonic()
    gone = start
    while time.monotonic() < min(gone + 0.5, start + 10):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            gone = time.monotonic()
        time.sleep(0.02)


def read_map(folder: Path, row: int) -> Tensor:
    """The map of one call in an array's folder.

    Raises:
        SdconvError: it cannot be read, or is not all there.
    """
    import numpy

    zarr = zarr_for(folder)
    with said(folder, "cannot be read"):
        array = zarr.open_array(folder, mode="r", zarr_format=3)
        # zarr would fill in what is missing, however large it says that it is
        pairs = zip(array.shape[1:], array.chunks[1:], strict=True)
        chunks = prod(-(-side // part) for side, part in pairs)
        there = sum(one.is_file() for one in (folder / "c" / str(row)).rglob("*"))
        if (folder / "c" / str(row)).is_file():  # of a map without axes
            there = 1
        if there != chunks:
            raise ValueError(f"{there} of {chunks} chunks are there")
        dtype = getattr(torch, str(array.attrs["dtype"]))
        x = torch.from_numpy(numpy.asarray(array[row]))
        return x.view(dtype) if dtype in _AS_INTEGERS else x.to(dtype)


def _written(call: Call) -> list[Any]:
    return [call.index, call.timestep, call.guided]


def _as_numpy(x: Tensor) -> Any:
    x = x.detach().cpu().contiguous()
    return x.view(_AS_INTEGERS.get(x.dtype, x.dtype)).numpy()


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """So much of a map along its channels that a chunk is about ``_CHUNK`` bytes."""
    if len(shape) < 2:
        return tuple(max(side, 1) for side in shape)
    each = prod(shape[2:]) * max(shape[0], 1) * itemsize
    channels = min(max(_CHUNK // max(each, 1), 1), max(shape[1], 1))
    return (max(shape[0], 1), channels, *(max(side, 1) for side in shape[2:]))


def zarr_for(path: Path) -> Any:
    """The zarr package.

    Raises:
        SdconvError: it is not installed.
    """
    try:
        import zarr
        import zarr.codecs
    except ImportError as error:
        raise SdconvError(
            "maps on the disk need the zarr package",
            where=path,
            hint="pip install 'sdconv[maps]'",
        ) from error
    return zarr


@contextmanager
def said(path: Path, what: str, hint: str | None = None) -> Iterator[None]:
    """What goes wrong with a file in one kind of error."""
    try:
        yield
    except SdconvError:
        raise
    # of zarr and of a file's own making: wrong types, lengths, sizes, codecs
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise SdconvError(f"{what} ({first})", where=path, hint=hint) from error
