"""Latents: raw, and as diffusion models use them (`scales`); and in files (`files`)."""

from sdconv.latents.files import (
    ALPHA,
    IMAGE_KEY,
    KEY,
    SCALE_KEY,
    SCALED_KEY,
    StoredLatents,
    read_latents,
    read_stored,
    write_latents,
)
from sdconv.latents.scales import (
    LatentScale,
    check_scaled,
    encode,
    image_multiple,
    scale,
    scale_log_variance,
    unscale,
)

__all__ = [
    "ALPHA",
    "IMAGE_KEY",
    "KEY",
    "SCALED_KEY",
    "SCALE_KEY",
    "LatentScale",
    "StoredLatents",
    "check_scaled",
    "encode",
    "image_multiple",
    "read_latents",
    "read_stored",
    "scale",
    "scale_log_variance",
    "unscale",
    "write_latents",
]
