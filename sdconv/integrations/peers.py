"""diffusers' own networks, filled with a file's weights by diffusers' own code.

Nothing here uses sdconv's key maps, so that an error in a key map shows as a difference.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn

from sdconv.config import AutoencoderTinyConfig, Config
from sdconv.devices import on_meta
from sdconv.errors import SdconvError

Tensors = dict[str, Tensor]

VERSION = f"diffusers {diffusers.__version__}"


def peer(
    config: Config, config_json: Mapping[str, Any] | None, tensors: Tensors, layout: str
) -> tuple[nn.Module, str]:
    """diffusers' network of the class that a config names, on the CPU, in eval mode.

    Args:
        config: sdconv's config; it names the class, and gives the fields if ``config_json`` is
            None.
        config_json: the content of the ``config.json`` that came with the weights.
        tensors: the network's tensors by their names in the file, without the prefix.
        layout: the layout of those names, ``"diffusers"`` or ``"original"``.

    Returns:
        The network, and how the file's names were converted to diffusers'.

    Raises:
        SdconvError: diffusers has no such network, or cannot take these weights.
    """
    kind = getattr(diffusers, config.class_name, None)
    if kind is None or (isinstance(config, AutoencoderTinyConfig) and not config.in_diffusers):
        raise SdconvError(
            "diffusers cannot build this network, so there is nothing to compare with",
            where=config.class_name,
            expected="a network that diffusers has too",
            got=f"one that {VERSION} does not have",
            hint="compare with outputs of the author's own code, see tests/models/test_oracles.py",
        )
    fields = dict(config_json or config.to_json())
    parameters = inspect.signature(kind.__init__).parameters
    with on_meta():
        network = kind.from_config({k: v for k, v in fields.items() if k in parameters})
    convert, conversion = _CONVERSIONS[config.class_name, layout]
    try:
        state = convert(tensors, network)
    except (KeyError, TypeError) as error:
        raise SdconvError(
            "diffusers cannot convert these tensor names, so there is nothing to compare with",
            where=config.class_name,
            got=f"{type(error).__name__}: {error}",
            hint="convert the file to diffusers' layout first: sdconv convert",
        ) from error
    for name in network.state_dict():
        if name.endswith("num_batches_tracked"):  # a counter that some files leave out
            state.setdefault(name, torch.tensor(0))
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise SdconvError(
            "diffusers cannot take these weights, so there is nothing to compare with",
            where=config.class_name,
            got=str(error).splitlines()[-1].strip(),
            hint="convert the file to diffusers' layout first: sdconv convert",
        ) from error
    return network.eval(), conversion


def _unchanged(tensors: Tensors, network: Any) -> Tensors:
    state = dict(tensors)
    # as from_pretrained does with every file: old names of the attention's projections
    network._fix_state_dict_keys_on_load(state)
    for name, parameter in network.state_dict().items():
        # projections stored as 1x1 convolutions, which diffusers flattens in the original layout
        if name in state and state[name].ndim == 4 and parameter.ndim == 2:
            state[name] = state[name].flatten(1)
    return state


def _vae_from_original(tensors: Tensors, network: Any) -> Tensors:
    return dict(convert_ldm_vae_checkpoint(tensors, network.config))


def _flux2_from_original(tensors: Tensors, network: Any) -> Tensors:
    half = re.compile(r"(en|de)coder\.(?=(post_)?quant_conv\.)")
    state = _vae_from_original({half.sub("", n): t for n, t in tensors.items()}, network)
    return state | {n: t for n, t in tensors.items() if n.startswith("bn.")}


def _unet_from_original(tensors: Tensors, network: Any) -> Tensors:
    # diffusers looks for the names of a whole checkpoint
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    state = dict(convert_ldm_unet_checkpoint(whole, network.config))
    guidance = {n: t for n, t in tensors.items() if n.startswith("time_embed.cond_proj.")}
    return state | {n.replace("time_embed.", "time_embedding."): t for n, t in guidance.items()}


def _tiny_from_original(tensors: Tensors, network: Any) -> Tensors:
    state: Tensors = {}
    for half in ("encoder.", "decoder."):
        targets = sorted((n for n in network.state_dict() if half in n), key=_layer_order)
        sources = sorted((n for n in tensors if half in n), key=_layer_order)
        state |= {a: tensors[b] for a, b in zip(targets, sources, strict=True)}
    return state


def _layer_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``encoder.layers.10.weight`` after ``encoder.layers.9.conv.0.bias``."""
    parts = re.sub(r".*coder\.(layers\.)?", "", name).split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


_UNCHANGED = (_unchanged, "the file's own names")
_CONVERSIONS: Mapping[tuple[str, str], tuple[Callable[[Tensors, Any], Tensors], str]] = {
    ("AutoencoderKL", "diffusers"): _UNCHANGED,
    ("AutoencoderKLFlux2", "diffusers"): _UNCHANGED,
    ("AutoencoderTiny", "diffusers"): _UNCHANGED,
    ("UNet2DConditionModel", "diffusers"): _UNCHANGED,
    ("AutoencoderKL", "original"): (
        _vae_from_original,
        "diffusers' convert_ldm_vae_checkpoint",
    ),
    ("AutoencoderKLFlux2", "original"): (
        _flux2_from_original,
        "diffusers' convert_ldm_vae_checkpoint; it handles neither the quant convolutions inside"
        " encoder and decoder nor bn, whose names are kept without the prefix",
    ),
    ("UNet2DConditionModel", "original"): (
        _unet_from_original,
        "diffusers' convert_ldm_unet_checkpoint; it does not handle the guidance embedding, whose"
        " name is kept apart from the first part",
    ),
    ("AutoencoderTiny", "original"): (
        _tiny_from_original,
        "layers paired in numerical order, as diffusers does not convert such files",
    ),
}
