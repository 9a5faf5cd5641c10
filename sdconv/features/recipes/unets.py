"""The U-Net that a recipe is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from sdconv.errors import InputError
from sdconv.features.targets import target_of


def unet_of(target: Any) -> tuple[str, nn.Module]:
    """What the names of a U-Net's places begin with, and the U-Net: a bare one, or a pipeline's.

    Raises:
        InputError: there is none.
    """
    found = target_of(target)
    prefix = "" if found.pipeline is None else "unet."
    network = found.networks.get(prefix)
    levels = [getattr(network, f"{way}_blocks", None) for way in ("down", "up")]
    if network is None or not all(isinstance(level, nn.ModuleList) for level in levels):
        raise InputError(
            "this recipe is for a U-Net",
            where="target",
            expected="a U-Net, or a pipeline that has one",
            got=type(target).__name__,
        )
    return prefix, network
