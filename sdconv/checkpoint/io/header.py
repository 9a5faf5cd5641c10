"""Reads a safetensors file's header without torch: names, shapes, dtypes and metadata, no tensors.

The format: the header's length in 8 bytes, little-endian; the header, a JSON object
``{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``; then the data, which the
tensors cover without gaps or overlaps (https://huggingface.co/docs/safetensors).

A file that is accepted here is accepted by safetensors too, with the same names, shapes and dtypes.
The reverse is also true, except for four things that safetensors accepts and no writer writes: a
name that occurs twice, an entry that is a list, a dtype that is an object, and a shape of zero
elements that is too large for torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from sdconv.checkpoint.io.files import (
    AGAIN,
    LARGEST_TEXT,
    foreign,
    os_errors,
    regular_file,
    short,
    unique,
)
from sdconv.errors import CheckpointError

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8"), 8),
        **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)
"""The number of bits in an element, for every dtype in safetensors 0.8."""

_LENGTH_BYTES = 8
_LARGEST = 2**63  # no tensor has this many elements or bytes
_DEEPEST = 127  # levels of nested JSON that safetensors accepts


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """A tensor's name, shape, dtype and position, known without reading it.

    ``dtype``: safetensors' name (``F32``, ``BF16``, ``F8_E4M3``, ...). ``start``, ``end``: in bytes
    from the beginning of the file; 0 and the number of bytes for a tensor that is not in a
    safetensors file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Header:
    """A safetensors file's header; ``tensors`` are in the order of their bytes in the file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.tensors)

    @property
    def dtypes(self) -> dict[str, str]:
        """Every tensor's dtype by its name, as safetensors calls it: ``F32``, ``BF16``, ..."""
        return {name: info.dtype for name, info in self.tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: str | Path) -> Header:
    """Reads the header of a safetensors file, and none of its data.

    Raises:
        CheckpointError: the file cannot be read, is not a safetensors file, or its header does not
            describe its data; ``MissingFileError`` if it does not exist.
        InputError: ``path`` is not a path.
    """
    header, descriptor = open_header(path)
    os.close(descriptor)
    return header


def open_header(path: str | Path) -> tuple[Header, int]:
    """``read_header``, and the descriptor of the open file that the header was read from; the
    caller closes it.

    Raises:
        SdconvError: as ``read_header``.
    """
    file, _ = regular_file(path)
    with os_errors(file), file.open("rb") as handle:
        # of the file that is open, which may have been replaced since
        size = os.fstat(handle.fileno()).st_size
        header = _header(file, size, _header_text(file, size, handle))
        return header, os.dup(handle.fileno())


def _header(file: Path, size: int, text: bytes) -> Header:
    data_start = _LENGTH_BYTES + len(text)
    fields = _parsed(file, text)
    metadata = fields.pop("__metadata__", None)
    infos = [_info(file, name, entry, data_start) for name, entry in fields.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_layout(file, infos, data_start, size)
    return Header(
        path=file,
        tensors=MappingProxyType({info.name: info for info in infos}),
        metadata=MappingProxyType(_metadata(file, metadata)),
    )


def _header_text(file: Path, size: int, handle: BinaryIO) -> bytes:
    head = handle.read(64)
    if size < _LENGTH_BYTES or len(head) < _LENGTH_BYTES:
        raise CheckpointError(
            "is cut short before its header",
            where=file,
            expected="at least 8 bytes",
            got=f"{size} bytes",
            hint=AGAIN,
        )
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    room = size - _LENGTH_BYTES
    if length > LARGEST_TEXT:
        raise foreign(file, head) or CheckpointError(
            "states a header length that is too large; it is damaged, or not a safetensors file",
            where=file,
            expected=f"at most {LARGEST_TEXT} bytes",
            got=f"{length} bytes (the file begins with {head[:16]!r})",
            hint=AGAIN,
        )
    if length > room:
        raise foreign(file, head) or CheckpointError(
            "states a header length that is larger than the file",
            where=file,
            expected=f"at most the {room} bytes that follow",
            got=f"{length} bytes (the file begins with {head[:16]!r})",
            hint=AGAIN,
        )
    handle.seek(_LENGTH_BYTES)
    text = handle.read(length)
    if len(text) < length:
        raise CheckpointError("became shorter while it was read", where=file, hint=AGAIN)
    if not text.lstrip().startswith(b"{") and (other := foreign(file, head)):
        raise other
    return text


def _parsed(file: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON, parsed as strictly as by safetensors."""

    def refused(what: str, got: object) -> CheckpointError:
        return CheckpointError(what, where=file, expected="a JSON object", got=got, hint=AGAIN)

    try:
        text = raw.decode("utf-8")
        fields = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if _deeper_than(fields, _DEEPEST):
            raise RecursionError
        if "\\u" in text:  # only an escape can produce half of a surrogate pair
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise refused("has a header that is not UTF-8", error) from error
    except UnicodeEncodeError as error:
        raise refused("has a header with half a surrogate pair in a name", error.reason) from error
    except KeyError as error:
        raise CheckpointError(
            f"has a header that names {short(error.args[0])} twice",
            where=file,
            expected="every name once",
            hint="write the file again with the library that created it",
        ) from error
    except RecursionError as error:
        raise refused("has a header nested too deeply", f"over {_DEEPEST} levels") from error
    except ValueError as error:
        raise refused("has a header that is not JSON", error) from error
    if not isinstance(fields, dict):
        raise refused("has a header that is not a JSON object", short(fields))
    return fields


def _whole(literal: str) -> int | float:
    """A JSON integer as safetensors reads it: a float beyond 64 bits, and for -0."""
    fits = len(literal) <= 20 and -(2**63) <= int(literal) < 2**64
    return int(literal) if fits and literal != "-0" else _finite(literal)


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError("a number out of range")
    return value


def _no_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")


def _deeper_than(value: object, levels: int) -> bool:
    level: list[Any] = [[value]]
    for _ in range(levels + 1):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in children for child in each if isinstance(child, dict | list)]
    return bool(level)


def _info(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{file}: tensor {short(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(
            "has an entry that is not an object",
            where=where,
            expected="dtype, shape and data_offsets",
            got=short(entry),
            hint=AGAIN,
        )
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise CheckpointError(
                f"has no {field}", where=where, got=f"only {short(sorted(entry))}", hint=AGAIN
            )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            "has an unknown dtype",
            where=where,
            expected=f"one of {', '.join(DTYPE_BITS)}",
            got=short(dtype),
            hint="convert the file to one of these dtypes with the library that wrote it",
        )
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise CheckpointError(
            "has a malformed shape",
            where=where,
            expected="a list of integers from 0 up",
            got=short(shape),
            hint=AGAIN,
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise CheckpointError(
            "has malformed data_offsets",
            where=where,
            expected="a list of two integers from 0 up",
            got=short(offsets),
            hint=AGAIN,
        )
    start, end = offsets
    bits = _bits(where, dtype, shape)
    if end < start:
        raise CheckpointError(
            "ends before it begins",
            where=where,
            expected="data_offsets in ascending order",
            got=offsets,
            hint=AGAIN,
        )
    if bits != 8 * (end - start):
        raise CheckpointError(
            "has a shape that does not fit its bytes",
            where=where,
            expected=f"{bits / 8:g} bytes for {dtype} {short(shape)}",
            got=f"{end - start} bytes",
            hint=AGAIN,
        )
    return TensorInfo(
        name=name,
        shape=tuple(shape),
        dtype=dtype,
        start=data_start + start,
        end=data_start + end,
    )


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0  # a bool is not a number here


def _bits(where: str, dtype: str, shape: list[int]) -> int:
    """The bits of all elements; an error if even the strides of such a tensor overflow."""
    bound = elements = 1
    for length in shape:
        bound *= max(length, 1)
        elements *= length
        if bound * max(8, DTYPE_BITS[dtype]) >= 8 * _LARGEST:
            raise CheckpointError(
                "has a shape that is too large for a tensor",
                where=where,
                expected="less than 2**63 bytes",
                got=f"{dtype} {short(shape)}",
                hint=AGAIN,
            )
    return elements * DTYPE_BITS[dtype]


def _check_layout(file: Path, infos: list[TensorInfo], data_start: int, size: int) -> None:
    """Checks that the tensors, in the order of their bytes, are adjacent and end with the file."""
    before, name = data_start, "the header"
    for info in infos:
        if info.start != before:
            where = f"{file}: tensor {short(info.name)}"
            if info.end > size:
                what = "lies outside the file"
            elif info.start < before:
                what = f"overlaps {name}"
            else:
                what = f"leaves a gap after {name}"
            raise CheckpointError(
                what,
                where=where,
                expected=f"data_offsets that begin at {before - data_start}, within "
                f"{size - data_start} bytes",
                got=[info.start - data_start, info.end - data_start],
                hint=AGAIN,
            )
        before, name = info.end, short(info.name)
    if before != size:
        raise CheckpointError(
            "is cut short" if before > size else "is longer than its tensors",
            where=file,
            expected=f"{before} bytes",
            got=f"{size} bytes",
            hint=AGAIN,
        )


def _metadata(file: Path, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            "has __metadata__ that is not a mapping of strings",
            where=file,
            expected="an object of strings",
            got=short(metadata),
            hint=AGAIN,
        )
    return metadata
