"""The tiny autoencoders against their author's architecture, see ``helpers.taesd_author``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded
from helpers.numbers import error, randn
from helpers.taesd_author import (
    AUTHORS,
    author,
    files,
)
from torch import nn

import sdconv
from sdconv.integrations.peers import peer

CONFIGS = {
    "taesd": seeded.tiny(),
    "taef1": seeded.tiny(latent_channels=16),
    "taef2": seeded.POOLED,
    "taesana": seeded.SANA,
}


@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.parametrize("reverse", [False, True], ids=["encoder first", "decoder first"])
def test_equals_the_authors(name: str, reverse: bool, tmp_path: Path) -> None:
    halves = author(name)
    paths = files(tmp_path, *halves)
    network = sdconv.load(paths[::-1] if reverse else paths)
    assert isinstance(network, sdconv.AutoencoderTiny)
    assert network.config == CONFIGS[name]
    scale = network.downscale
    assert scale == (32 if name == "taesana" else 8)
    random = torch.Generator().manual_seed(1)
    image = torch.rand((2, 3, 2 * scale, 3 * scale), generator=random)
    latents = 4 * torch.randn((2, network.config.latent_channels, 2, 3), generator=random)
    with torch.no_grad():
        ours = network.encode(2 * image - 1).latents, network.decode(latents).sample
        theirs = halves[0](image), 2 * halves[1](latents) - 1
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("name", AUTHORS)
def test_one_file_of_both_halves(name: str, tmp_path: Path) -> None:
    both = nn.Module()
    both.encoder, both.decoder = author(name)
    (path,) = files(tmp_path, both)
    network = sdconv.load(path)
    assert network.config == CONFIGS[name]
    assert len(network.state_dict()) == len(both.state_dict())


@pytest.mark.parametrize("name", AUTHORS)
def test_one_half_alone(name: str, tmp_path: Path) -> None:
    halves = author(name)
    paths = files(tmp_path, *halves)
    scale, latent = (32 if name == "taesana" else 8), CONFIGS[name].latent_channels
    image, latents = torch.zeros(1, 3, scale, scale), torch.zeros(1, latent, 1, 1)

    encoding = sdconv.load(paths[0])
    assert encoding.downscale == scale
    assert encoding.encode(image).latents.shape == latents.shape
    with pytest.raises(sdconv.SdconvError, match=r"decoder is missing.*cannot decode") as raised:
        encoding.decode(latents)
    assert "got: weights of the encoder only" in str(raised.value)
    assert "sdconv.load([encoder_file, decoder_file])" in str(raised.value)

    decoding = sdconv.load(paths[1])
    assert decoding.downscale == scale
    assert decoding.decode(latents).sample.shape == image.shape
    with pytest.raises(sdconv.SdconvError, match=r"encoder is missing.*cannot encode"):
        decoding.encode(image)


def test_two_encoders_are_an_error(tmp_path: Path) -> None:
    one = author("taesd")[0]
    with pytest.raises(sdconv.SdconvError, match="not the two halves"):
        sdconv.load(files(tmp_path, one, one))


def test_halves_of_different_autoencoders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(sdconv.SdconvError, match="different autoencoders"):
        sdconv.load(files(tmp_path, author("taesd")[0], author("taef1")[1]))


def test_outputs_and_8_bit_latents_equal_diffusers() -> None:
    config = seeded.tiny()
    ours = seeded.network(config)
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    x = randn(2, 3, 24, 40)
    with torch.no_grad():
        encoded, decoded = ours.encode(x), ours(x)
        assert torch.equal(encoded.latents, theirs.encode(x).latents)
        assert encoded.latents is encoded["latents"] is encoded[0]
        assert torch.equal(decoded.sample, theirs(x).sample)
        assert torch.equal(ours(x, return_dict=False)[0], theirs(x, return_dict=False)[0])
        latents = encoded.latents
        scaled = ours.scale_latents(latents)
        assert torch.equal(scaled, theirs.scale_latents(latents))
        assert torch.equal(ours.unscale_latents(scaled), theirs.unscale_latents(scaled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_8_bit_latents_in_half_precision(dtype: torch.dtype) -> None:
    """diffusers fails here: dividing bytes gives float32."""
    network, x = seeded.network(seeded.tiny()).to(dtype), torch.zeros(1, 3, 16, 16, dtype=dtype)
    assert network(x).sample.dtype == dtype


def test_config_has_diffusers_values() -> None:
    config = seeded.tiny()
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert config[key] == (tuple(value) if isinstance(value, list) else value), key
