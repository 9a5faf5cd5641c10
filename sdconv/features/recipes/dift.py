"""Diffusion features (DIFT; Tang et al. 2023, https://arxiv.org/abs/2306.03881): what a U-Net sees
in a picture to which noise was added, and which places of two pictures are alike in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdconv.config.facts import BETAS, TRAIN_TIMESTEPS
from sdconv.errors import InputError
from sdconv.features.capture import run_until
from sdconv.features.recipes.unets import unet_of


@torch.no_grad()
def dift(
    vae: nn.Module,
    unet: nn.Module,
    pictures: Tensor,
    text: Tensor,
    *,
    timestep: int = 261,
    up_block: int = 1,
    noises: int = 8,
    seed: int = 0,
    alphas_cumprod: Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """What a U-Net's level on the way up gives for pictures, the mean over several draws of noise.
    The U-Net runs no further than that level.

    Args:
        vae: sdconv's or diffusers', whose latents the U-Net takes.
        unet: sdconv's or diffusers'.
        pictures: ``(B, 3, H, W)``, from -1 to 1.
        text: ``encoder_hidden_states``, ``(B or 1, tokens, width)``; the paper's is of a sentence
            that says what is seen.
        timestep: how much noise: the paper's 261 is for what things are, 0 for their details.
        up_block: which level on the way up.
        noises, seed: how many draws, and of which series. It is drawn on the CPU in float32, the
            same one for each picture.
        alphas_cumprod: the scheduler's; None for that of Stable Diffusion 1, 2 and XL.
        conditions: what else the U-Net takes, such as ``added_cond_kwargs``.

    Returns:
        ``(B, C, h, w)`` in float32.

    Raises:
        InputError: no U-Net or no such level; a timestep that the schedule does not have; no noise.
    """
    _, network = unet_of(unet)
    shares = _signal_shares() if alphas_cumprod is None else alphas_cumprod
    if not 0 <= timestep < len(shares):
        raise InputError(
            "no such timestep", where="timestep", expected=f"0 to {len(shares) - 1}", got=timestep
        )
    if noises < 1:
        raise InputError("no noise to draw", where="noises", expected="1 or more", got=noises)
    latents = _encoded(vae, pictures)
    text = text.expand(len(latents), -1, -1)
    random = torch.Generator().manual_seed(seed)
    share = shares[timestep].item()
    name = f"up_blocks.{up_block}"
    features: list[Tensor] = []
    for _ in range(noises):
        noise = torch.randn(latents.shape[1:], generator=random).to(latents)
        noisy = share**0.5 * latents + (1 - share) ** 0.5 * noise
        maps = run_until(network, name, noisy, timestep, text, **conditions)
        features.append(maps.series(name)[0].tensor.float())
    return torch.stack(features).mean(0)


def nearest_cells(features: Tensor, others: Tensor) -> Tensor:
    """For each place of a picture the place of another one whose features are the most alike, by
    the cosine between them.

    Args:
        features: ``(B, C, H, W)``, such as ``dift`` gives. others: ``(B, C, h, w)``.

    Returns:
        ``(B, H, W, 2)``, whole numbers: rows and columns in ``others``.

    Raises:
        InputError: they differ in batch or channels, or are no maps.
    """
    if features.ndim != 4 or others.ndim != 4 or features.shape[:2] != others.shape[:2]:
        raise InputError(
            "features of two pictures that cannot be compared",
            where="others",
            expected=f"({', '.join(map(str, features.shape[:2]))}, h, w)",
            got=tuple(others.shape),
        )
    one, other = (nn.functional.normalize(x.flatten(2), dim=1) for x in (features, others))
    best = (one.mT @ other).argmax(-1).view(len(features), *features.shape[2:])
    width = others.shape[3]
    return torch.stack([best // width, best % width], dim=-1)


def _encoded(vae: Any, pictures: Tensor) -> Tensor:
    """Latents as a U-Net takes them: the posteriors' modes, or a tiny autoencoder's latents."""
    given = vae.encode(pictures)
    latents = given.latents if hasattr(given, "latents") else given.latent_dist.mode()
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def _signal_shares() -> Tensor:
    """The latents' share of the noisy latents' variance at each timestep."""
    roots = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAIN_TIMESTEPS, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0)
