"""Maps as pictures: against numpy's and torch's own answers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdconv.errors import InputError
from sdconv.report.features.pictures import (
    in_colour,
    in_grey,
    principal,
    shrunk,
    statistics,
)
from sdconv.report.features.sprites import arranged, sheet_of, webp
from sdconv.report.features.views import FeatureMap, as_maps


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_statistics_are_numpys() -> None:
    maps = 3 + 2 * noise(5, 7, 9)
    told = statistics(maps)
    assert told.mean == pytest.approx(maps.mean((1, 2)), rel=1e-5)
    assert told.variance == pytest.approx(maps.var((1, 2)), rel=1e-5)
    assert (told.low, told.high) == (maps.min(), maps.max())
    assert told.counts.tolist() == np.histogram(maps, 64)[0].tolist()
    assert told.not_finite == 0


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    maps = noise(3, 4, 4)
    rest = maps[0].ravel()[3:].copy()
    maps[0].ravel()[:3] = np.nan, np.inf, -np.inf
    told = statistics(maps)
    assert told.not_finite == 3
    assert told.mean[0] == pytest.approx(rest.mean(), rel=1e-5)
    assert told.variance[0] == pytest.approx(rest.var(), rel=1e-5)
    assert told.counts.sum() == maps.size - 3
    nothing = statistics(np.full((2, 3, 3), np.nan, np.float32))
    assert nothing.not_finite == 18
    assert np.isfinite(nothing.mean).all()


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), channels=st.integers(1, 3))
def test_constant_maps_have_pictures_too(value: float, channels: int) -> None:
    maps = np.full((channels, 4, 6), value, np.float32)
    told = statistics(maps)
    assert told.counts.sum() == maps.size
    assert in_grey(maps)[0].shape == maps.shape
    assert in_colour(principal(maps)[0]).shape == (4, 6, 3)


def test_a_shrunk_map_keeps_the_means_of_what_it_covers() -> None:
    maps = noise(2, 16, 32)
    small = shrunk(maps, 8)
    assert small.shape == (2, 4, 8)
    assert small[1, 1, 2] == pytest.approx(maps[1, 4:8, 8:12].mean(), abs=1e-6)
    assert shrunk(maps, 32) is maps
    assert shrunk(noise(1, 100, 3), 10).shape == (1, 10, 1)


def test_each_channel_has_its_own_range_of_greys() -> None:
    maps = np.stack([np.linspace(0, 1, 400), np.linspace(-50, 50, 400)]).astype(np.float32)
    pixels, ranges = in_grey(maps.reshape(2, 20, 20))
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() <= 1
    assert ranges == pytest.approx(np.percentile(maps, (0.5, 99.5), axis=1).T)
    # of single values there is none of its own
    single, shared = in_grey(np.array([0, 5, 10], np.float32).reshape(3, 1, 1))
    assert single.ravel().tolist() == [0, 128, 255]
    assert (shared == shared[0]).all()


def test_components_are_those_of_an_svd() -> None:
    maps = noise(40, 12, 12) * np.linspace(1, 6, 40, dtype=np.float32)[:, None, None]
    _, directions, share = principal(maps)
    places = torch.from_numpy(maps.reshape(40, -1).T.copy()).double()
    _, values, vectors = torch.linalg.svd(places - places.mean(0), full_matrices=False)
    # each direction up to its sign; the third is near the fourth, so the space of the first two
    overlap = torch.from_numpy(directions[:, :2]).double().T @ vectors[:2].T
    assert overlap.det().abs().item() == pytest.approx(1, abs=1e-2)
    assert share == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), 1e-2)


def test_colours_are_the_same_each_time_and_follow_those_before() -> None:
    maps = noise(24, 8, 8)
    first, directions, _ = principal(maps)
    assert (principal(maps)[0] == first).all()
    turned = principal(maps, -directions)[1]
    assert turned == pytest.approx(-directions)
    assert principal(noise(2, 5, 5))[0][2].any() == np.False_  # no third direction


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_tiles_stand_row_by_row(count: int, height: int, width: int) -> None:
    tiles = np.arange(count * height * width, dtype=np.uint32).astype(np.uint8)
    tiles = tiles.reshape(count, height, width)
    sheet, columns = arranged(tiles)
    for at in range(count):
        row, column = divmod(at, columns)
        top, left = row * height, column * width
        assert (sheet[top : top + height, left : left + width] == tiles[at]).all()


def test_small_tiles_are_kept_exactly() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    sheet = sheet_of([tiles], 10**6)
    decoded = np.asarray(Image.open(io.BytesIO(sheet.data)).convert("L"))
    assert (decoded == arranged(tiles)[0]).all()


def test_a_sheet_takes_the_first_version_that_fits() -> None:
    large = in_grey(noise(9, 64, 64))[0]
    small = in_grey(noise(9, 16, 16))[0]
    asked: list[int] = []

    def versions():  # type: ignore[no-untyped-def]
        for tiles in (large, small):
            asked.append(tiles.shape[1])
            yield tiles

    assert sheet_of(versions(), 10**6).width == 64
    assert asked == [64]  # the small one was not even made
    middle = len(webp(arranged(large)[0], 40))
    assert len(sheet_of(versions(), middle).data) <= middle
    assert sheet_of(versions(), 4000).width == 16
    assert sheet_of(versions(), 0).width == 16  # the coarsest, where none fits


def test_values_of_several_shapes_as_maps() -> None:
    x = torch.arange(2 * 6 * 2 * 4.0).reshape(2, 6, 2, 4)
    assert (as_maps(x) == x[0].numpy()).all()
    tokens = x.flatten(2).mT
    assert (as_maps(tokens, aspect=2) == x[0].numpy()).all()
    assert as_maps(torch.zeros(1, 7, 3)).shape == (3, 1, 7)
    assert as_maps(torch.zeros(1, 5, dtype=torch.bfloat16)).shape == (5, 1, 1)
    for wrong in (torch.zeros(3), torch.zeros(1, 0, 2, 2), torch.zeros(1, 1, 1, 1, 1)):
        with pytest.raises(InputError, match="no feature map"):
            as_maps(wrong)


def test_labels_are_what_a_name_adds_to_its_block() -> None:
    names = {"a.b": "output", "a.b.conv1": "conv1", "a.b:silu1": "silu1", "other": "other"}
    assert {n: FeatureMap(name=n, block="a.b", shots=()).label for n in names} == names
