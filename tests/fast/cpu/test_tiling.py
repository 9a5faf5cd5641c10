"""The division of a convolution's output into bands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdconv.fast.cpu.tiling import Bands, bands, whole_strip
from sdconv.fast.cpu.winograd import CONV3X3


@pytest.mark.parametrize(
    ("size", "channels", "threads", "found"),
    [
        (512, 128, 1, Bands(4, 1)),
        (512, 128, 2, Bands(8, 1)),
        (64, 256, 2, Bands(2, 8)),
        (64, 256, 4, None),  # four bands of four tile rows
        (32, 128, 2, None),
        (512, 320, 1, None),  # a weight of 14 MiB
    ],
)
def test_small_weights_and_large_maps_have_bands(
    size: int, channels: int, threads: int, found: Bands | None
) -> None:
    assert bands(whole_strip(CONV3X3, size, size), channels, channels, threads) == found


@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    channels=st.integers(1, 300),
    threads=st.integers(1, 64),
)
def test_each_thread_has_a_band_of_whole_strips(
    height: int, width: int, channels: int, threads: int
) -> None:
    strip = whole_strip(CONV3X3, height, width)
    found = bands(strip, channels, channels, threads)
    if found is not None:
        assert threads <= found.count <= strip.tile_rows
        assert 1 <= found.strip_rows <= -(-strip.tile_rows // found.count)
