"""``sdconv.load``, and the table from a config's class to its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch

from sdconv.backends import check_backend, set_backend
from sdconv.checkpoint.assemble import assemble
from sdconv.checkpoint.io.pickles import weights_key
from sdconv.checkpoint.open import Weights
from sdconv.config import Config
from sdconv.errors import InputError
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
    network: Network = _NETWORKS[config.class_name].from_config(config)
    return network


@overload
def load(
    path: Weights,
    component: Literal["vae"],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
    prefix: str | None = None,
    clamp: bool = False,
    mmap: bool = True,
    key: str | None = None,
    torch_dtype: torch.dtype | None = None,
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
    prefix: str | None = None,
    clamp: bool = False,
    mmap: bool = True,
    key: str | None = None,
    torch_dtype: torch.dtype | None = None,
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
    prefix: str | None = None,
    clamp: bool = False,
    mmap: bool = True,
    key: str | None = None,
    torch_dtype: torch.dtype | None = None,
) -> Network: ...
def load(
    path: Weights,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
    prefix: str | None = None,
    clamp: bool = False,
    mmap: bool = True,
    key: str | None = None,
    torch_dtype: torch.dtype | None = None,
) -> Network:
    """Opens a network from a checkpoint, in eval mode; nothing is downloaded.

    On the CPU, in the file's own dtype, safetensors weights are memory-mapped: nothing is read
    until it is used. Otherwise each tensor is read once, straight to the device and dtype.

    Args:
        path: a ``.safetensors``, ``.ckpt``, ``.pth`` or ``.bin`` file in diffusers' or the original
            layout; a folder of one component, or of a whole pipeline; several files of one network
            (shards, or a tiny autoencoder's two halves in any order); or a state dict, whose
            tensors are shared, not copied. Or a name: a network that ships with sdconv
            (``"tiny-vae"``, ``"tiny-unet"``), or weights that ``sdconv.fetch`` has put into the
            hub's cache (``"taesd"``, ``"owner/name:vae"``).
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
        prefix: that of the network's names in the file, where the file has several copies
            (``"first_stage_model."``); None for the checkpoint's own.
        clamp: let values beyond the range of ``dtype`` become its largest finite one; they are an
            error otherwise, since a weight of 70000 is infinite in float16.
        mmap: False reads every tensor into memory. Do so if the file may change or vanish while the
            network is in use, as on a network drive: a mapped file that is cut short ends the
            process (SIGBUS) when the missing part is used.
        key: which weights of a pickle that holds several, such as ``"params_ema"`` or
            ``"model.state_dict"``.
        torch_dtype: diffusers' name for ``dtype``.

    Returns:
        ``AutoencoderKL``, ``AutoencoderKLFlux2``, ``AutoencoderTiny`` or ``UNet2DConditionModel``;
        the last with diffusers' transformers in its slots, for which diffusers is imported.

    Raises:
        CheckpointError: the path cannot be read as weights, or a value is too large for ``dtype``;
            ``MissingFileError`` if it does not exist.
        UnknownNetworkError: no network that sdconv knows, several, or not the component asked for.
        WeightsMismatchError: a tensor is missing, unexpected or of the wrong shape.
        InputError: an argument has a value that is not allowed.

    Warns:
        SdconvWarning: the family is open, and one was chosen; or values were clamped.
    """
    check_backend(backend)
    if dtype is not None and torch_dtype not in (None, dtype):
        raise InputError(
            "dtype and torch_dtype are the same argument, and differ",
            where="dtype",
            got=f"{dtype} and {torch_dtype}",
        )
    with weights_key(key):
        network = assemble(
            path,
            build,
            component=component,
            dtype=dtype or torch_dtype,
            device=device,
            family=family,
            ema=ema,
            prefix=prefix,
            clamp=clamp,
            mmap=mmap,
        )
    set_backend(network, backend)
    return network
