"""U-Nets and pipelines with diffusers' classes, with sdconv's, and with the patch."""

from __future__ import annotations

from typing import Any

from helpers import capturing, pipelines, unets
from torch import nn

import sdconv

NAMES = ["diffusers", "sdconv", "patched"]


def unet(implementation: str, config: dict[str, Any]) -> Any:
    """A U-Net with seeded weights."""
    theirs = unets.theirs(config)
    if implementation == "patched":
        sdconv.apply_patch(theirs)
    return unets.ours(theirs) if implementation == "sdconv" else theirs


def pipeline(implementation: str, name: str) -> Any:
    """One of the pipelines of ``pipelines.KINDS``."""
    pipe = pipelines.pipeline(name)
    if implementation == "sdconv":
        return pipelines.pipeline(name, unet=unets.ours(pipe.unet))
    if implementation == "patched":
        sdconv.apply_patch(pipe)
    return pipe


def untouched(network: nn.Module) -> bool:
    """Whether none of a network's modules has a hook or an overridden ``forward``."""
    return not capturing.hooks_on(network) and not any(
        "forward" in vars(module) for module in network.modules()
    )
