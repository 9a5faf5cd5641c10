"""``sdconv.load``, and the table from a config's class to its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch

from sdconv.backends import check_backend, set_backend
from sdconv.checkpoint.assemble import assemble
from sdconv.checkpoint.open import Weights
from sdconv.config import Config
from sdconv.models.base import Autoencoder, Network
from sdconv.models.tiny import AutoencoderTiny
from sdconv.models.unet import UNet2DConditionModel
from sdconv.models.vae import AutoencoderKL, AutoencoderKLFlux2

_NETWORKS: Mapping[str, type[Network]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLFlux2": AutoencoderKLFlux2,
    "AutoencoderTiny": AutoencoderTiny,
    "UNet2DConditionModel": UNet2DConditionModel,
}


def build(config: Config) -> Network:
    """Builds the network for a config, with torch's random weights; a U-Net's imports diffusers."""
    return _NETWORKS[config.class_name].from_config(config)


@overload
def load(
    path: Weights,
    component: Literal["vae"],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
) -> Autoencoder: ...
@overload
def load(
    path: Weights,
    component: Literal["unet"],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
) -> UNet2DConditionModel: ...
@overload
def load(
    path: Weights,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
) -> Network: ...
def load(
    path: Weights,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
) -> Network:
    """Opens a network from a checkpoint, in eval mode; nothing is downloaded.

    On the CPU, in the file's own dtype, safetensors weights are memory-mapped: nothing is read
    until it is used. Otherwise each tensor is read once, straight to the device and dtype.

    Args:
        path: a ``.safetensors``, ``.ckpt``, ``.pth`` or ``.bin`` file in diffusers' or the original
            layout; a folder of one component, or of a whole pipeline; several files of one network
            (shards, or a tiny autoencoder's two halves in any order); or a state dict, whose
            tensors are shared, not copied.
        component: ``"vae"`` or ``"unet"``; None for the only one there is.
        dtype: a floating-point dtype; None keeps the file's. A network computes in one dtype, so
            the widest is taken of a file with several, and one-byte floats become float32.
        device: where the weights go.
        family: the family, if shapes leave it open (``"sd1"``, ``"sdxl"``, ``"sd3"``,
            ``"flux1"``, ...).
        backend: the network's own backend, ``"reference"`` or ``"fast"``; see
            ``sdconv.backend``.
        ema: load the running averages of the weights that an original checkpoint may also hold
            (``model_ema.*``), instead of the weights.

    Returns:
        ``AutoencoderKL``, ``AutoencoderKLFlux2``, ``AutoencoderTiny`` or ``UNet2DConditionModel``;
        the last with diffusers' transformers in its slots, for which diffusers is imported.

    Raises:
        CheckpointError: the path cannot be read as weights; ``MissingFileError`` if it does not
            exist.
        UnknownNetworkError: no network that sdconv knows, several, or not the component asked for.
        WeightsMismatchError: a tensor is missing, unexpected or of the wrong shape.
        InputError: an argument has a value that is not allowed.

    Warns:
        SdconvWarning: the family is open, and one was chosen.
    """
    check_backend(backend)
    network = assemble(
        path, build, component=component, dtype=dtype, device=device, family=family, ema=ema
    )
    set_backend(network, backend)
    return network
