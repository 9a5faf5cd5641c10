"""Memory sizes and image sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdconv
from sdconv.sizes import format_bytes, format_padding, parse_bytes, parse_size

GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("2GiB", 2 * GIB),
        ("2 gib", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("1GB", 10**9),
        ("512MiB", 512 * MIB),
        ("7", 7),
        ("7 B", 7),
        (12345, 12345),
    ],
)
def test_memory_sizes_as_people_write_them(written: str | int, size: int) -> None:
    assert parse_bytes(written) == size


@pytest.mark.parametrize(
    "written", ["", "GiB", "-1GiB", "2 GiB of it", "2QiB", "0", 0, -5, 2.5, True, None, "1e9", "٣"]
)
def test_not_a_memory_size(written: Any) -> None:
    with pytest.raises(sdconv.InputError, match="not a memory size"):
        parse_bytes(written)


@given(st.integers(0, 1 << 45))
def test_formatted_sizes_are_rounded_up(size: int) -> None:
    text = format_bytes(size)
    if size:
        read = parse_bytes(text.replace("bytes", "B"))
        assert size <= read <= 1.1 * size + 1


@pytest.mark.parametrize(
    ("written", "size"), [("512", (512, 512)), ("512x768", (512, 768)), ("8X16", (8, 16))]
)
def test_image_sizes_are_rows_by_columns(written: str, size: tuple[int, int]) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written", ["", "x", "512x", "1x2x3", "0", "8x0", "-8", "8.5", "٣", "9" * 10]
)
def test_not_an_image_size(written: str) -> None:
    with pytest.raises(sdconv.InputError, match="--size: not a size"):
        parse_size(written)


@pytest.mark.parametrize(
    ("padding", "written"),
    [((1, 1, 1, 1), "1"), ((0, 1, 0, 1), "0,1"), ((0, 1, 1, 1), "0,1/1,1")],
)
def test_padding_is_written_shortly(padding: tuple[int, int, int, int], written: str) -> None:
    assert format_padding(padding) == written
