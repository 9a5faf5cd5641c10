"""The small trained VAE that ships: its size, its config, and how well it reconstructs a held-out
portrait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from PIL import Image

import sdconv
from scripts.train import measure_tiny_vae

MODEL = ROOT / "weights" / "tiny-vae.safetensors"
PHOTO = ROOT / "weights" / "photo.jpg"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The definitions in ``scripts.train.measure_tiny_vae``."""
    return vars(measure_tiny_vae)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def vae() -> sdconv.AutoencoderKL:
    return sdconv.load(MODEL, dtype=torch.float32)


def test_the_file_is_small() -> None:
    assert MODEL.stat().st_size <= 6_000_000


def test_the_file_states_its_own_config() -> None:
    model = sdconv.load(MODEL)  # without a warning: the file names the family
    config = model.config
    assert isinstance(config, sdconv.AutoencoderKLConfig)
    assert model.dtype == torch.float16
    assert model.downscale == 8
    assert config.latent_channels == 4
    assert config.layers_per_block == 2
    assert config.use_quant_conv and config.use_post_quant_conv
    assert config.scaling_factor not in (1.0, config.assumed["scaling_factor"])


def test_it_reconstructs_a_held_out_portrait(
    script: dict[str, Any], vae: sdconv.AutoencoderKL, photo: Image.Image
) -> None:
    assert photo.size == (256, 256)
    found = script["measure"](vae, photo)
    assert found["reconstruction"] >= 22
    # control: without the latents, the decoder cannot reconstruct it
    assert found["latents shuffled in space"] < 14
    assert found["latents all zero"] < 14


def test_scaled_latents_have_about_unit_deviation(
    script: dict[str, Any], vae: sdconv.AutoencoderKL, photo: Image.Image
) -> None:
    with torch.no_grad():
        latents = vae.encode(script["to_tensor"](photo)).latent_dist.mode()
    assert 0.5 < latents.std().item() * vae.config.scaling_factor < 2


# torch's float16 convolutions take minutes on a processor without float16 arithmetic
@pytest.mark.parametrize("side", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_float16_is_accurate_enough(
    script: dict[str, Any], vae: sdconv.AutoencoderKL, photo: Image.Image, side: int
) -> None:
    assert vae.config.force_upcast is False
    half, x = sdconv.load(MODEL), script["to_tensor"](photo)[..., -side:, -side:]
    with torch.no_grad():
        exact = vae(x, return_dict=False)[0]
        rounded = half(x.half(), return_dict=False)[0].float()
    assert rounded.isfinite().all()
    assert (exact - rounded).abs().max() < 0.05


def test_diffusers_gives_the_same_numbers(
    script: dict[str, Any], vae: sdconv.AutoencoderKL, photo: Image.Image, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "vae"
    sdconv.save(sdconv.load(MODEL), folder)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    x = script["to_tensor"](photo)
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
        assert torch.equal(latents, theirs.encode(x).latent_dist.mode())
        assert torch.equal(vae.decode(latents).sample, theirs.decode(latents).sample)
    assert theirs.config.scaling_factor == vae.config.scaling_factor


def test_the_photo_is_the_crop_of_the_script(script: dict[str, Any], photo: Image.Image) -> None:
    pytest.importorskip("matplotlib")
    crop = np.array(script["held_out"]())
    assert script["psnr"](np.array(photo), crop) > 35  # JPEG is lossy
