"""Sprite sheets: many small images in one WebP."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdconv.features.rendering import to_grey
from sdconv.report.features.sprites import sheet_of, tile_grid, webp


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_tiles_are_placed_row_by_row(count: int, height: int, width: int) -> None:
    tiles = np.arange(count * height * width, dtype=np.uint32).astype(np.uint8)
    tiles = tiles.reshape(count, height, width)
    sheet, columns = tile_grid(tiles)
    for at in range(count):
        row, column = divmod(at, columns)
        top, left = row * height, column * width
        assert (sheet[top : top + height, left : left + width] == tiles[at]).all()


def test_small_tiles_are_lossless() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    sheet = sheet_of([tiles], 10**6)
    decoded = np.asarray(Image.open(io.BytesIO(sheet.data)).convert("L"))
    assert (decoded == tile_grid(tiles)[0]).all()


def test_a_sheet_takes_the_first_version_that_fits() -> None:
    large = to_grey(noise(9, 64, 64))[0]
    small = to_grey(noise(9, 16, 16))[0]
    made: list[int] = []

    def versions():  # type: ignore[no-untyped-def]
        for tiles in (large, small):
            made.append(tiles.shape[1])
            yield tiles

    assert sheet_of(versions(), 10**6).width == 64
    assert made == [64]  # the small version is not needed
    middle = len(webp(tile_grid(large)[0], 40))
    assert len(sheet_of(versions(), middle).data) <= middle
    assert sheet_of(versions(), 4000).width == 16
    assert sheet_of(versions(), 0).width == 16  # the coarsest, if none fits
