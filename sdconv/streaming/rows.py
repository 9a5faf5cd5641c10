"""Streams a tiny autoencoder: strips of rows flow through all of its layers at once.

Without normalisation and attention, a row of the output depends on a few dozen rows of the input.
Each convolution keeps the input rows that its next strip needs too, so that no row is computed
twice, and no feature map exists as a whole.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconv.convolution.geometry import output_size
from sdconv.errors import InputError
from sdconv.models.padding import pad, padding_modes
from sdconv.models.tiny import AutoencoderTiny, DecoderTiny, EncoderTiny, PooledTinyBlock, TinyBlock
from sdconv.sizes import format_bytes
from sdconv.streaming.layers import AMPLE_WORKSPACE
from sdconv.streaming.planner import KERNEL_OVERHEAD
from sdconv.streaming.steps import Direction, check_modules, is_plain_conv

# Tensors (1, C, rows, W), from the top of a feature map to its bottom.
Strips = Iterator[Tensor]

# For fewer rows at a time, torch has other kernels, which round differently.
LEAST_ROWS = 8

_LAYERS = (
    *(nn.Conv2d, nn.ReLU, nn.Upsample, nn.Sequential, nn.GroupNorm),
    *(EncoderTiny, DecoderTiny, TinyBlock, PooledTinyBlock),
)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """How a batch goes through half of a tiny autoencoder, one image after the other.

    Attributes:
        half: the encoder or the decoder.
        shape: of the result, ``(B, C, H, W)``.
        rows: of the input in a strip.
        strips: the number of strips for one image.
        multiplies: multiply-accumulates for all images.
        peak: most bytes of memory in use at once, with the result, without weights and input.
        least: the lowest limit that can be met, in bytes.
    """

    half: EncoderTiny | DecoderTiny
    shape: tuple[int, int, int, int]
    rows: int
    strips: int
    multiplies: int
    peak: int
    least: int


def plan_rows(
    network: AutoencoderTiny,
    direction: Direction,
    batch: int,
    height: int,
    width: int,
    *,
    limit: int | None,
) -> RowPlan:
    """Plans strips as high as the limit allows, up to where they get no faster.

    Args:
        network: with the half that is asked for; it may be on the meta device.
        direction: which half.
        batch: number of images.
        height: rows of the input.
        width: columns of the input.
        limit: bytes of memory, without weights and input; None for no limit.

    Raises:
        InputError: a module has a hook, or is not the network's own; the limit cannot be met, and
            the error states the lowest one that can.
    """
    half = network.encoder if direction == "encode" else network.decoder
    assert half is not None  # the network has checked it
    check_modules({f"{direction}r": half}, _LAYERS)
    # strips of whole rows of the latents
    unit = network.downscale if direction == "encode" else 1
    stages = list(_stages(half.layers, (height, width)))
    last = stages[-1]
    shape = (batch, last.conv.out_channels, *last.output_size)
    result = batch * last.output_bytes + KERNEL_OVERHEAD

    def memory(rows: int) -> int:
        return result + _memory(stages, rows / height)

    heights = range(unit, -(-height // unit) * unit + 1, unit)
    least = memory(heights[0])
    if limit is not None and least > limit:
        raise InputError(
            "the memory limit cannot be met",
            where="memory_limit",
            expected=f"at least {format_bytes(least)}",
            got=format_bytes(limit),
        )
    ample = least + AMPLE_WORKSPACE if limit is None else min(limit, least + AMPLE_WORKSPACE)
    rows = heights[bisect_right(heights, ample, key=memory) - 1]
    return RowPlan(
        half=half,
        shape=shape,
        rows=rows,
        strips=-(-height // rows),
        multiplies=batch * sum(stage.multiplies for stage in stages),
        peak=memory(rows),
        least=least,
    )


def run_rows(plan: RowPlan, x: Tensor, out: Tensor, on_rows: Callable[[int], object]) -> None:
    """Runs a batch through a plan, one image after the other.

    Args:
        plan: for an input of this size.
        x: ``(B, C, H, W)``.
        out: of the plan's shape; filled.
        on_rows: called with the number of output rows after each strip.
    """
    for image, result in zip(x.unsqueeze(1), out.unsqueeze(1), strict=True):
        done = 0
        for rows in _stream(
            plan.half.layers, map(plan.half.enter, torch.split(image, plan.rows, 2))
        ):
            count = rows.shape[2]
            result[:, :, done : done + count] = plan.half.leave(rows)
            del rows
            done += count
            on_rows(count)


# --- layers: strips in, strips out


def _stream(layers: Iterable[nn.Module], strips: Strips) -> Strips:
    for layer in layers:
        strips = _layer(layer, strips)
    return strips


def _layer(layer: nn.Module, strips: Strips) -> Strips:
    if isinstance(layer, nn.ReLU | nn.Upsample):
        return map(layer, strips)
    if not _is_local(layer):
        return _whole(layer, strips)
    if isinstance(layer, TinyBlock):
        return _residual(layer, strips)
    return _convolved(cast(nn.Conv2d, layer), strips)


def _is_local(layer: nn.Module) -> bool:
    """Whether a layer's output rows depend on the input rows next to them only: its convolutions
    are 3x3, and above and below the feature map there are zeros."""
    if type(layer) is TinyBlock:
        return all(map(_is_local, layer.conv))
    if isinstance(layer, nn.Conv2d):
        (stride, _) = layer.stride
        plain = is_plain_conv(layer, stride=stride, padding=1) and stride in (1, 2)
        return plain and padding_modes(layer)[0] == "zeros"
    return isinstance(layer, nn.ReLU | nn.Upsample)


def _whole(layer: nn.Module, strips: Strips) -> Strips:
    """A layer that reads all rows for each row (one with GroupNorm, or a convolution that wraps
    around): it is called with the whole feature map."""
    parts = list(strips)
    rows = max(part.shape[2] for part in parts)
    whole = torch.cat(parts, 2)
    del parts
    out: Tensor = layer(whole)
    del whole
    yield from torch.split(out, rows, 2)


def _residual(block: TinyBlock, strips: Strips) -> Strips:
    """A block, whose input's rows wait until its convolutions have computed theirs."""
    waiting: Tensor | None = None

    def remembered() -> Strips:
        nonlocal waiting
        for strip in strips:
            count = strip.shape[2]
            waiting = strip if waiting is None else torch.cat([waiting, strip], 2)
            del strip  # it would be kept until the next one comes
            yield waiting[:, :, -count:]

    def joined(rows: Tensor) -> Tensor:
        nonlocal waiting
        assert waiting is not None
        out: Tensor = block.fuse(rows + waiting[:, :, : rows.shape[2]])
        waiting = waiting[:, :, rows.shape[2] :].clone()
        return out

    return map(joined, _stream(block.conv, remembered()))


def _convolved(conv: nn.Conv2d, strips: Strips) -> Strips:
    window = _Window(conv)
    yield from filter(_has_rows, map(window.slide, strips))
    yield from filter(_has_rows, (window.end(),))


class _Window:
    """A 3x3 convolution, and the rows of its input that it needs again."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv, self._stride = conv, conv.stride[0]
        self._kept: Tensor | None = None

    def slide(self, strip: Tensor) -> Tensor:
        """The output's next rows, perhaps none, for the input's next rows."""
        if self._kept is None:
            return self._convolve(F.pad(strip, (0, 0, 1, 0)))
        return self._convolve(torch.cat([self._kept, strip], 2))

    def end(self) -> Tensor:
        """The output's last rows, perhaps none."""
        assert self._kept is not None
        return self._convolve(F.pad(self._kept, (0, 0, 0, 1)))

    def _convolve(self, rows: Tensor) -> Tensor:
        count = (rows.shape[2] - 3) // self._stride + 1
        self._kept = rows[:, :, count * self._stride :].clone()
        if (missing := LEAST_ROWS - count) > 0:
            rows = F.pad(rows, (0, 0, 0, missing * self._stride))
        side = 1
        if (columns := padding_modes(self._conv)[1]) != "zeros":
            rows, side = pad(rows, (1, 1, 0, 0), ("zeros", columns)), 0
        conv = self._conv
        out = F.conv2d(rows, conv.weight, conv.bias, conv.stride, (0, side))
        return out[:, :, :count]


def _has_rows(strip: Tensor) -> bool:
    return strip.shape[2] > 0


# --- memory


@dataclass(frozen=True)
class _Stage:
    """A convolution of a half, and the feature maps that it reads and writes.

    Attributes:
        conv: the convolution.
        input_size, output_size: rows and columns.
        local: whether its layer works on strips.
        in_block: whether its block's input waits for it.
        branch: values per position of the input that the block's pooled branch takes.
    """

    conv: nn.Conv2d
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    local: bool
    in_block: bool = False
    branch: int = 0

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes in a row of the input, and of the output."""
        (_, inside), (_, outside) = self.input_size, self.output_size
        size = self.conv.weight.dtype.itemsize
        channels = self.conv.in_channels, self.conv.out_channels
        return inside * channels[0] * size, outside * channels[1] * size

    @property
    def output_bytes(self) -> int:
        return self.output_size[0] * self.row_bytes[1]

    @property
    def multiplies(self) -> int:
        return math.prod(self.output_size) * self.conv.weight.numel()

    def kept(self) -> int:
        """Bytes that are kept from one strip to the next."""
        if not self.local:  # the output, which later layers read in strips
            return self.output_bytes
        return (2 + 3 * self.in_block) * self.row_bytes[0]

    def workspace(self, share: float) -> int:
        """Bytes needed in addition to these while a strip is computed.

        Args:
            share: of the feature map that is in the strip.
        """
        inside, outside = self.row_bytes
        height, out_height = self.input_size[0], self.output_size[0]
        if not self.local:
            # the strips and the whole, torch's copies of it, and the block's residual
            return height * (inside * 5 + self.branch) + 2 * out_height * outside
        stride = self.conv.stride[0]
        least = LEAST_ROWS * stride
        # a strip and its copy with the rows that were kept, and that in the kernel's order
        rows = min(height, math.ceil(share * height)) + 4
        waiting = 2 * rows if self.in_block else 0
        out_rows = max(LEAST_ROWS, rows // stride)
        return inside * (2 * rows + 2 * max(rows, least) + waiting) + 3 * outside * out_rows


def _stages(layers: nn.Sequential, size: tuple[int, int]) -> Iterator[_Stage]:
    """The convolutions of a half for an input of this size."""
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            size = (2 * size[0], 2 * size[1])
        elif isinstance(layer, TinyBlock):
            branch = 0
            if isinstance(layer, PooledTinyBlock):
                wide = cast(nn.Conv2d, layer.pool[0])
                branch = 4 * wide.out_channels * wide.weight.dtype.itemsize
            for conv in cast(Iterable[nn.Conv2d], layer.conv[::2]):
                yield _Stage(conv, size, size, _is_local(layer), True, branch * size[1])
        elif isinstance(layer, nn.Conv2d):
            before, size = size, _output_size(layer, size)
            yield _Stage(layer, before, size, _is_local(layer))


def _output_size(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (
        output_size(side, dilation * (kernel - 1) + 1, stride, (padding, padding))
        for side, kernel, stride, padding, dilation in zip(
            size,
            conv.kernel_size,
            conv.stride,
            cast(tuple[int, int], conv.padding),
            conv.dilation,
            strict=True,
        )
    )
    return rows, columns


def _memory(stages: Sequence[_Stage], share: float) -> int:
    """The most bytes in use while a strip with this share of the input is computed."""
    return sum(stage.kept() for stage in stages) + max(stage.workspace(share) for stage in stages)
