"""The configs of the published networks."""

from __future__ import annotations

from typing import Any

import sdconv
from sdconv.config.unet import CROSS_DOWN, CROSS_UP, DOWN, UP


def kl(latent_channels: int, quant: bool) -> sdconv.AutoencoderKLConfig:
    own: dict[str, Any] = {"use_quant_conv": quant, "use_post_quant_conv": quant}
    own |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    own |= {"latent_channels": latent_channels}
    return sdconv.AutoencoderKLConfig(**{**sdconv.AutoencoderKLConfig.assumed, **own})


def unet(**fields: Any) -> sdconv.UNet2DConditionConfig:
    return sdconv.UNet2DConditionConfig(**{**sdconv.UNet2DConditionConfig.assumed, **fields})


SD15 = unet(sample_size=64, cross_attention_dim=768)
SDXL = unet(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, CROSS_UP, UP),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
FLUX2 = sdconv.AutoencoderKLFlux2Config(**sdconv.AutoencoderKLFlux2Config.assumed)


def tiny(latent_channels: int) -> sdconv.AutoencoderTinyConfig:
    own = {"latent_channels": latent_channels}
    return sdconv.AutoencoderTinyConfig(**{**sdconv.AutoencoderTinyConfig.assumed, **own})


TAESD, TAEF1 = tiny(4), tiny(16)
