"""Parquet files: a row for each sample, with its tensors as flat lists of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from typing import Any, BinaryIO

import torch

from sdconv.dataset.layouts.sample import Sample
from sdconv.dataset.plan import Planned
from sdconv.dataset.sources import in_utf8
from sdconv.dataset.store import Record, Store
from sdconv.errors import InputError, SdconvError

_GROUP = 16  # rows that are read at once
_SIZES = ("original_size", "bucket", "crop", "shape")


class Parquet:
    """One file for each shard, with the columns ``key``, ``path``, ``original_size``, ``bucket``,
    ``crop``, ``shape``, one for each tensor, and ``json`` with all that is known of a sample."""

    def write(
        self, store: Store, number: int, samples: Iterable[Sample]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Writes ``NAME-000000.parquet``."""
        arrow, parquet = _pyarrow(store)
        places: list[dict[str, Any]] = []

        def write(file: BinaryIO) -> None:
            writer = None
            try:
                every = iter(samples)
                for group in count():
                    some = list(islice(every, _GROUP))
                    if not some:
                        break
                    table = _table(arrow, some)
                    if writer is None:
                        writer = parquet.ParquetWriter(file, table.schema, compression="zstd")
                    writer.write_table(table)
                    places.extend({"group": group, "row": row} for row in range(len(some)))
            finally:
                if writer is not None:
                    writer.close()

        return [store.write(f"{store.shard_name(number)}.parquet", write)], places

    def read(self, store: Store, record: Record, place: Mapping[str, Any]) -> Sample:
        """One sample, from the rows around it."""
        _, parquet = _pyarrow(store)
        with parquet.ParquetFile(store.folder / record["files"][0]["name"]) as file:
            table = file.read_row_group(place["group"])
        row = {name: table[name][place["row"]] for name in table.column_names}
        about = json.loads(row["json"].as_py())
        tensors = {
            name: torch.from_numpy(row[name].values.to_numpy(zero_copy_only=False).copy()).reshape(
                about["shape"]
            )
            for name in row
            if name not in (*_SIZES, "key", "path", "json")
        }
        return Sample(about, tensors)

    def file_of(self, about: Mapping[str, Any], planned: Planned) -> None:
        """A shard is one file."""

    def check_packages(self, store: Store) -> None:
        """See ``Layout``."""
        _pyarrow(store)

    def check(self, about: Mapping[str, Any], shards: Sequence[Sequence[Planned]]) -> None:
        """Refuses features, whose shapes differ from point to point, and bfloat16."""
        if "latents" not in about:
            raise InputError(
                "parquet files hold latents only",
                where="layout",
                got=about["name"],
                hint="take layout webdataset or zarr",
            )
        if about["latents"]["dtype"] == "bfloat16":
            raise InputError(
                "parquet has no bfloat16",
                where="layout",
                expected="float32 or float16",
                hint="pass --store float32, or take another --layout",
            )


def _table(arrow: Any, samples: Sequence[Sample]) -> Any:
    integers = arrow.list_(arrow.int32())
    columns: dict[str, Any] = {
        "key": arrow.array([one.key for one in samples]),
        "path": arrow.array([in_utf8(one.about["path"]) for one in samples]),
    }
    for name in _SIZES:
        columns[name] = arrow.array([one.about[name] for one in samples], integers)
    for name in samples[0].tensors:
        values = [one.tensors[name].flatten().numpy() for one in samples]
        columns[name] = arrow.array(values, arrow.list_(arrow.from_numpy_dtype(values[0].dtype)))
    columns["json"] = arrow.array([json.dumps(one.about) for one in samples])
    return arrow.table(columns)


def _pyarrow(store: Store) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SdconvError(
            "parquet files are written by the pyarrow package",
            where=store.folder,
            hint="pip install 'sdconv[dataset]'",
        ) from error
    return pyarrow, parquet
