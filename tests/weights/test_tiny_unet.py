"""The small trained U-Net that ships: its size, its config, and that it predicts noise in latents
of the tiny VAE."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from helpers.paths import ROOT
from torch import Tensor

import sdconv
from scripts.train import denoise, measure_tiny_unet

MODEL = ROOT / "weights" / "tiny-unet.safetensors"


@pytest.fixture(scope="module")
def scripts() -> dict[str, Any]:
    """The definitions in ``scripts.train.measure_tiny_unet`` and ``scripts.train.denoise``."""
    return vars(measure_tiny_unet) | vars(denoise)


@pytest.fixture(scope="module")
def unet() -> sdconv.UNet2DConditionModel:
    return sdconv.load(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(scripts: dict[str, Any]) -> Tensor:
    """Nine crops of the portrait, which is not in the training data."""
    vae = sdconv.load(ROOT / "weights" / "tiny-vae.safetensors", dtype=torch.float32)
    return scripts["held_out_latents"](vae, 64)


def test_the_file_is_small() -> None:
    assert MODEL.stat().st_size <= 8_000_000


def test_the_file_states_its_own_config() -> None:
    model = sdconv.load(MODEL)  # without a warning: the file names the family
    assert isinstance(model, sdconv.UNet2DConditionModel)
    assert model.dtype == torch.float16
    assert (model.config.in_channels, model.config.out_channels) == (4, 4)
    assert any(model.config.down_depths) and model.config.mid_depth


def test_it_predicts_noise_in_held_out_crops(
    scripts: dict[str, Any], unet: sdconv.UNet2DConditionModel, latents: Tensor
) -> None:
    found = scripts["measure"](unet, latents, scripts["evenly"](20), seed=0)
    assert latents.shape == (9, 4, 16, 16)
    assert found.ratio <= 0.75
    # the linear prediction agrees with theory for latents of this variance
    share = scripts["signal_shares"]()[found.timesteps]
    power = latents.square().mean()
    expected = share * power / (share * power + 1 - share)
    assert (found.linear - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "times"),
    [
        ("another timestep", 1.2),
        pytest.param("shuffled weights", 2, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_network_predicts_worse(
    change: str,
    times: float,
    scripts: dict[str, Any],
    unet: sdconv.UNet2DConditionModel,
    latents: Tensor,
) -> None:
    other = copy.deepcopy(unet)
    if change == "another timestep":
        other.time_proj.register_forward_pre_hook(lambda _, given: (999 - given[0],))
    else:
        generator = torch.Generator().manual_seed(0)
        for weight in other.parameters():
            order = torch.randperm(weight.numel(), generator=generator)
            weight.data = weight.data.flatten()[order].view_as(weight)
    intact, damaged = (
        scripts["measure"](network, latents, scripts["evenly"](10), seed=0)
        for network in (unet, other)
    )
    assert damaged.ratio > times * intact.ratio


def test_the_schedule_is_stable_diffusions(scripts: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    torch.testing.assert_close(scripts["signal_shares"](), scheduler.alphas_cumprod)


def test_denoised_latents_are_smooth_and_of_plausible_deviation(
    scripts: dict[str, Any], unet: sdconv.UNet2DConditionModel
) -> None:
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = scripts["denoised"](unet, noise, 8)
    assert latents.isfinite().all()
    assert 0.3 < latents.std() < 2

    # smoother than noise, like the latents of an image
    def roughness(x: Tensor) -> Tensor:
        return x.diff(dim=-1).square().mean() / x.var()

    assert roughness(latents) < 0.7 * roughness(noise)
