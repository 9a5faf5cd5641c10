"""Zarr arrays, one for each tensor, with the samples of a shard along the first axis."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import torch

from sdconv.dataset.layouts.sample import Sample
from sdconv.dataset.plan import Planned
from sdconv.dataset.store import Record, Store
from sdconv.errors import InputError, SdconvError


class Zarr:
    """``NAME-000000.zarr.zip`` for each shard, which ``zarr.storage.ZipStore`` opens.

    The samples' JSON is in the group's attribute ``samples``. A shard is held in memory while it is
    written.
    """

    def write(
        self, store: Store, number: int, samples: Iterable[Sample]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Writes a group as a zip of fixed dates: zarr's own would have today's."""
        zarr = _zarr(store)
        every = list(samples)
        files: dict[str, Any] = {}
        group = zarr.create_group(
            zarr.storage.MemoryStore(files),
            zarr_format=3,
            attributes={"samples": [dict(one.about) for one in every]},
        )
        for name in every[0].tensors if every else ():
            values = torch.stack([one.tensors[name] for one in every]).numpy()
            array = group.create_array(
                quote(name, safe=""),
                shape=values.shape,
                chunks=(1, *(max(side, 1) for side in values.shape[1:])),
                dtype=values.dtype,
                config={"write_empty_chunks": True},
            )
            array[:] = values

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in sorted(files):
                    archive.writestr(zipfile.ZipInfo(name), files[name].to_bytes())

        places = [{"row": row} for row in range(len(every))]
        return [store.write(f"{store.shard_name(number)}.zarr.zip", write)], places

    def read(self, store: Store, record: Record, place: Mapping[str, Any]) -> Sample:
        """One sample, without reading the others."""
        zarr = _zarr(store)
        path = store.folder / record["files"][0]["name"]
        with zarr.storage.ZipStore(path, mode="r") as file:
            group = zarr.open_group(file, mode="r")
            about = group.attrs["samples"][place["row"]]
            tensors = {
                unquote(name): torch.from_numpy(array[place["row"]])
                for name, array in sorted(group.arrays())
            }
        return Sample(about, tensors)

    def file_of(self, about: Mapping[str, Any], planned: Planned) -> None:
        """A shard is one file."""

    def check_packages(self, store: Store) -> None:
        """See ``Layout``."""
        _zarr(store)

    def check(self, about: Mapping[str, Any], shards: Sequence[Sequence[Planned]]) -> None:
        """Refuses bfloat16, and shards of images of several sizes."""
        if about[about["name"]]["dtype"] == "bfloat16":
            raise InputError(
                "zarr has no bfloat16",
                where="layout",
                expected="float32 or float16",
                hint="pass --store float16",
            )
        if any(len({one.size for one in shard}) > 1 for shard in shards):
            raise InputError(
                "an array has one size",
                where="layout",
                expected="one size, or buckets",
                got=f"--size {about['preprocessing']['size']}",
                hint="take another --size or --layout",
            )


def _zarr(store: Store) -> Any:
    try:
        import zarr
        import zarr.storage
    except ImportError as error:
        raise SdconvError(
            "these files are written by the zarr package",
            where=store.folder,
            hint="pip install 'sdconv[maps]'",
        ) from error
    return zarr
