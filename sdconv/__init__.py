"""sdconv: the convolutional networks of Stable Diffusion, opened from any checkpoint, offline."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdconv.backends import backend, provide
from sdconv.errors import (
    CheckpointError,
    InputError,
    SdconvError,
    SdconvWarning,
    UnknownNetworkError,
    WeightsMismatchError,
)

if TYPE_CHECKING:
    from sdconv.checkpoint.identify.infer import infer
    from sdconv.checkpoint.io.header import read_header
    from sdconv.checkpoint.save import save
    from sdconv.config import (
        AutoencoderKLConfig,
        AutoencoderKLFlux2Config,
        AutoencoderTinyConfig,
        UNet2DConditionConfig,
    )
    from sdconv.features import features
    from sdconv.features.capture import capture, run_until
    from sdconv.features.editing import edit
    from sdconv.features.maps import open_maps
    from sdconv.hub.download import fetch
    from sdconv.integrations.patch import apply_patch, remove_patch
    from sdconv.loading import load
    from sdconv.lora.bake import bake_lora
    from sdconv.lora.extract import extract_lora
    from sdconv.lora.merge import merge_lora, unmerge_lora
    from sdconv.models.seamless import seamless
    from sdconv.models.tiny import AutoencoderTiny
    from sdconv.models.unet import UNet2DConditionModel
    from sdconv.models.vae import AutoencoderKL, AutoencoderKLFlux2

__version__ = "0.1.0"

# Where each name is found on first use, so that `import sdconv` costs nothing.
_HOME = {
    "AutoencoderKL": "sdconv.models.vae",
    "AutoencoderKLConfig": "sdconv.config",
    "AutoencoderKLFlux2": "sdconv.models.vae",
    "AutoencoderKLFlux2Config": "sdconv.config",
    "AutoencoderTiny": "sdconv.models.tiny",
    "AutoencoderTinyConfig": "sdconv.config",
    "UNet2DConditionConfig": "sdconv.config",
    "UNet2DConditionModel": "sdconv.models.unet",
    "apply_patch": "sdconv.integrations.patch",
    "bake_lora": "sdconv.lora.bake",
    "capture": "sdconv.features.capture",
    "edit": "sdconv.features.editing",
    "extract_lora": "sdconv.lora.extract",
    "features": "sdconv.features",
    "fetch": "sdconv.hub.download",
    "infer": "sdconv.checkpoint.identify.infer",
    "load": "sdconv.loading",
    "merge_lora": "sdconv.lora.merge",
    "open_maps": "sdconv.features.maps",
    "read_header": "sdconv.checkpoint.io.header",
    "remove_patch": "sdconv.integrations.patch",
    "run_until": "sdconv.features.capture",
    "save": "sdconv.checkpoint.save",
    "seamless": "sdconv.models.seamless",
    "unmerge_lora": "sdconv.lora.merge",
}

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "CheckpointError",
    "InputError",
    "SdconvError",
    "SdconvWarning",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
    "UnknownNetworkError",
    "WeightsMismatchError",
    "apply_patch",
    "backend",
    "bake_lora",
    "capture",
    "edit",
    "extract_lora",
    "features",
    "fetch",
    "infer",
    "load",
    "merge_lora",
    "open_maps",
    "read_header",
    "remove_patch",
    "run_until",
    "save",
    "seamless",
    "unmerge_lora",
]


provide("fast", lambda: import_module("sdconv.fast"))
provide("diffusers", lambda: import_module("sdconv.integrations.diffusers"))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdconv' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
