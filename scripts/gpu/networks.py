"""The networks of the checks: full size, and the same architectures made small for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdconv
from scripts.bench.parity_table import UNETS, VAES, Case, weights
from scripts.gpu.options import Options
from sdconv.config.unet import CROSS_DOWN, CROSS_UP, DOWN, UP

SHIPPED = "shipped tiny VAE, trained"
SDXL_VAE, FLUX1_VAE, FLUX2_VAE, TAESD = VAES
SD15_UNET, SDXL_UNET = UNETS
FULL: Mapping[str, Case] = {**VAES, **UNETS}

_TWO_LEVELS = {
    "block_out_channels": (64, 128),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "layers_per_block": 1,
}
_SMALLER: Mapping[str, dict[str, Any]] = {
    SDXL_VAE: {"block_out_channels": (32, 64), "layers_per_block": 1},
    FLUX1_VAE: {"block_out_channels": (32, 64), "layers_per_block": 1},
    FLUX2_VAE: {"block_out_channels": (32, 64), "layers_per_block": 1},
    TAESD: {},
    SD15_UNET: _TWO_LEVELS,
    SDXL_UNET: {
        **_TWO_LEVELS,
        "down_block_types": (DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, UP),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (1, 2),
    },
}


def case(name: str, options: Options) -> Case:
    """A network's case, small if the options say so."""
    full = FULL[name]
    if not options.small:
        return full
    return replace(full, config=replace(full.config, **_SMALLER[name]))


def tensors_of(name: str, options: Options) -> dict[str, Tensor] | str:
    """What ``sdconv.load`` opens for a network: seeded weights on the device, in float32 and in the
    original layout; or the path of the file that ships."""
    if name == SHIPPED:
        return str(Path(__file__).resolve().parents[2] / "weights" / "tiny-vae.safetensors")
    return weights(case(name, options), 0, options.device)


def built(name: str, dtype: torch.dtype, options: Options) -> Any:
    """sdconv's network in eval mode on the device."""
    tensors = tensors_of(name, options)
    return sdconv.load(tensors, dtype=dtype, device=options.device, family=family(name))


def empty(name: str, options: Options) -> Any:
    """sdconv's network without weights, for its shapes."""
    with torch.device("meta"):
        return case(name, options).build(case(name, options).config)


def label(name: str) -> str:
    """A network's name in a table."""
    return f"{name} VAE" if name in (SDXL_VAE, FLUX1_VAE, FLUX2_VAE) else name


def family(name: str) -> str | None:
    """A network's family, where its shapes leave it open."""
    return None if name == SHIPPED else FULL[name].family


def call(network: Any, method: str, inputs: tuple[Any, ...]) -> Tensor:
    """What a method computes; of an encoder, the moments of the latents."""
    (out,) = getattr(network, method)(*inputs, return_dict=False)
    moments: Tensor = getattr(out, "parameters", out)
    return moments
