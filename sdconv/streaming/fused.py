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
    COMPUTED,
    WINOGRAD_PACK,
    Epilogue,
    NotFiniteError,
    WinogradPass,
    pack_pointwise,
)
from sdconv.fast.cpu.cost_model import SCHEMES, Kind, plan_conv
from sdconv.fast.cpu.tiling import Strip, strip_bytes
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import OUTPUT_TILE, Scheme
from sdconv.streaming.layers import Doubled, Halved, Layer, Same
from sdconv.streaming.moments import Moments
from sdconv.streaming.passes import Ground, Pass

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(weight: Tensor) -> bool:
    """Whether layers with such weights can compute fast: on a CPU (or on the meta device, to be
    counted for one), in a dtype that the fast arithmetic knows."""
    return weight.dtype in _DTYPES and weight.device.type in ("cpu", "meta")


def layer_for(
    kind: Kind, conv: nn.Conv2d, height: int, width: int, *, normalised: bool = False
) -> type[Layer]:
    """The class of layer for the plan of a convolution whose input has this size."""
    sizes = conv.in_channels, conv.out_channels, height, width
    # packed weights are not kept, so that they need no room
    plan = plan_conv(kind, 1, *sizes, normalised, ("winograd",))
    return _LAYERS[plan.kind, plan.method]


class _Tiled(Layer):
    """By F(4x4,3x3); a unit is a row of tiles, four rows of the output."""

    scheme: ClassVar[Scheme]

    def units(self, height: int) -> int:
        return -(-height // self.scheme.step)

    def window(self, first: int, last: int) -> tuple[int, int]:
        return self.scheme.step * first - 1, self.scheme.step * last + 1

    def outputs(self, first: int, last: int) -> tuple[int, int]:
        return OUTPUT_TILE * first, OUTPUT_TILE * last

    def comfort(self, width: int) -> int:
        return self.workspace(0, width) + strip_bytes(self._transformed * COMPUTED.itemsize)

    def workspace(self, units: int, width: int) -> int:
        out_channels, channels = self.module.weight.shape[:2]
        tiles = units * -(-width // self.scheme.step)
        strip = self.scheme.positions * tiles * (channels + out_channels)
        pixels = OUTPUT_TILE**2 * tiles
        if self.shortcut is not None:
            strip += pixels * out_channels
        if self.module.weight.dtype != COMPUTED:  # rows of each map are copied
            added = out_channels if self.shortcut is None else self.shortcut.in_channels
            strip += self.scheme.step**2 * tiles * channels + pixels * (out_channels + added)
        # transformed, and the same before it is packed
        return (2 * self._transformed + strip) * COMPUTED.itemsize

    def remains(self, units: int, width: int) -> int:
        return self.workspace(units, width) - self._transformed * COMPUTED.itemsize

    @property
    def _transformed(self) -> int:
        """Numbers of the weight as it is read."""
        return self.scheme.positions * self.module.weight[:, :, 0, 0].numel()

    def begin(self, ground: Ground, units: int) -> Pass:
        return _Tiles(self, ground)


class Winograd(_Tiled, Same):
    """36 products for 16 outputs."""

    scheme = SCHEMES["conv3x3"]


class DoubledWinograd(_Tiled, Doubled):
    """25 products for 16 outputs of the doubled map, which is never made."""

    scheme = SCHEMES["upsample_conv"]


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


_LAYERS: dict[tuple[Kind, str], type[Layer]] = {
    ("conv3x3", "winograd"): Winograd,
    ("conv3x3", "direct"): Same,
    ("upsample_conv", "winograd"): DoubledWinograd,
    ("downsample_conv", "direct"): HalvedBetweenZeros,
}


class _Tiles:
    def __init__(self, layer: _Tiled, ground: Ground) -> None:
        weight, shortcut, affine = layer.module.weight, layer.shortcut, None
        epilogue = Epilogue(
            layer.module.bias,
            shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
        )
        if layer.norm is not None and ground.moments is not None:
            affine = ground.moments.scale_and_shift(layer.norm)
        self._scheme, (self._height, self._width) = layer.scheme, ground.target.shape[:2]
        self._measured = ground.measured
        self._run = WinogradPass(
            scheme=layer.scheme,
            x=_channels_first(ground.source),
            out=_channels_first(ground.target),
            weight=weight_cache.borrow(weight, WINOGRAD_PACK[layer.scheme]),
            affine=affine,
            silu=layer.activated,
            offsets=epilogue.offsets(1, len(weight))[0],
            residual=None if ground.residual is None else _channels_first(ground.residual),
            shortcut=None
            if shortcut is None
            else weight_cache.borrow(shortcut.weight, pack_pointwise),
            groups=_groups(ground.measured, len(weight)),
            in_place=ground.source is ground.target,
        )

    def strip(self, first: int, last: int) -> None:
        strip = Strip(self._scheme, self._height, self._width, first, last - first)
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
