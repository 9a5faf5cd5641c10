"""U-Nets and pipelines three times: of diffusers' classes, of sdconv's, and with the patch."""

from __future__ import annotations

from typing import Any

from helpers import capturing, pipelines, unets
from torch import nn

import sdconv

KINDS = ["diffusers", "sdconv", "patched"]


def unet(kind: str, config: dict[str, Any]) -> Any:
    theirs = unets.theirs(config)
    if kind == "patched":
        sdconv.apply_patch(theirs)
    return unets.ours(theirs) if kind == "sdconv" else theirs


def pipeline(kind: str, name: str) -> Any:
    """One of ``pipelines.KINDS``."""
    pipe = pipelines.pipeline(name)
    if kind == "sdconv":
        return pipelines.pipeline(name, unet=unets.ours(pipe.unet))
    if kind == "patched":
        sdconv.apply_patch(pipe)
    return pipe


def untouched(network: nn.Module) -> bool:
    """Whether there is neither a hook nor a forward of its own on a network's modules."""
    return not capturing.hooks_on(network) and not any(
        "forward" in vars(module) for module in network.modules()
    )
