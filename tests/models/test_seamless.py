"""Seamless networks: shifting the input around shifts the output around, whatever computes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv

VAE = seeded.network(seeded.SMALL_KL).double()
VAE32 = seeded.network(seeded.SMALL_KL)
TINY = seeded.network(seeded.SMALL_TINY).double()
SCALE = 2  # of the networks above


def z(*size: int) -> Tensor:
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1)).double()


def decode(network: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return network.decode(latents).sample


def encode(network: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = network.encode(images)
    return output.latents if hasattr(output, "latents") else output.latent_dist.parameters


@pytest.mark.parametrize("network", [VAE, TINY], ids=["vae", "tiny"])
@given(st.integers(3, 7), st.integers(3, 7), st.integers(-6, 6), st.sampled_from(["x", "y", "xy"]))
@settings(max_examples=12)
def test_decoding_commutes_with_shifting(
    network: Any, height: int, width: int, by: int, axes: str
) -> None:
    dims = {"x": (3,), "y": (2,), "xy": (2, 3)}[axes]
    latents = z(height, width)
    with sdconv.seamless(network, axes):
        shifted = decode(network, latents.roll((by,) * len(dims), dims))
        expected = decode(network, latents).roll((SCALE * by,) * len(dims), dims)
    assert error(shifted, expected) < 1e-9


@pytest.mark.parametrize("network", [VAE, TINY], ids=["vae", "tiny"])
@pytest.mark.parametrize(("axes", "dim"), [("x", 3), ("y", 2)])
def test_so_does_encoding(network: Any, axes: str, dim: int) -> None:
    images = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(1)).double()
    with sdconv.seamless(network, axes):
        shifted, whole = encode(network, images.roll(2 * SCALE, dim)), encode(network, images)
    assert error(shifted, whole.roll(2, dim)) < 1e-9


def test_not_along_the_other_axis_nor_without_the_context() -> None:
    with sdconv.seamless(VAE, "x"):
        down = decode(VAE, z(5, 6).roll(2, 2)), decode(VAE, z(5, 6)).roll(2 * SCALE, 2)
    assert error(*down) > 1e-3
    across = decode(VAE, z(5, 6).roll(2, 3)), decode(VAE, z(5, 6)).roll(2 * SCALE, 3)
    assert error(*across) > 1e-3


def test_a_unet() -> None:
    config = unets.smallest("SD1")
    network: Any = unets.ours(unets.theirs(config)).double()
    sample, prompt = z(16, 24), torch.randn(1, 5, config["cross_attention_dim"]).double()
    inputs = (torch.tensor(7), prompt)
    with sdconv.seamless(network, "x"), torch.no_grad():
        shifted = network(sample.roll(8, 3), *inputs).sample
        expected = network(sample, *inputs).sample.roll(8, 3)
    assert error(shifted, expected) < 1e-9
    with torch.no_grad():
        assert error(network(sample.roll(8, 3), *inputs).sample, expected) > 1e-3


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_both_backends_and_streaming_agree(axes: str) -> None:
    network, latents = copy.deepcopy(VAE32), z(24, 19).float()
    images = torch.randn(1, 3, 37, 44, generator=torch.Generator().manual_seed(1))
    with sdconv.seamless(network, axes):
        expected = decode(network, latents), encode(network, images)
        for backend in ("reference", "fast"):
            for streams in (False, True):
                network.enable_tiling(streams)
                with sdconv.backend(backend):
                    assert error(decode(network, latents), expected[0]) < 2e-5
                    assert error(encode(network, images), expected[1]) < 2e-5
    network.disable_tiling()
    assert error(decode(network, latents), expected[0]) > 1e-3, "the control"


def test_xy_is_torchs_circular_padding() -> None:
    circular = copy.deepcopy(VAE)
    for module in circular.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    with sdconv.seamless(VAE):
        assert torch.equal(decode(VAE, z(5, 6)), decode(circular, z(5, 6)))


def test_contexts_nest_and_leave_nothing_behind() -> None:
    before = decode(VAE, z(5, 6))
    with sdconv.seamless(VAE, "x"):
        outer = decode(VAE, z(5, 6))
        with pytest.raises(KeyError), sdconv.seamless(VAE, "y"):
            assert not torch.equal(decode(VAE, z(5, 6)), outer)
            raise KeyError
        assert torch.equal(decode(VAE, z(5, 6)), outer)
    assert torch.equal(decode(VAE, z(5, 6)), before)
    assert not any("_conv_forward" in vars(m) or "seamless_axes" in vars(m) for m in VAE.modules())


@pytest.mark.parametrize(
    ("network", "axes", "words"),
    [
        (VAE, "xz", "unknown axes"),
        (VAE, None, "unknown axes"),
        (nn.Conv2d(1, 1, 3), "x", "not a network of sdconv's"),
    ],
)
def test_refused(network: Any, axes: Any, words: str) -> None:
    with pytest.raises(sdconv.InputError, match=words), sdconv.seamless(network, axes):
        pass


def test_a_convolution_that_was_changed_by_hand() -> None:
    network = copy.deepcopy(VAE)
    conv = network.decoder.conv_in
    conv._conv_forward = conv._conv_forward
    with (
        pytest.raises(sdconv.InputError, match=r"decoder\.conv_in.*_conv_forward of its own"),
        sdconv.seamless(network),
    ):
        pass
