"""Feature maps rendered as images, compared with numpy's and torch's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdconv.errors import InputError
from sdconv.features.rendering import (
    as_maps,
    downscaled,
    principal_components,
    statistics,
    to_grey,
    to_rgb,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_statistics_are_numpys() -> None:
    maps = 3 + 2 * noise(5, 7, 9)
    found = statistics(maps)
    assert found.mean == pytest.approx(maps.mean((1, 2)), rel=1e-5)
    assert found.variance == pytest.approx(maps.var((1, 2)), rel=1e-5)
    assert (found.low, found.high) == (maps.min(), maps.max())
    assert found.counts.tolist() == np.histogram(maps, 64)[0].tolist()
    assert found.not_finite == 0


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    maps = noise(3, 4, 4)
    rest = maps[0].ravel()[3:].copy()
    maps[0].ravel()[:3] = np.nan, np.inf, -np.inf
    found = statistics(maps)
    assert found.not_finite == 3
    assert found.mean[0] == pytest.approx(rest.mean(), rel=1e-5)
    assert found.variance[0] == pytest.approx(rest.var(), rel=1e-5)
    assert found.counts.sum() == maps.size - 3
    nothing = statistics(np.full((2, 3, 3), np.nan, np.float32))
    assert nothing.not_finite == 18
    assert np.isfinite(nothing.mean).all()


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), channels=st.integers(1, 3))
def test_constant_feature_maps_can_be_rendered(value: float, channels: int) -> None:
    maps = np.full((channels, 4, 6), value, np.float32)
    found = statistics(maps)
    assert found.counts.sum() == maps.size
    assert to_grey(maps)[0].shape == maps.shape
    assert to_rgb(principal_components(maps)[0]).shape == (4, 6, 3)


def test_downscaling_averages_pixels() -> None:
    maps = noise(2, 16, 32)
    small = downscaled(maps, 8)
    assert small.shape == (2, 4, 8)
    assert small[1, 1, 2] == pytest.approx(maps[1, 4:8, 8:12].mean(), abs=1e-6)
    assert downscaled(maps, 32) is maps
    assert downscaled(noise(1, 100, 3), 10).shape == (1, 10, 1)


def test_each_channel_has_its_own_range_of_greys() -> None:
    maps = np.stack([np.linspace(0, 1, 400), np.linspace(-50, 50, 400)]).astype(np.float32)
    pixels, ranges = to_grey(maps.reshape(2, 20, 20))
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() <= 1
    assert ranges == pytest.approx(np.percentile(maps, (0.5, 99.5), axis=1).T)
    # channels of a single pixel share one range
    single, shared = to_grey(np.array([0, 5, 10], np.float32).reshape(3, 1, 1))
    assert single.ravel().tolist() == [0, 128, 255]
    assert (shared == shared[0]).all()


def test_principal_components_are_those_of_an_svd() -> None:
    maps = noise(40, 12, 12) * np.linspace(1, 6, 40, dtype=np.float32)[:, None, None]
    _, directions, share = principal_components(maps)
    pixels = torch.from_numpy(maps.reshape(40, -1).T.copy()).double()
    _, values, vectors = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    # each direction up to its sign; the third is near the fourth, so the space of the first two
    overlap = torch.from_numpy(directions[:, :2]).double().T @ vectors[:2].T
    assert overlap.det().abs().item() == pytest.approx(1, abs=1e-2)
    assert share == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), 1e-2)


def test_colours_are_reproducible_and_follow_previous_directions() -> None:
    maps = noise(24, 8, 8)
    first, directions, _ = principal_components(maps)
    assert (principal_components(maps)[0] == first).all()
    turned = principal_components(maps, -directions)[1]
    assert turned == pytest.approx(-directions)
    assert principal_components(noise(2, 5, 5))[0][2].any() == np.False_  # no third direction


def test_tensors_of_all_shapes_become_feature_maps() -> None:
    x = torch.arange(2 * 6 * 2 * 4.0).reshape(2, 6, 2, 4)
    assert (as_maps(x) == x[0].numpy()).all()
    tokens = x.flatten(2).mT
    for size in ((2, 4), (4, 8), (7, 15)):  # halved once, and twice with rounding up
        assert (as_maps(tokens, size) == x[0].numpy()).all()
    assert as_maps(torch.zeros(1, 9, 3)).shape == (3, 3, 3)
    assert as_maps(torch.zeros(1, 7, 3)).shape == (3, 1, 7)
    assert as_maps(torch.zeros(1, 9, 3), (2, 4)).shape == (3, 1, 9)
    assert as_maps(torch.zeros(1, 5, dtype=torch.bfloat16)).shape == (5, 1, 1)
    for wrong in (torch.zeros(3), torch.zeros(1, 0, 2, 2), torch.zeros(1, 1, 1, 1, 1)):
        with pytest.raises(InputError, match="not a feature map"):
            as_maps(wrong)
