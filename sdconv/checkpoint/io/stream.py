"""Streams tensors from their sources into one safetensors file, a piece at a time.

A tensor that keeps its dtype is copied byte for byte, even if torch does not have the dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.io.header import DTYPE_BITS, TensorInfo
from sdconv.checkpoint.io.narrow import Caster
from sdconv.checkpoint.io.tensor_files import DTYPE_NAMES, TORCH_DTYPES, SourceFile
from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import CheckpointError

OnTensor = Callable[[str, int, int], None]
"""Called before each tensor with its name, the bytes done so far and all bytes."""

_PIECE = 1 << 22  # values that are in memory at a time


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor of a file to be written.

    ``pieces``: where its rows come from, in order. ``transposed``: whether it is the transpose of
    its one piece. ``component``: the one that it belongs to, if known.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[SourceFile, str], ...]
    transposed: bool = False
    component: str | None = None

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The headers' entries for the pieces."""
        return tuple(file.entries[name] for file, name in self.pieces)

    @property
    def dtype(self) -> str:
        """safetensors' name of the sources' dtype."""
        return self.infos[0].dtype

    def written_as(self, dtype: torch.dtype | None) -> str:
        """safetensors' name of the dtype in which it is written.

        Args:
            dtype: for floating-point tensors of a component.

        Raises:
            CheckpointError: its pieces have different dtypes, or one that safetensors lacks.
        """
        stored = TORCH_DTYPES.get(self.dtype)
        if dtype is not None and self.component and stored is not None and stored.is_floating_point:
            return DTYPE_NAMES[dtype]
        there = {info.dtype for info in self.infos}
        if len(there) > 1 or self.dtype not in DTYPE_BITS:
            raise CheckpointError(
                f"{self.name} cannot be written as it is stored",
                where=self.pieces[0][0].label,
                expected="one dtype that safetensors has",
                got=", ".join(sorted(there)),
            )
        return self.dtype

    def tensor(self) -> Tensor:
        """The tensor in the sources' dtype, memory-mapped if it is one piece of a file.

        Raises:
            CheckpointError: it cannot be read, or torch does not have the dtype.
        """
        tensors = [file.tensor(name) for file, name in self.pieces]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (joined.T if self.transposed else joined).reshape(self.shape)


def stream(
    entries: Sequence[OutputTensor],
    path: Path,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    caster: Caster | None = None,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> None:
    """Writes a safetensors file, which gets its name only once it is complete.

    Args:
        entries: with different names.
        path: folders above it are created.
        metadata: the file's own.
        dtype: for floating-point tensors of a component; None keeps theirs.
        caster: casts them.
        on_tensor: called for progress.

    Raises:
        CheckpointError: two entries have the same name, a source cannot be read, safetensors does
            not have a dtype, a value is too large for the dtype, or the file cannot be written.
    """
    targets = {entry.name: entry.written_as(dtype) for entry in entries}
    if len(targets) < len(entries):
        names = sorted(entry.name for entry in entries)
        twice = next(a for a, b in pairwise(names) if a == b)
        raise CheckpointError(
            "two tensors would get the same name",
            where=path,
            expected="every name once",
            got=f"{twice}, from "
            + " and ".join(repr(e.pieces[0][1]) for e in entries if e.name == twice),
            hint="remove the wrong one from the file",
        )
    # the widest dtype first, as safetensors does: each tensor begins at a multiple of its width
    ordered = sorted(entries, key=lambda entry: (-DTYPE_BITS[targets[entry.name]], entry.name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start, total = 0, sum(info.nbytes for entry in entries for info in entry.infos)
    for entry in ordered:
        end = start + _size(entry, targets[entry.name])
        header[entry.name] = {
            "dtype": targets[entry.name],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = _text(header, path)

    caster = caster or Caster(path)

    def write(part: Path) -> None:
        done = 0
        with part.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little"))
            handle.write(text)
            for entry in ordered:
                on_tensor(entry.name, done, total)
                for piece in _bytes(entry, targets[entry.name], caster):
                    handle.write(piece)
                done += sum(info.nbytes for info in entry.infos)
        for file in {id(file): file for entry in ordered for file, _ in entry.pieces}.values():
            file.check_unchanged()
        on_tensor("", total, total)

    write_whole(path, write)


def _text(header: Mapping[str, object], path: Path) -> bytes:
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            "a name cannot be written as UTF-8", where=path, got=short(error.object)
        ) from error
    return text + b" " * (-len(text) % 8)


def _size(entry: OutputTensor, target: str) -> int:
    """Bytes of an entry as it is written."""
    nbytes = sum(info.nbytes for info in entry.infos)
    return nbytes * DTYPE_BITS[target] // DTYPE_BITS[entry.dtype]


def _bytes(entry: OutputTensor, target: str, caster: Caster) -> Iterator[bytes | memoryview]:
    if entry.transposed:
        yield from _values(entry.tensor(), target, entry.pieces[0][1], caster)
        return
    for file, name in entry.pieces:
        stored = file.stored_bytes(name) if target == entry.dtype else None
        if stored is not None:
            yield from stored
        else:
            yield from _values(file.tensor(name), target, name, caster)


def _values(tensor: Tensor, target: str, name: str, caster: Caster) -> Iterator[memoryview]:
    # a view of the mapping if possible, so that only one piece is in memory
    for piece in torch.split(tensor.reshape(-1), _PIECE):
        values = caster.cast(piece, TORCH_DTYPES[target], name).contiguous()
        if values.numel():
            # numpy's stubs declare the buffer protocol only from Python 3.12 on
            yield memoryview(cast(bytearray, values.view(torch.uint8).numpy()))
