"""h-space (Kwon et al. 2023, https://arxiv.org/abs/2210.10960): editing directions in the output of
a U-Net's mid block."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from sdconv.errors import InputError
from sdconv.features.editing import Context, edit
from sdconv.features.selection import Steps, select_calls
from sdconv.features.targets import unet_of


def h_space(target: Any, direction: Tensor, *, steps: Steps = None) -> AbstractContextManager[None]:
    """Add a direction to the output of the mid block; a direction of zeros changes nothing.

    The paper adds it to only one of the two terms of a DDIM step; here it affects the whole step.
    A direction is, for instance, the difference between the captured ``mid_block`` of two runs.

    Args:
        target: a U-Net, or a pipeline that has one.
        direction: of the mid block's shape ``(B, C, H, W)``, or one that broadcasts to it, such as
            ``(C, H, W)`` and ``(C, 1, 1)``.
        steps: the calls to edit, as for ``sdconv.capture``.

    Raises:
        InputError: the target has no U-Net with a mid block; inside the block, the direction does
            not broadcast to the feature map's shape.
    """
    prefix, _ = unet_of(target)
    selected, _ = select_calls(steps)

    def add(x: Tensor, context: Context) -> Tensor:
        return x + _broadcast(direction, x, context.name) if selected(context.network_call) else x

    return edit(target, {f"{prefix}mid_block": add})


def _broadcast(direction: Tensor, x: Tensor, name: str) -> Tensor:
    try:
        return direction.to(x.device, x.dtype).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            "the direction does not fit the mid block's feature map",
            where=name,
            expected=f"a shape that broadcasts to {tuple(x.shape)}",
            got=tuple(direction.shape),
        ) from error
