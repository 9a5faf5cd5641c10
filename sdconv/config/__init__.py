"""The networks' configs as frozen dataclasses, and the facts that no checkpoint contains."""

from sdconv.config.autoencoders import (
    AutoencoderKLConfig,
    AutoencoderKLFlux2Config,
    AutoencoderTinyConfig,
)
from sdconv.config.base import Config
from sdconv.config.unet import UNet2DConditionConfig

__all__ = [
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2Config",
    "AutoencoderTinyConfig",
    "Config",
    "UNet2DConditionConfig",
]
