"""A VAE and a U-Net to capture from, and a run that a capture must not change."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helpers import seeded, unets
from torch import Tensor, nn

import sdconv
from sdconv.features import Maps

CONFIG = seeded.kl((32, 64), 4, True, layers_per_block=1)
UNET = unets.smallest("SD1")


@cache
def vae() -> Any:
    return seeded.network(CONFIG)


@cache
def unet() -> Any:
    return unets.theirs(UNET)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def hooks_on(network: nn.Module) -> int:
    return sum(
        len(vars(module)[kind])
        for module in network.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
    )


@torch.no_grad()
def run(target: Any, patterns: Any, **options: Any) -> Maps:
    """Run the VAE under capture, which must change no bit and leave no hook."""
    plain, before = vae()(image()).sample, hooks_on(target)
    with sdconv.capture(target, patterns, **options) as maps:
        assert torch.equal(vae()(image()).sample, plain)
    assert hooks_on(target) == before
    return maps


def one(maps: Maps, name: str) -> Tensor:
    value = maps[name]
    assert isinstance(value, Tensor)
    return value


def at(step: float) -> tuple[Any, ...]:
    """The U-Net's arguments at a timestep."""
    sample, _, *rest = unets.inputs(unet().config)
    return sample, step, *rest
