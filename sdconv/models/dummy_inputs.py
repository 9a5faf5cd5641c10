"""Dummy inputs for a network: standard normal noise in the shapes that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdconv.config import UNet2DConditionConfig
from sdconv.errors import SdconvError
from sdconv.models.base import Autoencoder, Network
from sdconv.models.unet import UNet2DConditionModel

# not square, so that swapped rows and columns show
IMAGE_SIZE, LATENT_SIZE = (96, 128), (24, 32)
# method -> its arguments, some of which may be dictionaries of tensors
Inputs = Mapping[str, tuple[Any, ...]]
# the context length of CLIP's text encoders
_TOKENS = 77
_TIMESTEPS = 1000
# SDXL: original size, crop and target size; its refiner has an aesthetic score instead of the
# target size, and a pooled prompt embedding of 1280 channels
_TIME_IDS, _REFINER_TIME_IDS, _REFINER_POOLED = 6, 5, 1280


class Noise:
    """Draws one tensor after another, each with ``batch`` samples, from one seeded generator."""

    def __init__(self, batch: int, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._batch, self._dtype, self._device = batch, dtype, device
        self._random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """``(batch, *shape)``, standard normal."""
        drawn = torch.randn(self._batch, *shape, generator=self._random)
        return drawn.to(self._device, self._dtype)

    def below(self, end: int, *shape: int) -> Tensor:
        """``(batch, *shape)`` integers from 0 to ``end - 1``."""
        drawn = torch.randint(end, (self._batch, *shape), generator=self._random)
        return drawn.to(self._device)

    def sizes(self, count: int) -> Tensor:
        """``(batch, count)`` numbers of pixels."""
        return self.below(1024, count).to(self._dtype)


def inputs_for(network: Network, size: tuple[int, int] | None, noise: Noise) -> Inputs:
    """The methods of a network to call, with their arguments by position.

    Args:
        network: an autoencoder or a U-Net.
        size: rows and columns of an autoencoder's image or of a U-Net's latents; None for
            ``IMAGE_SIZE`` or ``LATENT_SIZE``.
        noise: draws the tensors.

    Raises:
        SdconvError: a U-Net's added embedding is too narrow for the sizes that its config lists.
    """
    match network:
        case Autoencoder():
            return _autoencoder(network, size or IMAGE_SIZE, noise)
        case UNet2DConditionModel():
            return {"forward": _unet(network.config, size or LATENT_SIZE, noise)}
    raise TypeError(type(network).__name__)


def _autoencoder(network: Autoencoder, size: tuple[int, int], noise: Noise) -> Inputs:
    config, (height, width) = network.config, size
    image = noise.normal(config["in_channels"], height, width)
    small = (max(1, side // network.downscale) for side in size)
    return {"encode": (image,), "decode": (noise.normal(config["latent_channels"], *small),)}


def _unet(config: UNet2DConditionConfig, size: tuple[int, int], noise: Noise) -> tuple[object, ...]:
    sample = noise.normal(config.in_channels, *size)
    timestep = noise.below(_TIMESTEPS)
    prompt_embeds = noise.normal(_TOKENS, config.context_dims[0])
    labels = None
    if config.class_embed_type is not None:
        labels = noise.normal(config.projection_class_embeddings_input_dim or 0)
    elif config.num_class_embeds is not None:
        labels = noise.below(config.num_class_embeds)
    guidance = config.time_cond_proj_dim
    return (
        sample,
        timestep,
        prompt_embeds,
        labels,
        None if guidance is None else noise.normal(guidance),
        None,
        None,
        None if config.addition_embed_type is None else _added(config, noise),
    )


def _added(config: UNet2DConditionConfig, noise: Noise) -> dict[str, Tensor]:
    """SDXL's pooled prompt embedding and sizes."""
    width = config.projection_class_embeddings_input_dim or 0
    each = config.addition_time_embed_dim or 1
    refiner = width == _REFINER_POOLED + _REFINER_TIME_IDS * each
    count = _REFINER_TIME_IDS if refiner else min(_TIME_IDS, (width - 1) // each)
    if count < 1:
        raise SdconvError(
            "this U-Net's added embedding has no room for the sizes",
            where=config.class_name,
            expected=f"projection_class_embeddings_input_dim above {each}",
            got=width,
        )
    return {"text_embeds": noise.normal(width - count * each), "time_ids": noise.sizes(count)}
