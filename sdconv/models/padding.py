"""Padding of convolutions, separately for rows and columns."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# How rows and columns are padded, by the names of torch's ``padding_mode``.
Modes = tuple[str, str]
ZEROS: Modes = ("zeros", "zeros")


def pad(x: Tensor, sides: tuple[int, int, int, int], modes: Modes) -> Tensor:
    """Pads ``(B, C, H, W)``.

    Args:
        x: the feature map.
        sides: columns on the left and right, rows at the top and bottom.
        modes: how rows and columns are padded: ``zeros``, ``circular``, ``reflect`` or
            ``replicate``.
    """
    left, right, top, bottom = sides
    rows, columns = (_TORCH_MODES.get(mode, mode) for mode in modes)
    if rows == columns:
        return F.pad(x, sides, mode=rows)
    x = F.pad(x, (left, right, 0, 0), mode=columns)
    return F.pad(x, (0, 0, top, bottom), mode=rows)


_TORCH_MODES = {"zeros": "constant"}


def modes_for(axes: str, given: Modes) -> Modes:
    """``given``, but circular along ``axes``: ``x`` along the rows, ``y`` along the columns."""
    rows, columns = given
    return "circular" if "y" in axes else rows, "circular" if "x" in axes else columns


def make_seamless(conv: nn.Conv2d, axes: str) -> None:
    """Lets a convolution pad circularly along ``axes``, and as before along the other axis."""
    own: Any = vars(conv)
    own["seamless_axes"] = axes
    own["_conv_forward"] = MethodType(_conv_forward, conv)


def is_seamless(conv: nn.Conv2d) -> bool:
    """Whether `make_seamless` has changed the convolution."""
    return getattr(vars(conv).get("_conv_forward"), "__func__", None) is _conv_forward


def padding_modes(conv: nn.Conv2d) -> Modes:
    """How a convolution of torch's own, or a seamless one, pads rows and columns."""
    modes = (conv.padding_mode, conv.padding_mode)
    return modes_for(vars(conv)["seamless_axes"], modes) if is_seamless(conv) else modes


def _conv_forward(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Takes the place of torch's method of this name."""
    sides: Any = conv._reversed_padding_repeated_twice
    if not isinstance(conv.padding, str):  # it may have been set since
        rows, columns = conv.padding
        sides = (columns, columns, rows, rows)
    x = pad(x, tuple(sides), padding_modes(conv))
    return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
