"""FreeU (Si et al. 2023, https://arxiv.org/abs/2309.11497), as an edit."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from sdconv.features.editing import Change, Context, edit
from sdconv.features.recipes.unets import unet_of
from sdconv.models.freeu import amplified, low_frequencies_scaled


def freeu(
    target: Any, *, s1: float, s2: float, b1: float, b2: float
) -> AbstractContextManager[None]:
    """More of the backbone and less of the skips' low frequencies, on the two smallest levels of a
    U-Net's way up: bit for bit what diffusers' ``enable_freeu`` does, for which a factor of 0 is no
    factor but means off.

    Args:
        target: a U-Net, or a pipeline that has one.
        s1, s2: factors for the skips' lowest frequencies on the first and the second level.
        b1, b2: likewise for the first half of the map's channels.

    Raises:
        InputError: the target has no U-Net with skips.
    """
    prefix, network = unet_of(target)
    changes: dict[str, Change] = {}
    if getattr(network, "mid_block", None) is None:
        # the first skip is then the map itself, which diffusers amplifies in place
        changes[f"{prefix}up_blocks.0.resnets.0:skip"] = _amplify(b1)
    for level, (s, b) in zip(range(len(network.up_blocks)), ((s1, b1), (s2, b2)), strict=False):  # type: ignore[arg-type]
        resnets = f"{prefix}up_blocks.{level}.resnets.*"
        changes[f"{resnets}:hidden"] = _amplify(b)
        changes[f"{resnets}:skip"] = _soften(s)
    return edit(target, changes)


def _amplify(factor: float) -> Change:
    def change(x: Tensor, _: Context) -> Tensor:
        return amplified(x, factor)

    return change


def _soften(factor: float) -> Change:
    def change(x: Tensor, _: Context) -> Tensor:
        return low_frequencies_scaled(x, factor)

    return change
