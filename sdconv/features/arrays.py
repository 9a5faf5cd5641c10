"""Feature maps as arrays of numpy and xarray, and as a table of pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.calls import Call

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataArray

COORDINATES = {"call": "int64", "timestep": "float64"}
"""Names and dtypes of the coordinates of the axis ``call``."""

STATISTICS = ("mean", "std", "min", "max")
"""Of one channel of one sample, the columns of the table that end with a statistic."""


def coordinates(call: Call) -> tuple[int, float]:
    """The values of ``COORDINATES`` for a call; the timestep is NaN if there is none, or if the
    samples of the batch have different ones."""
    timestep = call.timestep
    return call.index, timestep if isinstance(timestep, float) else float("nan")


def axis_names(name: str, ndim: int) -> tuple[str, ...]:
    """Names of a feature map's axes.

    Args:
        name: of its hook point.
        ndim: number of its axes.
    """
    if ndim == 4:
        probabilities = ("batch", "head", "query", "key")
        maps = ("batch", "channel", "row", "column")
        return probabilities if name.endswith(":probs") else maps
    known = {2: ("batch", "channel"), 3: ("batch", "token", "channel")}
    return known.get(ndim, tuple(f"axis_{at}" for at in range(ndim)))


def as_numpy(x: Tensor) -> Any:
    """A tensor as a numpy array, in float32 if numpy lacks its dtype: no value changes."""
    x = x.detach().cpu().contiguous()
    in_numpy = not x.is_floating_point() or x.dtype in (torch.float16, torch.float32, torch.float64)
    return (x if in_numpy else x.float()).numpy()


def data_array(name: str, calls: Sequence[Call], values: Any) -> DataArray:
    """Feature maps of one hook point with named axes and coordinates.

    Args:
        name: of the hook point.
        calls: the calls of the feature maps.
        values: the feature maps, stacked along a new first axis, ``call``.

    Raises:
        SdconvError: xarray is not installed.
    """
    xarray = _package("xarray", "maps.to_xarray")
    axes = axis_names(name, values.ndim - 1)
    pairs = zip(COORDINATES.items(), zip(*map(coordinates, calls), strict=True), strict=True)
    found: dict[str, Any] = {
        key: ("call", np.asarray(column, dtype)) for (key, dtype), column in pairs
    }
    if axes[0] == "batch" and (batch := values.shape[1]) % 2 == 0:
        if all(call.guided for call in calls):
            halves = ["unconditional"] * (batch // 2) + ["conditional"] * (batch // 2)
            found["half"] = ("batch", halves)
    array: DataArray = xarray.DataArray(
        values, dims=("call", *axes), coords=found, name=name, attrs={"long_name": name}
    )
    return array


def statistics_table(found: Iterable[tuple[str, Call, Tensor]]) -> DataFrame:
    """A table with a row for each channel of each sample of each feature map.

    Args:
        found: name, call and feature map; each is used before the next one is read.

    Raises:
        SdconvError: pandas is not installed.
    """
    pandas = _package("pandas", "maps.to_pandas")
    parts = [pandas.DataFrame(_rows(name, call, x)) for name, call, x in found]
    columns = ["layer", *COORDINATES, "half", "sample", "channel", *STATISTICS]
    empty = pandas.DataFrame(columns=columns)
    table: DataFrame = pandas.concat(parts, ignore_index=True)[columns] if parts else empty
    return table


def _rows(name: str, call: Call, x: Tensor) -> Mapping[str, Any]:
    """Columns of the table for one feature map."""
    x = x.detach().float().cpu()
    axis = 1 if x.ndim == 4 else max(x.ndim - 1, 1)
    x = x.reshape(1, -1) if x.ndim < 2 else x
    flat = x.movedim(axis, 1).flatten(2) if x.ndim > 2 else x[:, :, None]
    batch, channels = flat.shape[:2]
    found = (flat.mean(-1), flat.std(-1, correction=0), flat.amin(-1), flat.amax(-1))
    numbers = {
        key: values.reshape(-1).double().numpy()
        for key, values in zip(STATISTICS, found, strict=True)
    }
    halves: list[str | None] = [None] * batch
    if call.guided and batch % 2 == 0:
        halves = [*["unconditional"] * (batch // 2), *["conditional"] * (batch // 2)]
    return {
        "layer": name,
        **dict(zip(COORDINATES, coordinates(call), strict=True)),
        "half": np.repeat(np.asarray(halves, object), channels),
        "sample": np.repeat(np.arange(batch), channels),
        "channel": np.tile(np.arange(channels), batch),
        **numbers,
    }


def _package(name: str, where: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise SdconvError(
            f"this needs the {name} package, which is not installed",
            where=where,
            hint="pip install 'sdconv[maps]'",
        ) from error
