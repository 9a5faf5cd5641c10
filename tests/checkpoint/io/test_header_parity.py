"""What safetensors' own reader accepts is accepted here, with the same names, and nothing else."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers.weight_files import HUGE, U8, entry, packed, written
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from sdconv.checkpoint.io.header import DTYPE_BITS, Header, read_header
from sdconv.errors import CheckpointError

STRICTER = ("twice", "an entry that is not an object", "unknown dtype", "too large for a tensor")
"""The refusals that safetensors does not share; see the module's docstring."""


def theirs(file: Path) -> dict[str, tuple[tuple[int, ...], str]] | None:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}
            return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError:
        return None


def seen(header: Header) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (info.shape, info.dtype) for name, info in header.tensors.items()}


def agree(content: bytes) -> bool:
    """Whether both read ``content`` alike; True if both refuse or both accept the same."""
    with tempfile.TemporaryDirectory() as folder:
        file = written(Path(folder), content)
        expected = theirs(file)
        try:
            got = seen(read_header(file))
        except CheckpointError as error:
            return expected is None or any(what in str(error) for what in STRICTER)
        return got == expected


lengths = st.integers(0, 3)
shapes = st.lists(lengths, max_size=3)
dtypes = st.sampled_from(sorted(DTYPE_BITS))
names = st.text(st.characters(codec="utf-8"), max_size=3) | st.sampled_from(["a", "__metadata__"])
odd = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 3, 4, 8, HUGE - 1, HUGE, 2**64 - 1, 2**64, 1e5, -0.0, 1.0])
    | st.sampled_from(["", "F32", "U8", "BOOL", "\ud800", "\U0001f600"])
    | shapes
    | st.dictionaries(names, st.text(max_size=2), max_size=2)
)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header as a writer makes it, and the number of its data bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(
        st.lists(names.filter(lambda n: n != "__metadata__"), unique=True, max_size=4)
    ):
        shape, dtype = draw(shapes), draw(dtypes)
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits % 8 == 0:
            header[name] = entry(dtype, shape, end, end + bits // 8)
            end += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2)))
    return header, end


@st.composite
def mutated_fields(draw: st.DrawFn) -> bytes:
    """A valid header in which a field, an entry or the number of data bytes is another one."""
    header, nbytes = draw(valid_headers())
    for _ in range(draw(st.integers(1, 2))):
        tensors = [name for name in header if isinstance(header[name], dict)]
        kind = draw(st.integers(0, 4))
        if kind == 0 or not tensors:
            header[draw(names)] = draw(odd)
        elif kind == 1:
            header[draw(st.sampled_from(tensors))][
                draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
            ] = draw(odd)
        elif kind == 2:
            values = header[draw(st.sampled_from(tensors))].get(
                draw(st.sampled_from(["shape", "data_offsets"]))
            )
            if isinstance(values, list) and values:
                values[draw(st.integers(0, len(values) - 1))] = draw(odd | lengths)
        elif kind == 3:
            fields = header[draw(st.sampled_from(tensors))]
            fields.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
        else:
            nbytes = max(0, nbytes + draw(st.integers(-2, 2)))
    return packed(header, bytes(nbytes))


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """A valid file in which some bytes are changed, left out or put in."""
    header, nbytes = draw(valid_headers())
    escaped = draw(st.booleans())
    text = bytearray(json.dumps(header, ensure_ascii=escaped).encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        inserted = draw(
            st.binary(max_size=2)
            | st.sampled_from(list(b'{}[]",:0-9eE.\\u \n')).map(lambda b: bytes([b]))
        )
        text[at : at + draw(st.integers(0, 2))] = inserted
    whole = bytearray(packed(bytes(text), bytes(nbytes)))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(whole) - 1))
        whole[at] = draw(st.integers(0, 255))
    return bytes(whole)


@given(valid_headers())
@settings(max_examples=60, deadline=None)
def test_valid_headers_are_read_alike(valid: tuple[dict[str, Any], int]) -> None:
    header, nbytes = valid
    content = packed(header, bytes(nbytes))
    assert agree(content)
    with tempfile.TemporaryDirectory() as folder:
        read_header(written(Path(folder), content))  # and is accepted


@given(mutated_fields())
@settings(max_examples=300, deadline=None)
def test_mutated_fields_are_read_or_refused_as_by_safetensors(content: bytes) -> None:
    assert agree(content)


@given(mutated_bytes())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_are_read_or_refused_as_by_safetensors(content: bytes) -> None:
    assert agree(content)


@pytest.mark.parametrize("depth", [126, 127, 128, 500])
def test_nesting_is_read_as_deep_as_safetensors_reads_it(depth: int) -> None:
    lists = (depth - 2) * b"["
    text = json.dumps({"a": {**U8, "more": None}}).encode()
    assert agree(packed(text.replace(b"null", lists + lists.replace(b"[", b"]")), b"1"))


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Negative controls: a reader that took either of these would part from safetensors."""
    hole = written(tmp_path, packed({"a": U8, "b": entry("U8", [1], 2, 3)}, b"123"))
    assert theirs(hole) is None
    good = written(tmp_path, packed({"a": U8}, b"1"))
    assert theirs(good) == {"a": ((1,), "U8")} != {"a": ((1,), "I8")}


def test_where_this_reader_is_stricter_on_purpose(tmp_path: Path) -> None:
    one = json.dumps(U8).encode()
    for content, what in (
        (packed(b'{"a":' + one + b',"a":' + one + b"}", b"1"), "twice"),
        (packed({"a": ["U8", [1], [0, 1]]}, b"1"), "not an object"),
        (packed({"a": entry({"U8": None}, [1], 0, 1)}, b"1"), "unknown dtype"),
        (packed({"a": entry("U8", [0, HUGE], 0, 0)}), "too large for a tensor"),
        (packed({"a": entry("U8", [0, 2**40, 2**23], 0, 0)}), "too large for a tensor"),
    ):
        file = written(tmp_path, content)
        assert theirs(file) is not None
        with pytest.raises(CheckpointError, match=what):
            read_header(file)
