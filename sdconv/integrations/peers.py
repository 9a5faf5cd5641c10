"""diffusers' own networks, filled from a file by diffusers' own code.

Nothing here goes through sdconv's key map, so that an error in that shows as a difference.
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
from sdconv.errors import SdconvError

Tensors = dict[str, Tensor]

VERSION = f"diffusers {diffusers.__version__}"


def peer(
    config: Config, told: Mapping[str, Any] | None, tensors: Tensors, layout: str
) -> tuple[nn.Module, str]:
    """diffusers' network of the class that a config names, on the CPU, in eval mode.

    Args:
        config: sdconv's, for the class's name, and for its fields where ``told`` is None.
        told: the content of a ``config.json`` beside the weights.
        tensors: the network's by the names that the file gives them, without their prefix.
        layout: of those names, ``"diffusers"`` or ``"original"``.

    Returns:
        The network, and how the file's names became diffusers'.

    Raises:
        SdconvError: diffusers has no such network, or cannot take these weights.
    """
    kind = getattr(diffusers, config.class_name, None)
    if kind is None or (isinstance(config, AutoencoderTinyConfig) and not config.in_diffusers):
        raise SdconvError(
            "diffusers has no network like this one, so there is nothing to compare with",
            where=config.class_name,
            expected="a network that diffusers can build too",
            got=f"one that {VERSION} cannot",
            hint="compare with outputs of the author's own code, see tests/models/test_oracles.py",
        )
    fields = dict(told or config.to_json())
    known = inspect.signature(kind.__init__).parameters
    with torch.device("meta"):
        network = kind.from_config({k: v for k, v in fields.items() if k in known})
    convert, how = _CONVERSIONS[config.class_name, layout]
    try:
        state = convert(tensors, network)
    except (KeyError, TypeError) as error:
        raise SdconvError(
            "diffusers cannot convert these names, so there is nothing to compare with",
            where=config.class_name,
            got=f"{type(error).__name__}: {error}",
            hint="write them in diffusers' layout first: sdconv convert",
        ) from error
    for name in network.state_dict():
        if name.endswith("num_batches_tracked"):  # a counter that files may leave out
            state.setdefault(name, torch.tensor(0))
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise SdconvError(
            "diffusers cannot take these weights, so there is nothing to compare with",
            where=config.class_name,
            got=str(error).splitlines()[-1].strip(),
            hint="write them in diffusers' layout first: sdconv convert",
        ) from error
    return network.eval(), how


def _as_named(tensors: Tensors, network: nn.Module) -> Tensors:
    state = dict(tensors)
    # what from_pretrained does with every file: older names of the attention's projections
    network._fix_state_dict_keys_on_load(state)  # type: ignore[operator]
    for name, blank in network.state_dict().items():
        # projections kept as 1x1 convolutions, which diffusers flattens in the original layout only
        if name in state and state[name].ndim == 4 and blank.ndim == 2:
            state[name] = state[name].flatten(1)
    return state


def _from_original(tensors: Tensors, network: nn.Module) -> Tensors:
    return dict(convert_ldm_vae_checkpoint(tensors, network.config))


def _from_flux2(tensors: Tensors, network: nn.Module) -> Tensors:
    halves = re.compile(r"(en|de)coder\.(?=(post_)?quant_conv\.)")
    state = _from_original({halves.sub("", n): t for n, t in tensors.items()}, network)
    return state | {n: t for n, t in tensors.items() if n.startswith("bn.")}


def _unet_from_original(tensors: Tensors, network: nn.Module) -> Tensors:
    # only names that stand where they do in a whole checkpoint are taken
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    state = dict(convert_ldm_unet_checkpoint(whole, network.config))
    guidance = {n: t for n, t in tensors.items() if n.startswith("time_embed.cond_proj.")}
    return state | {n.replace("time_embed.", "time_embedding."): t for n, t in guidance.items()}


def _by_order(tensors: Tensors, network: nn.Module) -> Tensors:
    state: Tensors = {}
    for half in ("encoder.", "decoder."):
        theirs = sorted((n for n in network.state_dict() if half in n), key=_layers)
        files = sorted((n for n in tensors if half in n), key=_layers)
        state |= {a: tensors[b] for a, b in zip(theirs, files, strict=True)}
    return state


def _layers(name: str) -> list[tuple[int, str]]:
    """Sorts ``encoder.layers.10.weight`` after ``encoder.layers.9.conv.0.bias``."""
    parts = re.sub(r".*coder\.(layers\.)?", "", name).split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


_NAMED = (_as_named, "the file's own names")
_CONVERSIONS: Mapping[tuple[str, str], tuple[Callable[[Tensors, nn.Module], Tensors], str]] = {
    ("AutoencoderKL", "diffusers"): _NAMED,
    ("AutoencoderKLFlux2", "diffusers"): _NAMED,
    ("AutoencoderTiny", "diffusers"): _NAMED,
    ("UNet2DConditionModel", "diffusers"): _NAMED,
    ("AutoencoderKL", "original"): (
        _from_original,
        "diffusers' convert_ldm_vae_checkpoint",
    ),
    ("AutoencoderKLFlux2", "original"): (
        _from_flux2,
        "diffusers' convert_ldm_vae_checkpoint, which knows neither quant convolutions inside the"
        " halves nor bn: those keep the last part of their names",
    ),
    ("UNet2DConditionModel", "original"): (
        _unet_from_original,
        "diffusers' convert_ldm_unet_checkpoint, which does not know the embedded guidance: that"
        " keeps the last part of its name",
    ),
    ("AutoencoderTiny", "original"): (
        _by_order,
        "layers paired in the order of their numbers: diffusers converts no such file",
    ),
}
