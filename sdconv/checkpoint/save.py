"""Writes a network to files, in either layout."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from sdconv.checkpoint.identify.detected import is_vae_projection
from sdconv.checkpoint.io.narrow import Caster, check_dtype
from sdconv.checkpoint.io.write import CONFIG_KEY, output_path, write_folder, write_tensors
from sdconv.checkpoint.keys.keymap import KeyMap
from sdconv.checkpoint.keys.unet import keys_of_canonical
from sdconv.checkpoint.keys.vae import FLUX2_RULES, TINY_KEYS, VAE_RULES, vae_keys
from sdconv.config import (
    AutoencoderKLFlux2Config,
    AutoencoderTinyConfig,
    Config,
    UNet2DConditionConfig,
)
from sdconv.config.facts import EDM_STATISTICS
from sdconv.errors import InputError

LAYOUTS = ("diffusers", "original")


def save(
    model: nn.Module,
    path: str | Path,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
    clamp: bool = False,
) -> list[Path]:
    """Writes a network's weights; loading them again gives the same tensors and the same config.

    Args:
        model: one of sdconv's networks.
        path: a single file if the name ends in ``.safetensors``; its metadata then holds the
            config. Any other name is a folder in diffusers' form (``layout="diffusers"`` only). No
            other kind of file is written.
        layout: ``"diffusers"``, or ``"original"`` for the names of the original implementation,
            without a prefix. A tiny autoencoder's original layout is one file with the prefixes
            ``encoder.`` and ``decoder.``.
        dtype: for the floating-point tensors in the file; None keeps the network's.
        clamp: let values beyond the range of ``dtype`` become its largest finite one; they are an
            error otherwise, which names the tensor and the value.

    Returns:
        The files written. A file gets its name only once it is complete.

    Raises:
        InputError: the model is not a network of sdconv's or has no values (on the meta device),
            the layout is unknown, the path is for another kind of file, or it is a folder and the
            layout is the original one.
        CheckpointError: the path cannot be written, or a value is too large for ``dtype``.

    Warns:
        SdconvWarning: values were clamped.
    """
    out, is_file = output_path(path)
    if layout not in LAYOUTS:
        raise InputError(
            "unknown layout", where="layout", expected=" or ".join(LAYOUTS), got=repr(layout)
        )
    # not getattr: torch.compile's wrapper has its network's attributes, but other tensor names
    config = vars(model).get("config") if isinstance(model, nn.Module) else None
    if not isinstance(config, Config):
        raise InputError(
            "not a network of sdconv's",
            where="model",
            expected="what sdconv.load returns",
            got=type(model).__name__,
        )
    tensors = model.state_dict()
    if dtype is not None:
        check_dtype(dtype)
        caster = Caster(type(model).__name__, clamp=clamp)
        tensors = {
            name: tensor
            if tensor.is_meta or not tensor.is_floating_point()
            else caster.cast(tensor, dtype, name, tensor.device)
            for name, tensor in tensors.items()
        }
        caster.warn()
    if not is_file:
        if layout == "original":
            raise InputError(
                "the original layout is a single file",
                where=out,
                expected="a name that ends in .safetensors",
                got=out.name,
            )
        return write_folder(tensors, config, out)
    if layout == "original":
        tensors = original_tensors(tensors, config) | edm_tensors(config)
    # A single entry: safetensors writes several in any order, and the same network should give the
    # same bytes.
    write_tensors(tensors, out, {CONFIG_KEY: json.dumps(config.to_json())})
    return [out]


def original_tensors(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Renames a network's tensors to the original layout's names, with attention projections as 1x1
    convolutions.

    Args:
        tensors: by diffusers' names.
        config: the network's.

    Raises:
        InputError: the layout has no name for one of them.
    """
    keys = _keys(tensors, config)
    result = {}
    for name, tensor in tensors.items():
        original = keys.original(name)
        if original is None or original in result:
            raise InputError(
                "the original layout has no name for a tensor of this network",
                where="layout",
                expected="'diffusers'",
                got=f"'original', for {name}",
            )
        result[original] = tensor[:, :, None, None] if is_vae_projection(name) else tensor
    return result


def edm_tensors(config: Config) -> dict[str, Tensor]:
    """The statistics of the latents as tensors, as single files of Playground v2.5 have them; empty
    if the config has none."""
    values = (config.get("latents_mean"), config.get("latents_std"))
    pairs = zip(EDM_STATISTICS, values, strict=True)
    return {name: torch.tensor(value) for name, value in pairs if value is not None}


def _keys(names: Collection[str], config: Config) -> KeyMap:
    if isinstance(config, AutoencoderTinyConfig):
        return TINY_KEYS
    if isinstance(config, UNet2DConditionConfig):
        return keys_of_canonical(names)
    rules = FLUX2_RULES if isinstance(config, AutoencoderKLFlux2Config) else VAE_RULES
    return vae_keys(len(config["block_out_channels"]), rules)
