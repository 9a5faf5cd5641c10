"""Each convolution by the method that serves its shape best, and directly where that fails."""

from __future__ import annotations

import torch
from torch import Tensor

from sdconv.fast.cpu import conv as fused
from sdconv.fast.cpu import packed
from sdconv.fast.cpu.conv import After, NotFiniteError
from sdconv.fast.cpu.cost_model import Choice, choose
from sdconv.fast.cpu.group_stats import Norm
from sdconv.fast.cpu.weight_cache import prepared
from sdconv.fast.cpu.winograd import DOUBLED, PLAIN


def choice_for(x: Tensor, weight: Tensor, normalised: bool = False) -> Choice:
    """The method for a 3x3 convolution of ``x``, and why."""
    batch, channels, height, width = x.shape
    makes = {"winograd": fused.WINOGRAD, "packed": fused.gathered(torch.float32)}
    size = sizes(channels, len(weight))
    rooms = (name for name, make in makes.items() if prepared.has_room(weight, make, size[name]))
    return choose(batch, channels, len(weight), height, width, tuple(rooms), normalised)


def sizes(channels: int, out_channels: int) -> dict[str, int]:
    """Bytes of what each method prepares of a weight; "doubling" is a doubling's."""
    pair = 4 * channels * out_channels
    return {"winograd": PLAIN.places * pair, "packed": 9 * pair, "doubling": DOUBLED.places * pair}


def convolution(
    x: Tensor,
    weight: Tensor,
    norm: Norm | None,
    after: After,
    *,
    groups: int,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution with what stands round it; see `sdconv.fast.cpu.conv.winograd_convolution`.

    Raises:
        NotFiniteError: the output is not finite, and ``x`` was spoilt by writing ``in_place``.
    """
    method = choice_for(x, weight, norm is not None).method
    if method == "packed":
        out, found = _with_moments(packed.convolution(x, weight, norm, after), groups)
        # a weight that is not finite makes NaN of the zeros round the map, which torch never reads
        if found.isfinite().all():
            return out, found
    if method == "winograd":
        try:
            return fused.winograd_convolution(
                x, weight, norm, after, groups=groups, in_place=in_place
            )
        except NotFiniteError:
            if in_place:
                raise
    return _with_moments(fused.direct(x, weight, norm, after), groups)


def doubled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int
) -> tuple[Tensor, Tensor]:
    """Nearest doubling and a 3x3 convolution: ``(B, C, H, W)`` to ``(B, O, 2H, 2W)``, and its
    moments."""
    size = sizes(x.shape[1], len(weight))["doubling"]
    if prepared.has_room(weight, fused.DOUBLING, size):
        try:
            return fused.winograd_convolution(
                x, weight, None, After(bias), scheme=DOUBLED, groups=groups
            )
        except NotFiniteError:
            pass
    return _with_moments(fused.direct_doubled(x, weight, bias), groups)


def _with_moments(out: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    out = out.contiguous(memory_format=torch.channels_last)
    return out, fused.moments(out, groups)
