"""Captured feature maps in a zarr folder, written one by one and read one by one.

Each hook point has a group, named by its percent-encoded name, with arrays ``0``, ``1``...: a new
array begins where the shape or the dtype changes. The first axis of an array is the call; its
attributes are the hook point's name, torch's dtype and the calls. A call is added to the attributes
after its feature map is written, so every call that they list is complete, even if the process was
killed.

The axes have names, and next to an array ``0`` lie its coordinates ``call`` and ``timestep``, so
that xarray opens a hook point's group as a data set, and the whole folder as a tree of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.arrays import COORDINATES, as_numpy, axis_names, coordinates
from sdconv.features.calls import Call
from sdconv.features.folders import remove_folder

if TYPE_CHECKING:
    from zarr import Array

Load = Callable[[], Tensor]
"""A function that returns a feature map; those of this package also have its ``shape`` and
``dtype``."""

FORMAT = "sdconv_maps"
VERSION = 1
# for those who open the root as a data set, and see no variables
_OPENS = "xarray.open_datatree(path, engine='zarr', consolidated=False)"
# bytes of a chunk before compression: the most that one read takes from the disk
_CHUNK = 4 << 20


class ZarrStore:
    """Writes feature maps to a folder one by one; the first one creates the folder.

    Args:
        path: of the folder.
        pipeline: the feature maps are a pipeline's.

    Raises:
        SdconvError: the path exists, or the zarr package is missing.
    """

    def __init__(self, path: Path, *, pipeline: bool) -> None:
        zarr_package(path)
        if path.exists():
            raise SdconvError(
                "this path exists, and feature maps overwrite nothing",
                where=path,
                expected="a path that does not exist",
                hint="choose another path, or remove this one",
            )
        # the working directory may change before the feature maps are read
        self.path = path.absolute()
        self._pipeline = pipeline
        self._begun = False
        # by hook point: the array that is written to, and its number
        self._open: dict[str, tuple[Array[Any], int]] = {}
        self._coordinates: dict[str, list[Array[Any]]] = {}

    def append(self, name: str, call: Call, x: Tensor) -> Stored:
        """Write a feature map, and return a function that reads it.

        If writing fails, the error is zarr's or the operating system's, and what was written before
        stays as it is.
        """
        values = as_numpy(x)
        array, number = self._array(name, x, values)
        calls: Any = array.attrs["calls"]
        row = len(calls)
        # the coordinates first: xarray opens no array that is longer than they are
        for coordinate, value in zip(self._coordinates[name], coordinates(call), strict=True):
            coordinate.resize((row + 1,))
            coordinate[row] = value
        array.resize((row + 1, *values.shape))
        array[row] = values
        # only now is it complete
        array.attrs["calls"] = [*calls, _written(call)]
        return Stored(self._folder(name, number), row, x.shape, x.dtype)

    def begin(self) -> None:
        """Create the folder if it does not exist yet."""
        if not self._begun:
            zarr = zarr_package(self.path)
            self.path.mkdir(parents=True)
            about = {FORMAT: VERSION, "pipeline": self._pipeline, "opens with": _OPENS}
            zarr.create_group(self.path, zarr_format=3, attributes=about)
            self._begun = True

    def _array(self, name: str, x: Tensor, values: Any) -> tuple[Array[Any], int]:
        """The array for feature maps of this shape and dtype, and its number."""
        array, number = self._open.get(name, (None, -1))
        if (
            array is None
            or array.shape[1:] != values.shape
            or array.attrs["dtype"] != _name(x.dtype)
        ):
            array, number = self._new(name, number + 1, x, values), number + 1
            self._open[name] = array, number
        return array, number

    def _new(self, name: str, number: int, x: Tensor, values: Any) -> Array[Any]:
        zarr = zarr_package(self.path)
        self.begin()
        if number == 0:
            zarr.create_group(
                self._folder(name, number).parent, zarr_format=3, attributes={"name": name}
            )
        # arrays of one group that differ in size need axes of different names
        later = f"_{number}" if number else ""
        axes = [f"{axis}{later}" for axis in ("call", *axis_names(name, values.ndim))]
        group = self._folder(name, number).parent
        self._coordinates[name] = [
            zarr.create_array(
                group / f"{coordinate}{later}",
                shape=(0,),
                chunks=(1024,),
                dtype=dtype,
                dimension_names=axes[:1],
                attributes={"coordinate": True},
            )
            for coordinate, dtype in COORDINATES.items()
        ]
        made: Array[Any] = zarr.create_array(
            self._folder(name, number),
            shape=(0, *values.shape),
            chunks=(1, *_chunk(values.shape, values.itemsize)),
            dtype=values.dtype,
            # what a killed process did not write is not a number to other programs
            fill_value=float("nan") if values.dtype.kind == "f" else 0,
            dimension_names=axes,
            # all-zero chunks too, so that a missing chunk is one that was not written
            config={"write_empty_chunks": True},
            compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
            attributes={
                "name": name,
                "long_name": name,
                "coordinates": " ".join(f"{one}{later}" for one in COORDINATES),
                "order": list(self._open).index(name) if number else len(self._open),
                "dtype": _name(x.dtype),
                "calls": [],
            },
        )
        return made

    def _folder(self, name: str, number: int) -> Path:
        return self.path / quote(name, safe="") / str(number)


def save(tensors: Iterable[tuple[str, Call, Tensor]], path: Path, *, pipeline: bool) -> None:
    """Write feature maps to a folder that gets its name only once it is complete.

    Args:
        tensors: hook point, call and feature map, in order.
        path: of the folder.
        pipeline: the feature maps are a pipeline's.

    Raises:
        SdconvError: the path exists or cannot be written, or zarr is missing.
    """
    ZarrStore(path, pipeline=pipeline)  # checks path and zarr
    with errors_about(path, "cannot be written", hint="make room, or choose another disk"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            store = ZarrStore(part / "maps", pipeline=pipeline)
            store.begin()
            for name, call, x in tensors:
                store.append(name, call, x)
            store.path.rename(path)
        finally:
            remove_folder(part)


def read_store(path: Path) -> tuple[dict[str, list[tuple[Call, Load]]], bool]:
    """The feature maps of a folder, and whether they are a pipeline's.

    Returns:
        For each hook point, in the order in which they were first written, the calls with a
        function that reads the feature map.

    Raises:
        SdconvError: the folder does not exist or holds something else, or the zarr package is
            missing.
    """
    path = path.absolute()
    zarr = zarr_package(path)
    with errors_about(path, "not a folder of feature maps", hint="open what maps.save(path) wrote"):
        about = dict(zarr.open_group(path, mode="r", zarr_format=3).attrs)
        if about.get(FORMAT) != VERSION:
            raise ValueError(f"its attributes do not say {FORMAT} {VERSION}")
        found: list[tuple[int, str, list[tuple[Call, Load]]]] = []
        for folder in sorted(one for one in path.iterdir() if one.is_dir()):
            calls: list[tuple[Call, Load]] = []
            order, name = 0, ""
            # a killed process may have created a folder without the array's metadata
            begun = (one.parent.name for one in folder.glob("*/zarr.json"))
            for number in sorted(int(name) for name in begun if name.isdecimal()):
                order, name, more = _read_array(folder / str(number))
                calls += more
            if calls:
                found.append((order, name, calls))
    found.sort(key=lambda one: one[0])
    return {name: calls for _, name, calls in found}, bool(about["pipeline"])


def _read_array(folder: Path) -> tuple[int, str, list[tuple[Call, Load]]]:
    """An array's rank among the hook points, the hook point's name, and the calls in the array."""
    array = zarr_package(folder).open_array(folder, mode="r", zarr_format=3)
    attributes = array.attrs
    name, order = attributes["name"], attributes["order"]
    calls = [_call(*written) for written in attributes["calls"]]
    if not isinstance(name, str) or not isinstance(order, int):
        raise ValueError("attributes of other types")
    shape, dtype = torch.Size(array.shape[1:]), _dtype(attributes)
    loads = [Stored(folder, row, shape, dtype) for row in range(len(calls))]
    return order, name, list(zip(calls, loads, strict=True))


@dataclass(frozen=True)
class Stored:
    """Reads a feature map from a row of an array's folder."""

    folder: Path
    row: int
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return _read(self.folder, self.row)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(attributes: Any) -> torch.dtype:
    dtype = getattr(torch, str(attributes["dtype"]))
    if not isinstance(dtype, torch.dtype):
        raise ValueError("its dtype is not one of torch's")
    return dtype


def _read(folder: Path, row: int) -> Tensor:
    """The feature map of one call in an array's folder.

    Raises:
        SdconvError: it cannot be read, or is incomplete.
    """
    import numpy

    zarr = zarr_package(folder)
    with errors_about(folder, "cannot be read"):
        array = zarr.open_array(folder, mode="r", zarr_format=3)
        # zarr would fill in missing chunks, for any size that the metadata claims
        pairs = zip(array.shape[1:], array.chunks[1:], strict=True)
        chunks = prod(-(-side // part) for side, part in pairs)
        there = sum(one.is_file() for one in (folder / "c" / str(row)).rglob("*"))
        if (folder / "c" / str(row)).is_file():  # a tensor without axes
            there = 1
        if there != chunks:
            raise ValueError(f"{there} of {chunks} chunks are there")
        dtype = _dtype(array.attrs)
        x = torch.from_numpy(numpy.asarray(array[row]))
        # the first version wrote the bits of dtypes that numpy lacks as integers
        as_bits = dtype.is_floating_point and not x.is_floating_point()
        return x.view(dtype) if as_bits else x.to(dtype)


def _call(
    index: int,
    timestep: float | list[float] | None,
    guided: bool | None,
    size: list[int] | None = None,  # the first version wrote none
) -> Call:
    timesteps = tuple(timestep) if isinstance(timestep, list) else timestep
    return Call(index, timesteps, guided, None if size is None else (size[0], size[1]))


def _written(call: Call) -> list[Any]:
    return [call.index, call.timestep, call.guided, call.size]


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a chunk: as many channels as fit into about ``_CHUNK`` bytes."""
    if len(shape) < 2:
        return tuple(max(side, 1) for side in shape)
    each = prod(shape[2:]) * max(shape[0], 1) * itemsize
    channels = min(max(_CHUNK // max(each, 1), 1), max(shape[1], 1))
    return (max(shape[0], 1), channels, *(max(side, 1) for side in shape[2:]))


def zarr_package(path: Path) -> Any:
    """The zarr package.

    Raises:
        SdconvError: it is not installed.
    """
    try:
        import zarr
        import zarr.codecs
    except ImportError as error:
        raise SdconvError(
            "feature maps on the disk need the zarr package",
            where=path,
            hint="pip install 'sdconv[maps]'",
        ) from error
    return zarr


@contextmanager
def errors_about(path: Path, what: str, hint: str | None = None) -> Iterator[None]:
    """Translate any exception into an SdconvError about ``path``."""
    try:
        yield
    except SdconvError:
        raise
    # zarr raises anything on a damaged file: wrong types, lengths, sizes, codecs
    except Exception as error:
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise SdconvError(f"{what} ({first})", where=path, hint=hint) from error
