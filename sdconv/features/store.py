"""Maps in a zarr folder: written as they come, opened without being read.

Each place has a group, named by its percent-encoded name, of arrays ``0``, ``1``...: a new one
begins where the shape or the dtype of the maps changes. An array's first axis goes over calls; its
attributes name the place, the dtype that torch has for it, and the calls. A call is written there
after its map is, so that what a killed run leaves is complete as far as the calls go.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.calls import Call
from sdconv.features.maps import Entry, Maps

if TYPE_CHECKING:
    from zarr import Array

_FORMAT = "sdconv_maps"
_VERSION = 1
# what one read has to take from the disk, at most: bytes of a chunk before it is compressed
_CHUNK = 4 << 20
# dtypes that numpy lacks, and integers of their size
_AS_INTEGERS = {torch.bfloat16: torch.int16}


class Store:
    """A folder that maps are written into as they come; made with the first of them.

    Args:
        path: of the folder.
        pipeline: the maps are a pipeline's.

    Raises:
        SdconvError: there is something at that path; the zarr package is missing.
    """

    def __init__(self, path: Path, *, pipeline: bool) -> None:
        _zarr(path)
        if path.exists():
            raise SdconvError(
                "there is something already, and maps overwrite nothing",
                where=path,
                expected="a path where nothing is",
                fix="choose another path, or remove what is there",
            )
        self.path = path
        self._pipeline = pipeline
        self._begun = False
        # by place: the array that is written to, and its number
        self._open: dict[str, tuple[Array[Any], int]] = {}

    def append(self, name: str, call: Call, x: Tensor) -> Callable[[], Tensor]:
        """Writes a map, and gives what reads it again.

        Raises:
            SdconvError: it cannot be written; what was written before stays as it is.
        """
        values = _as_numpy(x)
        with _said(self.path, "cannot be written", fix="what is complete there can be opened"):
            array, number = self._array(name, x, values)
            calls: Any = array.attrs["calls"]
            row = len(calls)
            array.resize((row + 1, *values.shape))
            array[row] = values
            # the map is complete only now
            array.attrs["calls"] = [*calls, _written(call)]
        folder = self._folder(name, number)
        return lambda: _read(folder, row)

    def begin(self) -> None:
        """Makes the folder, if it is not there yet."""
        if not self._begun:
            zarr = _zarr(self.path)
            self.path.mkdir(parents=True)
            about = {_FORMAT: _VERSION, "pipeline": self._pipeline}
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
        zarr = _zarr(self.path)
        self.begin()
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


def save(maps: Maps, path: Path) -> None:
    """``Maps.save``: the folder gets its name only once it is complete."""
    Store(path, pipeline=maps.pipeline)  # checks
    with _said(path, "cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        store = Store(part / "maps", pipeline=maps.pipeline)
        with _said(path, "cannot be written"):
            store.begin()
        for name in maps:
            for entry in maps.series(name):
                store.append(name, entry.of, entry.tensor)
        with _said(path, "cannot be written"):
            store.path.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_maps(path: str | Path) -> Maps:
    """Maps that ``maps.save`` or ``sdconv.capture(..., store=...)`` wrote; each is read when it is
    asked for.

    Of a run that was killed there is every map that was complete.

    Raises:
        SdconvError: there is no such folder, or it holds something else; the zarr package is
            missing.
    """
    path = Path(path)
    zarr = _zarr(path)
    with _said(path, "no folder of maps", fix="open what maps.save(path) wrote"):
        about = dict(zarr.open_group(path, mode="r", zarr_format=3).attrs)
        if about.get(_FORMAT) != _VERSION:
            raise ValueError(f"its attributes do not say {_FORMAT} {_VERSION}")
        found: list[tuple[int, str, list[Entry]]] = []
        for folder in sorted(one for one in path.iterdir() if one.is_dir()):
            entries: list[Entry] = []
            order, name = 0, ""
            numbers = (int(one.name) for one in folder.iterdir() if one.name.isdecimal())
            for number in sorted(numbers):
                order, name, more = _entries(folder / str(number))
                entries += more
            if entries:
                found.append((order, name, entries))
    found.sort(key=lambda one: one[0])
    return Maps({name: entries for _, name, entries in found}, pipeline=bool(about["pipeline"]))


def _entries(folder: Path) -> tuple[int, str, list[Entry]]:
    """The maps in one array: its rank among the places, the place's name, and they themselves."""
    attributes = _zarr(folder).open_array(folder, mode="r", zarr_format=3).attrs
    name, order = attributes["name"], attributes["order"]
    calls = [_call(*written) for written in attributes["calls"]]
    if not isinstance(name, str) or not isinstance(order, int):
        raise ValueError("attributes of other types")
    entries = [
        Entry(name, call, lambda row=row: _read(folder, row))  # type: ignore[misc]
        for row, call in enumerate(calls)
    ]
    return order, name, entries


def _read(folder: Path, row: int) -> Tensor:
    import numpy

    zarr = _zarr(folder)
    with _said(folder, "cannot be read"):
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


def _call(index: int, timestep: float | list[float] | None, guided: bool | None) -> Call:
    return Call(index, tuple(timestep) if isinstance(timestep, list) else timestep, guided)


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


def _zarr(path: Path) -> Any:
    try:
        import zarr
        import zarr.codecs
    except ImportError as error:
        raise SdconvError(
            "maps on the disk need the zarr package",
            where=path,
            fix="pip install 'sdconv[maps]'",
        ) from error
    return zarr


@contextmanager
def _said(path: Path, what: str, fix: str | None = None) -> Iterator[None]:
    """What goes wrong with a file in one kind of error."""
    try:
        yield
    except SdconvError:
        raise
    # of zarr and of a file's own making: wrong types, lengths, sizes, codecs
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise SdconvError(f"{what} ({first})", where=path, fix=fix) from error
