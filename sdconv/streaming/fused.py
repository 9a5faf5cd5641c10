"""Layers that run on strips of rows with the fast backend's convolutions for CPUs.

Those of :mod:`sdconv.fast.cpu.conv` read the source's rows in place, normalise them as
they read, and add bias and residual as they write, so that they need neither a window nor a copy of
the strip. Those of :mod:`sdconv.fast.cpu.amx` take a window of normalised rows, and round their
sums before the residual is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from sdconv.fast.cpu import amx
from sdconv.fast.cpu.conv import (
    COMPUTE_DTYPE,
    WINOGRAD_PACK,
    Epilogue,
    Multiply,
    NotFiniteError,
    WinogradPass,
    by_packed,
    image_conv_rows,
    pack_pointwise,
    uncached_products,
)
from sdconv.fast.cpu.cost_model import plan_conv
from sdconv.fast.cpu.kernels import methods_for, packing_bytes, uncached_bytes
from sdconv.fast.cpu.processor import direct_rate
from sdconv.fast.cpu.tiling import Strip, strip_bytes
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import OUTPUT_TILE, SCHEMES, Kind, Scheme
from sdconv.fast.preconditions import DTYPES, reads_image
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.layers import (
    Conv3x3,
    DownsampleConv,
    StepContext,
    StepRunner,
    StreamLayer,
    UpsampleConv,
)


def can_run(weight: Tensor) -> bool:
    """Whether a layer with this weight can use the fast backend: on a CPU (or on the meta device,
    to plan for one), in a dtype that the backend supports."""
    return weight.dtype in DTYPES and weight.device.type in ("cpu", "meta")


def layer_for(
    kind: Kind, conv: nn.Conv2d, height: int, width: int, *, normalised: bool = False
) -> type[StreamLayer]:
    """The class of layer for the plan of a convolution whose input has this size."""
    if kind == "conv3x3" and not normalised and reads_image(conv):
        return ImageConv3x3
    sizes = conv.in_channels, conv.out_channels, height, width
    # packed weights are not kept, so they need no room
    rate = direct_rate(conv.weight.dtype)
    available = methods_for(conv.weight.dtype)
    plan = plan_conv(kind, 1, *sizes, normalised, available, rate)
    return _LAYERS[plan.kind, plan.method]


class _WinogradLayer(StreamLayer):
    """A convolution by Winograd's F(4x4, 3x3); a unit is a row of tiles: four rows of output."""

    scheme: ClassVar[Scheme]
    checks_finite = True

    def units(self, height: int) -> int:
        return -(-height // self.scheme.step)

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        step, before, tile = self.scheme.step, self.scheme.before, self.scheme.input_tile
        return step * first - before, step * (last - 1) - before + tile

    def output_rows(self, first: int, last: int) -> tuple[int, int]:
        return OUTPUT_TILE * first, OUTPUT_TILE * last

    def ample_workspace(self, width: int) -> int:
        return self.workspace(0, width) + strip_bytes(self._transformed * COMPUTE_DTYPE.itemsize)

    def workspace(self, units: int, width: int) -> int:
        out_channels, channels = self.module.weight.shape[:2]
        tiles = units * -(-width // self.scheme.step)
        strip = self.scheme.positions * tiles * (channels + out_channels)
        pixels = OUTPUT_TILE**2 * tiles
        if self.shortcut is not None:
            strip += pixels * out_channels
            if self.shortcut.weight.dtype != COMPUTE_DTYPE:  # is copied in float32
                strip += pixels * self.shortcut.in_channels
        own = (self._transformed + strip) * COMPUTE_DTYPE.itemsize
        return own + packing_bytes(self.module.weight)

    @property
    def _transformed(self) -> int:
        """Values in the transformed weight."""
        return self.scheme.kernels * self.module.weight[:, :, 0, 0].numel()

    def multiply(self) -> Multiply:
        """The products with the layer's weight."""
        weight = self.module.weight
        packed = weight_cache.borrow(weight, WINOGRAD_PACK[self.scheme])
        return by_packed(packed, self.scheme)

    def make_runner(self, context: StepContext, units: int) -> StepRunner:
        return _WinogradRunner(self, context)


class _UncachedLayer(_WinogradLayer):
    """The same with a weight that is transformed for each strip, a few channels at a time."""

    def multiply(self) -> Multiply:
        return uncached_products(self.module.weight, self.scheme)

    def ample_workspace(self, width: int) -> int:
        packed = super()._transformed * COMPUTE_DTYPE.itemsize
        return self.workspace(0, width) + strip_bytes(packed)

    def workspace(self, units: int, width: int) -> int:
        weight, tiles = self.module.weight, units * -(-width // self.scheme.step)
        # a packed shortcut exists twice until it is packed
        shortcut = 0 if self.shortcut is None else 2 * self.shortcut.weight.numel()
        sums = uncached_bytes(tiles, weight) - packing_bytes(weight)
        return super().workspace(units, width) + shortcut * COMPUTE_DTYPE.itemsize + sums

    @property
    def _transformed(self) -> int:
        return 0  # none is kept


class WinogradConv3x3(_WinogradLayer, Conv3x3):
    """A 3x3 convolution at stride 1: 36 products for 16 outputs."""

    scheme = SCHEMES["conv3x3"]


class WinogradUpsampleConv(_WinogradLayer, UpsampleConv):
    """Nearest x2 upsampling and a 3x3 convolution in one: 25 products for 16 outputs. The upsampled
    feature map never exists."""

    scheme = SCHEMES["upsample_conv"]


class WinogradDownsampleConv(_WinogradLayer, DownsampleConv):
    """A 3x3 convolution with stride 2: 81 products for 16 outputs."""

    scheme = SCHEMES["downsample_conv"]


class UncachedConv3x3(_UncachedLayer, WinogradConv3x3):
    """`WinogradConv3x3` of a small feature map."""


class UncachedUpsampleConv(_UncachedLayer, WinogradUpsampleConv):
    """`WinogradUpsampleConv` of a small feature map."""


class SidePaddedDownsampleConv(DownsampleConv):
    """A strided downsampling convolution that pads two columns on the left and on the right, as
    :func:`sdconv.fast.blocks.downsample` does, and crops the output."""

    right_padding = 0
    channels_first = False

    def apply(self, window: Tensor) -> Tensor:
        height, width = self.output_size(*window.shape[:2])
        if height == 1:  # torch has another kernel for a single row, which rounds differently
            window = functional.pad(window, (0, 0, 0, 0, 0, 2))
        out = self.convolve(window, stride=2, side_padding=2)
        return out[:height, 1 : 1 + width].contiguous()

    def scratch_numel(self, rows: int, width: int) -> int:
        # the output, its cropped copy, and the padded window of a single row
        return 2 * super().scratch_numel(rows + 2, width + 2) + self.conv_input_numel(5, width)


class ImageConv3x3(Conv3x3):
    """A 3x3 convolution of an image, an encoder's first."""

    def apply(self, window: Tensor) -> Tensor:
        conv, (rows, width, _) = self.module, window.shape
        out = window.new_empty(rows - 2, width, self.out_channels)
        padded = functional.pad(window, (0, 0, 1, 1))
        if image_conv_rows(padded, conv.weight, conv.bias, out, 1) is None:
            return self.convolve(window)
        return out

    def workspace(self, units: int, width: int) -> int:
        # the padded window, and its copy in float32
        numbers = self.conv_input_numel(units + 2, width + 2)
        weight = self.module.weight
        copies = numbers * (weight.dtype.itemsize + COMPUTE_DTYPE.itemsize)
        return (
            super().workspace(units, width) + copies + 2 * weight.numel() * COMPUTE_DTYPE.itemsize
        )


@dataclass(frozen=True)
class _AmxLayer(StreamLayer):
    """A convolution of bfloat16 by matrix units.

    ``packed``: the weight, while a runner uses it.
    """

    packed: Tensor | None = None

    kind: ClassVar[Kind]
    channels_first = False

    def make_runner(self, context: StepContext, units: int) -> StepRunner:
        packed = weight_cache.borrow(self.module.weight, amx.PACK[self.kind])
        return StreamLayer.make_runner(replace(self, packed=packed), context, units)

    def apply(self, window: Tensor) -> Tensor:
        assert self.packed is not None, "a runner packs it"
        epilogue = Epilogue(self.module.bias)
        conv = amx.AmxConv(
            self.kind, self.packed, self.out_channels, epilogue.offsets(1, self.out_channels)[0]
        )
        end = window.shape[0] - 1
        height, width = self.output_size(end - 1, window.shape[1])
        out = window.new_empty(height, width, self.out_channels)
        conv.run(window, 1, end, None, out)
        return out

    def scratch_numel(self, rows: int, width: int) -> int:
        # the output only: the kernel reads the window, upsampled or not
        return StreamLayer.scratch_numel(self, rows, width)

    def workspace(self, units: int, width: int) -> int:
        weight = self.module.weight
        own = amx.scratch_bytes(units, width, weight.shape[1])
        return super().workspace(units, width) + own + amx.packing_bytes(self.kind, weight)


class AmxConv3x3(_AmxLayer, Conv3x3):
    """A 3x3 convolution at stride 1 by matrix units."""

    kind = "conv3x3"


class AmxUpsampleConv(_AmxLayer, UpsampleConv):
    """Nearest x2 upsampling and a 3x3 convolution in one, by matrix units."""

    kind = "upsample_conv"


_LAYERS: dict[tuple[Kind, str], type[StreamLayer]] = {
    ("conv3x3", "winograd"): WinogradConv3x3,
    ("conv3x3", "winograd_uncached"): UncachedConv3x3,
    ("conv3x3", "amx"): AmxConv3x3,
    ("conv3x3", "direct"): Conv3x3,
    ("upsample_conv", "winograd"): WinogradUpsampleConv,
    ("upsample_conv", "winograd_uncached"): UncachedUpsampleConv,
    ("upsample_conv", "amx"): AmxUpsampleConv,
    ("upsample_conv", "direct"): UpsampleConv,
    ("downsample_conv", "winograd"): WinogradDownsampleConv,
    ("downsample_conv", "direct"): SidePaddedDownsampleConv,
}


class _WinogradRunner:
    """Runs a layer with the fast backend's convolution, which reads and writes in place."""

    def __init__(self, layer: _WinogradLayer, context: StepContext) -> None:
        weight, shortcut, affine = layer.module.weight, layer.shortcut, None
        epilogue = Epilogue(
            layer.module.bias,
            shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
        )
        if layer.norm is not None and context.source_stats is not None:
            affine = context.source_stats.scale_and_shift(layer.norm)
        self._scheme, (height, self._width) = layer.scheme, context.target.shape[:2]
        self._height = context.whole_height or height
        self._target_stats = context.target_stats
        self._run = WinogradPass(
            scheme=layer.scheme,
            x=_channels_first(context.source),
            out=_channels_first(context.target),
            multiply=layer.multiply(),
            affine=affine,
            silu=layer.silu,
            offsets=epilogue.offsets(1, len(weight))[0],
            residual=None if context.residual is None else _channels_first(context.residual),
            shortcut=None
            if shortcut is None
            else weight_cache.borrow(shortcut.weight, pack_pointwise),
            relu=False,
            groups=_groups(context.target_stats, len(weight)),
            in_place=context.in_place,
            x_row=context.source_row,
            out_row=context.target_row,
        )

    def run_strip(self, first: int, last: int) -> None:
        strip = Strip(self._scheme, self._height, self._width, first, last - first)
        _update(self._target_stats, *self._run.strip(strip))

    def restart(self) -> None:
        self._run.above = None


def _channels_first(rows: Tensor) -> Tensor:
    return rows.permute(2, 0, 1)


def _groups(stats: RunningGroupStats | None, channels: int) -> int:
    return 1 if stats is None else channels


def _update(stats: RunningGroupStats | None, sums: Tensor, counts: Tensor) -> None:
    """Adds a strip's sums to the statistics; they are finite if and only if the strip is.

    Raises:
        NotFiniteError: they are not.
    """
    if not sums.isfinite().all():
        raise NotFiniteError
    if stats is not None:
        stats.update_from_sums(sums, counts)
