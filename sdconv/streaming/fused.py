"""The fast backend's convolutions over strips of rows: second to :mod:`sdconv.streaming.layers`.

The arithmetic is :mod:`sdconv.fast.cpu.conv`'s. It reads rows where they lie, normalises them as it
does, and writes them with bias and residual, so that there is no window and no strip apart.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdconv.fast.cpu.conv import (
    POINTWISE,
    After,
    NotFiniteError,
    WinogradPass,
    transformed,
)
from sdconv.fast.cpu.cost_model import choose
from sdconv.fast.cpu.tiling import Strip, strip_bytes
from sdconv.fast.cpu.weight_cache import prepared
from sdconv.fast.cpu.winograd import DOUBLED, OUTPUTS, PLAIN, Scheme
from sdconv.streaming.layers import Doubled, Halved, Layer, Same
from sdconv.streaming.moments import Moments
from sdconv.streaming.passes import Ground, Pass

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# what the arithmetic is in, whatever the maps are in
_COMPUTED = torch.float32


def takes(weight: Tensor) -> bool:
    """Whether layers with such weights can compute fast: on a CPU (or on the meta device, to be
    counted for one), in a dtype that the fast arithmetic knows."""
    return weight.dtype in _DTYPES and weight.device.type in ("cpu", "meta")


def same(conv: nn.Conv2d, height: int, width: int, *, normalised: bool) -> type[Same]:
    """What a 3x3 convolution of a map of this size is best computed by."""
    sizes = conv.in_channels, conv.out_channels, height, width
    choice = choose(1, *sizes, ("winograd",), normalised)
    return Winograd if choice.method == "winograd" else Same


class _Tiled(Layer):
    """By F(4x4,3x3); a unit is a row of tiles, four rows of the output."""

    scheme: ClassVar[Scheme]

    def units(self, height: int) -> int:
        return -(-height // self.scheme.step)

    def window(self, first: int, last: int) -> tuple[int, int]:
        return self.scheme.step * first - 1, self.scheme.step * last + 1

    def outputs(self, first: int, last: int) -> tuple[int, int]:
        return OUTPUTS * first, OUTPUTS * last

    def comfort(self, width: int) -> int:
        return self.workspace(0, width) + strip_bytes(self._transformed * _COMPUTED.itemsize)

    def workspace(self, units: int, width: int) -> int:
        out_channels, channels = self.module.weight.shape[:2]
        tiles = units * -(-width // self.scheme.step)
        strip = self.scheme.places * tiles * (channels + out_channels)
        pixels = OUTPUTS**2 * tiles
        if self.shortcut is not None:
            strip += pixels * out_channels
        if self.module.weight.dtype != _COMPUTED:  # rows of each map are copied
            added = out_channels if self.shortcut is None else self.shortcut.in_channels
            strip += self.scheme.step**2 * tiles * channels + pixels * (out_channels + added)
        # transformed, and the same before it is packed
        return (2 * self._transformed + strip) * _COMPUTED.itemsize

    def remains(self, units: int, width: int) -> int:
        return self.workspace(units, width) - self._transformed * _COMPUTED.itemsize

    @property
    def _transformed(self) -> int:
        """Numbers of the weight as it is read."""
        return self.scheme.places * self.module.weight[:, :, 0, 0].numel()

    def begin(self, ground: Ground, units: int) -> Pass:
        return _Tiles(self, ground)


class Winograd(_Tiled, Same):
    """36 products for 16 outputs."""

    scheme = PLAIN


class DoubledWinograd(_Tiled, Doubled):
    """25 products for 16 outputs of the doubled map, which is never made."""

    scheme = DOUBLED


class HalvedBetweenZeros(Halved):
    """With two columns of zeros on either side, as :func:`sdconv.fast.blocks.halving` has it."""

    right = 0
    turned = False

    def apply(self, strip: Tensor) -> Tensor:
        height, width = self.output_size(*strip.shape[:2])
        if height == 1:  # for which torch has another kernel, that rounds otherwise
            strip = functional.pad(strip, (0, 0, 0, 0, 0, 2))
        made = self.convolve(strip, stride=2, sides=2)
        return made[:height, 1 : 1 + width].contiguous()

    def scratch(self, rows: int, width: int) -> int:
        # what is made and its part without the zeros; and a strip of one row made longer
        return 2 * super().scratch(rows + 2, width + 2) + self.convolved(5, width)


class _Tiles:
    def __init__(self, layer: _Tiled, ground: Ground) -> None:
        weight, shortcut, affine = layer.module.weight, layer.shortcut, None
        after = After(
            layer.module.bias,
            shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
        )
        if layer.norm is not None and ground.moments is not None:
            affine = ground.moments.scale_and_shift(layer.norm)
        self._height, self._width = ground.target.shape[:2]
        self._measured = ground.measured
        self._run = WinogradPass(
            scheme=layer.scheme,
            x=_channels_first(ground.source),
            out=_channels_first(ground.target),
            kernel=prepared.borrow(weight, transformed(layer.scheme, _COMPUTED)),
            affine=affine,
            silu=layer.activated,
            offsets=after.offsets(1, len(weight), _COMPUTED)[0],
            residual=None if ground.residual is None else _channels_first(ground.residual),
            shortcut=None if shortcut is None else prepared.borrow(shortcut.weight, POINTWISE),
            groups=_groups(ground.measured, len(weight)),
            in_place=ground.source is ground.target,
        )

    def strip(self, first: int, last: int) -> None:
        strip = Strip(self._height, self._width, first, last - first)
        _measure(self._measured, *self._run.strip(strip))


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
