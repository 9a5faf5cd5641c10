"""FreeU (Si et al. 2023, https://arxiv.org/abs/2309.11497), as an edit."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn

from sdconv.features.editing import Change, Context, edit
from sdconv.features.targets import unet_of
from sdconv.models.freeu import amplified, low_frequencies_scaled


def freeu(
    target: Any, *, s1: float, s2: float, b1: float, b2: float
) -> AbstractContextManager[None]:
    """Amplify the backbone and attenuate the low frequencies of the skips on the first two levels
    of the up path.

    It is bit for bit diffusers' ``enable_freeu``, which takes a factor of 0 as off.

    Args:
        target: a U-Net, or a pipeline that has one.
        s1, s2: factors for the low frequencies of the skips, on the first and the second level.
        b1, b2: factors for the first half of the backbone's channels, likewise.

    Raises:
        InputError: the target has no U-Net with skips.
    """
    prefix, network = unet_of(target)
    changes: dict[str, Change] = {}
    if getattr(network, "mid_block", None) is None:
        # then the first skip is the backbone's tensor itself, which diffusers amplifies in place
        changes[f"{prefix}up_blocks.0.resnets.0:skip"] = _amplify(b1)
    levels = range(len(cast(nn.ModuleList, network.up_blocks)))
    for level, (s, b) in zip(levels, ((s1, b1), (s2, b2)), strict=False):
        resnets = f"{prefix}up_blocks.{level}.resnets.*"
        changes[f"{resnets}:hidden"] = _amplify(b)
        changes[f"{resnets}:skip"] = _attenuate(s)
    return edit(target, changes)


def _amplify(factor: float) -> Change:
    def change(x: Tensor, _: Context) -> Tensor:
        return amplified(x, factor)

    return change


def _attenuate(factor: float) -> Change:
    def change(x: Tensor, _: Context) -> Tensor:
        return low_frequencies_scaled(x, factor)

    return change
