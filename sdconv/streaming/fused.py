"""The fast backend's convolutions over strips of rows: second to :mod:`sdconv.streaming.layers`.

The arithmetic is :mod:`sdconv.ops.fused`'s. It reads rows where they lie, normalises them as it
does, and writes them with bias and residual, so that there is no window and no strip apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdconv.ops.choice import choose
from sdconv.ops.fused import (
    DOUBLED,
    POINTWISE,
    WINOGRAD,
    After,
    DoubledPass,
    NotFiniteError,
    WinogradPass,
)
from sdconv.ops.prepared import prepared
from sdconv.ops.strips import STRIP_BYTES, Strip
from sdconv.ops.winograd import OUTPUTS, PLACES
from sdconv.streaming.layers import Doubled, Same
from sdconv.streaming.moments import Moments
from sdconv.streaming.passes import Ground, Pass

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# what the arithmetic is in, whatever the maps are in
_COMPUTED = torch.float32


def takes(weight: Tensor) -> bool:
    """Whether layers with such weights can compute fast: on a CPU (or on the meta device, to be
    counted for one), in a dtype that the fast arithmetic knows."""
    return weight.dtype in _DTYPES and weight.device.type in ("cpu", "meta")


def same(conv: nn.Conv2d, height: int, width: int) -> type[Same]:
    """What a 3x3 convolution of a map of this size is best computed by."""
    choice = choose(1, conv.in_channels, conv.out_channels, height, width, ("winograd",))
    return Winograd if choice.method == "winograd" else Same


class Winograd(Same):
    """By F(4x4,3x3); a unit is a row of tiles, four rows of the map."""

    def units(self, height: int) -> int:
        return -(-height // OUTPUTS)

    def window(self, first: int, last: int) -> tuple[int, int]:
        return OUTPUTS * first - 1, OUTPUTS * last + 1

    def outputs(self, first: int, last: int) -> tuple[int, int]:
        return OUTPUTS * first, OUTPUTS * last

    def comfort(self, width: int) -> int:
        return self.workspace(0, width) + STRIP_BYTES

    def workspace(self, units: int, width: int) -> int:
        out_channels, channels = self.module.weight.shape[:2]
        strip = PLACES * units * -(-width // OUTPUTS) * (channels + out_channels)
        pixels = units * OUTPUTS * width
        if self.shortcut is not None:
            strip += pixels * out_channels
        if self.module.weight.dtype != _COMPUTED:  # rows of each map are copied
            added = out_channels if self.shortcut is None else self.shortcut.in_channels
            strip += pixels * (channels + out_channels + added)
        return _bytes(PLACES, self.module.weight, strip)

    def begin(self, ground: Ground, units: int) -> Pass:
        return _Winograd(self, ground)


class SubPixel(Doubled):
    """Nine products for four pixels of the doubled map, which is never made."""

    def comfort(self, width: int) -> int:
        return self.workspace(0, width) + STRIP_BYTES

    def workspace(self, units: int, width: int) -> int:
        out_channels, channels = self.module.weight.shape[:2]
        # differences along each axis and along both; there is one more of them than of pixels
        pixels = (units + 1) * (width + 1) if units else 0
        strip = pixels * (3 * channels + 9 * out_channels)
        if self.module.weight.dtype != _COMPUTED:
            strip += pixels * (channels + 4 * out_channels)
        return _bytes(9, self.module.weight, strip)

    def begin(self, ground: Ground, units: int) -> Pass:
        return _SubPixel(self, ground)


def _bytes(places: int, weight: Tensor, strip: int) -> int:
    """Of a weight transformed to so many matrices, of the same before it is packed, and of a
    strip's numbers."""
    transformed = places * weight.shape[0] * weight.shape[1]
    return (2 * transformed + strip) * _COMPUTED.itemsize


class _Winograd:
    def __init__(self, layer: Winograd, ground: Ground) -> None:
        weight, shortcut, affine = layer.module.weight, layer.shortcut, None
        after = After(
            layer.module.bias,
            shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
        )
        if layer.norm is not None and ground.moments is not None:
            affine = ground.moments.scale_and_shift(layer.norm)
        (kernel,) = prepared.borrow(weight, WINOGRAD)
        self._height, self._width = ground.source.shape[:2]
        self._measured = ground.measured
        self._run = WinogradPass(
            x=_channels_first(ground.source),
            out=_channels_first(ground.target),
            kernel=kernel,
            affine=affine,
            silu=layer.activated,
            offsets=after.offsets(1, len(weight), _COMPUTED)[0],
            residual=None if ground.residual is None else _channels_first(ground.residual),
            shortcut=None if shortcut is None else prepared.borrow(shortcut.weight, POINTWISE)[0],
            groups=_groups(ground.measured, len(weight)),
            in_place=ground.source is ground.target,
        )

    def strip(self, first: int, last: int) -> None:
        strip = Strip(self._height, self._width, first, last - first)
        _measure(self._measured, *self._run.strip(strip))


class _SubPixel:
    def __init__(self, layer: SubPixel, ground: Ground) -> None:
        weight = layer.module.weight
        self._measured = ground.measured
        self._run = DoubledPass(
            x=_channels_first(ground.source),
            out=_channels_first(ground.target),
            kernels=prepared.borrow(weight, DOUBLED),
            offsets=After(layer.module.bias).offsets(1, len(weight), _COMPUTED)[0],
            groups=_groups(ground.measured, len(weight)),
        )

    def strip(self, first: int, last: int) -> None:
        _measure(self._measured, *self._run.strip(first, last))


def _channels_first(map_: Tensor) -> Tensor:
    return map_.permute(2, 0, 1)


def _groups(measured: Moments | None, channels: int) -> int:
    return 1 if measured is None else channels


def _measure(measured: Moments | None, sums: Tensor, counts: Tensor) -> None:
    """Takes in a strip's sums, which are finite if and only if the strip is.

    Raises:
        NotFiniteError: they are not.
    """
    if not sums.isfinite().all():
        raise NotFiniteError
    if measured is not None:
        measured.take(sums, counts)
