"""Small autoencoders of every kind, with weights drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any

import diffusers
import torch
from torch import Tensor

from sdconv import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderKLFlux2,
    AutoencoderKLFlux2Config,
    AutoencoderTiny,
    AutoencoderTinyConfig,
)
from sdconv.config import Config
from sdconv.models.base import Autoencoder


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights about as large as trained ones, drawn in alphabetical order of the names."""
    random = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name in sorted(shapes):
        noise = torch.randn(shapes[name], generator=random)
        if noise.ndim > 1:
            drawn[name] = noise / math.sqrt(math.prod(noise.shape[1:]))
        elif name.endswith("num_batches_tracked"):
            drawn[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            drawn[name] = 1 + noise.abs()
        else:
            drawn[name] = name.endswith("weight") + 0.1 * noise
    return drawn


def tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """A network's state dict by diffusers' names; its tensors are cached, so do not change them."""
    return dict(_tensors(config, seed))


@cache
def _tensors(config: Config, seed: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = BUILD[config.class_name](config).state_dict()
    return weights({name: tuple(tensor.shape) for name, tensor in state.items()}, seed)


def network(config: Config, seed: int = 0) -> Autoencoder:
    """A network with the weights of ``tensors``, in eval mode."""
    with torch.device("meta"):
        built = BUILD[config.class_name](config)
    # copies: a test may change them in place
    own = {name: tensor.clone() for name, tensor in tensors(config, seed).items()}
    built.load_state_dict(own, assign=True)
    return built.eval()


def kl(channels: tuple[int, ...], latent: int, quant: bool, **fields: Any) -> AutoencoderKLConfig:
    """A VAE's config, with diffusers' defaults for other fields."""
    given = {"use_quant_conv": quant, "use_post_quant_conv": quant, "layers_per_block": 2}
    given |= {"block_out_channels": channels, "latent_channels": latent} | fields
    return AutoencoderKLConfig(**{**AutoencoderKLConfig.assumed, **given})


def flux2(channels: tuple[int, ...], **fields: Any) -> AutoencoderKLFlux2Config:
    """The config of a VAE like FLUX.2's."""
    given = {"block_out_channels": channels} | fields
    return AutoencoderKLFlux2Config(**{**AutoencoderKLFlux2Config.assumed, **given})


def tiny(**fields: Any) -> AutoencoderTinyConfig:
    """A tiny autoencoder's config, with TAESD's values for other fields."""
    return AutoencoderTinyConfig(**{**AutoencoderTinyConfig.assumed, **fields})


BUILD: Mapping[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLFlux2": AutoencoderKLFlux2,
    "AutoencoderTiny": AutoencoderTiny,
}
SMALL_KL = kl((32, 64), 4, True, layers_per_block=1)
SMALL_FLUX2 = flux2((32, 64), layers_per_block=1)
SMALL_TINY = tiny(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)

# one of each kind that diffusers can build too
WITH_PEER: dict[str, Config] = {
    "sd1": kl((32, 32, 64, 64), 4, True),
    "sd3": kl((32, 64), 16, False),
    "three levels": kl((32, 32, 96), 4, True, layers_per_block=1),
    "no attention": kl((32, 32), 4, True, layers_per_block=1, mid_block_add_attention=False),
    "flux2": flux2((32, 32, 64, 64)),
    "taesd": tiny(),
    "taesd, 16 channels": tiny(latent_channels=16),
}
if "decoder_block_out_channels" in signature(diffusers.AutoencoderKLFlux2).parameters:
    WITH_PEER["flux2 with a small decoder"] = flux2(  # since diffusers 0.38
        (32, 64), layers_per_block=1, decoder_block_out_channels=(32, 32)
    )
# one of each kind that diffusers cannot build
POOLED = tiny(latent_channels=32, use_midblock_gn=True)
SANA = tiny(
    latent_channels=32,
    encoder_stem_channels=(32, 64),
    decoder_block_out_channels=(256, 128, 64, 64, 64, 64),
    num_decoder_blocks=(3, 3, 3, 3, 3, 1),
)
WITHOUT_PEER: Mapping[str, Config] = {"taef2": POOLED, "taesana": SANA}
