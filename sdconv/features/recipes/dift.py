"""Diffusion features (DIFT; Tang et al. 2023, https://arxiv.org/abs/2306.03881): a U-Net's feature
maps of a noised image, and the correspondences between two images that they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdconv.config.facts import BETAS, TRAIN_TIMESTEPS
from sdconv.errors import InputError
from sdconv.features.capture import run_until
from sdconv.features.targets import unet_of


@torch.no_grad()
def dift(
    vae: nn.Module,
    unet: nn.Module,
    images: Tensor,
    prompt_embeds: Tensor,
    *,
    timestep: int = 261,
    up_block: int = 1,
    noises: int = 8,
    seed: int = 0,
    alphas_cumprod: Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """The output of one of a U-Net's up blocks for images with noise, averaged over several draws
    of noise. The U-Net runs no further than that block.

    Args:
        vae: sdconv's or diffusers', whose latents the U-Net takes.
        unet: sdconv's or diffusers'.
        images: ``(B, 3, H, W)``, from -1 to 1.
        prompt_embeds: ``encoder_hidden_states``, ``(B or 1, tokens, width)``; the paper embeds a
            sentence that describes the image.
        timestep: the amount of noise: the paper's 261 is for semantics, 0 for details.
        up_block: number of the up block.
        noises, seed: number of draws, and seed of the generator. Noise is drawn on the CPU in
            float32, the same for each image.
        alphas_cumprod: the scheduler's; None for that of Stable Diffusion 1, 2 and XL.
        conditions: other arguments of the U-Net, such as ``added_cond_kwargs``.

    Returns:
        ``(B, C, h, w)`` in float32.

    Raises:
        InputError: not a U-Net; an up block or a timestep that does not exist; ``noises`` below 1.
    """
    _, network = unet_of(unet)
    alphas = _alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
    if not 0 <= timestep < len(alphas):
        raise InputError(
            "not a timestep of the schedule",
            where="timestep",
            expected=f"0 to {len(alphas) - 1}",
            got=timestep,
        )
    if noises < 1:
        raise InputError("too few draws of noise", where="noises", expected="1 or more", got=noises)
    latents = _encode(vae, images)
    prompt_embeds = prompt_embeds.expand(len(latents), -1, -1)
    generator = torch.Generator().manual_seed(seed)
    alpha = alphas[timestep].item()
    name = f"up_blocks.{up_block}"
    features: list[Tensor] = []
    for _ in range(noises):
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents)
        noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
        maps = run_until(network, name, noisy, timestep, prompt_embeds, **conditions)
        features.append(maps.series(name)[0].tensor.float())
    return torch.stack(features).mean(0)


def nearest_cells(features: Tensor, others: Tensor) -> Tensor:
    """For each cell of an image's feature map the most similar cell of another image's, by cosine
    similarity.

    Args:
        features: ``(B, C, H, W)``, as from ``dift``.
        others: ``(B, C, h, w)``.

    Returns:
        ``(B, H, W, 2)``, integers: row and column in ``others``.

    Raises:
        InputError: batch or channels differ, or a tensor is not a feature map.
    """
    if features.ndim != 4 or others.ndim != 4 or features.shape[:2] != others.shape[:2]:
        raise InputError(
            "these feature maps cannot be compared",
            where="others",
            expected=f"({', '.join(map(str, features.shape[:2]))}, h, w)",
            got=tuple(others.shape),
        )
    one, other = (nn.functional.normalize(x.flatten(2), dim=1) for x in (features, others))
    best = (one.mT @ other).argmax(-1).view(len(features), *features.shape[2:])
    width = others.shape[3]
    return torch.stack([best // width, best % width], dim=-1)


def _encode(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents: the mode of the posterior, or a tiny autoencoder's latents."""
    output = vae.encode(images)
    latents = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def _alphas_cumprod() -> Tensor:
    """Stable Diffusion's cumulative product of alphas, in float64: diffusers' scheduler has it in
    float32."""
    roots = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAIN_TIMESTEPS, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0)
