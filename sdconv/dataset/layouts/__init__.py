"""How the samples of a shard lie on the disk."""

from __future__ import annotations

from collections.abc import Mapping

from sdconv.dataset.layouts.kohya import Kohya
from sdconv.dataset.layouts.parquet import Parquet
from sdconv.dataset.layouts.sample import Layout
from sdconv.dataset.layouts.webdataset import WebDataset
from sdconv.dataset.layouts.zarr import Zarr
from sdconv.errors import InputError

_LAYOUTS: Mapping[str, type[Layout]] = {
    "webdataset": WebDataset,
    "kohya": Kohya,
    "parquet": Parquet,
    "zarr": Zarr,
}


def layout_of(name: str) -> Layout:
    """The layout of that name.

    Raises:
        InputError: there is none.
    """
    if name not in _LAYOUTS:
        raise InputError(
            "unknown layout", where="layout", expected=", ".join(_LAYOUTS), got=repr(name)
        )
    return _LAYOUTS[name]()
