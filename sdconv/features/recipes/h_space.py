"""Directions in the middle of a U-Net (Kwon et al. 2023, https://arxiv.org/abs/2210.10960)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from sdconv.errors import InputError
from sdconv.features.calls import Steps, selection
from sdconv.features.editing import Context, edit
from sdconv.features.recipes.unets import unet_of


def h_space(target: Any, direction: Tensor, *, steps: Steps = None) -> AbstractContextManager[None]:
    """Adds a direction to what the middle block gives; one of zeros changes nothing.

    The paper adds it for only one of the two parts of a DDIM step; here the whole step sees it. A
    direction is, for instance, the difference between two runs' captured ``mid_block``.

    Args:
        target: a U-Net, or a pipeline that has one.
        direction: of the middle block's shape ``(B, C, H, W)``, or of one that spreads to it, such
            as ``(C, H, W)`` and ``(C, 1, 1)``.
        steps: in which calls, as for ``sdconv.capture``.

    Raises:
        InputError: the target has no U-Net with a middle; within the block, the direction does not
            spread to the map's shape.
    """
    prefix, _ = unet_of(target)
    selected, _ = selection(steps)

    def add(x: Tensor, context: Context) -> Tensor:
        return x + _spread(direction, x, context.name) if selected(context.of) else x

    return edit(target, {f"{prefix}mid_block": add})


def _spread(direction: Tensor, x: Tensor, name: str) -> Tensor:
    try:
        return direction.to(x.device, x.dtype).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            "the direction does not fit the middle block's map",
            where=name,
            expected=f"a shape that spreads to {tuple(x.shape)}",
            got=tuple(direction.shape),
        ) from error
