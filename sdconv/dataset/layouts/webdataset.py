"""Tars that webdataset reads: ``KEY.json`` and ``KEY.safetensors`` of each sample, next to each
other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from safetensors.torch import load, save

from sdconv.dataset.layouts.sample import Sample
from sdconv.dataset.plan import Planned
from sdconv.dataset.store import Record, Store
from sdconv.errors import SdconvError

_BLOCK = 512  # of a tar: every file in it fills whole ones
_CONTROL, _NAME = re.compile(r"[\x00-\x1f\x7f]"), re.compile(r"[\x00-\x1f\x7f%.]")


class WebDataset:
    """One tar for each shard."""

    def write(
        self, store: Store, number: int, samples: Iterable[Sample]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Writes ``NAME-000000.tar``."""
        places: list[dict[str, Any]] = []
        writer = _tar_writer(store)

        def write(file: BinaryIO) -> None:
            # names of any length and in any script; nothing that differs from run to run
            fixed = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": "PAX_FORMAT"}
            with writer(file, encoder=False, **fixed) as tar:
                for sample in samples:
                    name = member_name(sample.key)
                    about = json.dumps(sample.about).encode()
                    tensors = save(dict(sample.tensors))
                    places.append(
                        {
                            "json": _put(tar, name, "json", about),
                            "safetensors": _put(tar, name, "safetensors", tensors),
                        }
                    )

        return [store.write(f"{store.shard_name(number)}.tar", write)], places

    def read(self, store: Store, record: Record, place: Mapping[str, Any]) -> Sample:
        """One sample, without reading the rest of the tar."""
        with (store.folder / record["files"][0]["name"]).open("rb") as file:
            return Sample(
                json.loads(_part(file, place["json"])), load(_part(file, place["safetensors"]))
            )

    def file_of(self, about: Mapping[str, Any], planned: Planned) -> None:
        """A shard is one file."""

    def check_packages(self, store: Store) -> None:
        """See ``Layout``."""
        _tar_writer(store)

    def check(self, about: Mapping[str, Any], shards: Sequence[Sequence[Planned]]) -> None:
        """Takes everything."""


def member_name(key: str) -> str:
    """A key as webdataset's key, which ends at the first dot of a file's name: dots and percent
    signs there are written as ``%2E`` and ``%25``, and line breaks and the like in the same way."""
    folder, slash, name = key.rpartition("/")
    return _CONTROL.sub(_escaped, folder) + slash + _NAME.sub(_escaped, name)


def _escaped(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"


def _put(tar: Any, name: str, suffix: str, data: bytes) -> list[int]:
    """Writes a file to a tar, and returns where its bytes begin, and their number."""
    tar.write({"__key__": name, suffix: data})
    return [tar.tarstream.offset - -(-len(data) // _BLOCK) * _BLOCK, len(data)]


def _part(file: BinaryIO, place: Sequence[int]) -> bytes:
    offset, length = place
    file.seek(offset)
    data = file.read(length)
    if len(data) != length:
        raise ValueError(f"{len(data)} of {length} bytes are there")
    return data


def _tar_writer(store: Store) -> Any:
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise SdconvError(
            "tars are written by the webdataset package",
            where=store.folder,
            hint="pip install 'sdconv[dataset]'",
        ) from error
    return TarWriter
