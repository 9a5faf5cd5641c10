"""Layers that run on strips of rows: which input rows a strip needs, and what it computes.

Everything here is channels-last: a feature map is ``(H, W, C)``, so that a strip of rows is one
contiguous piece of memory or of a file. All convolutions by torch's own kernels go through
:meth:`StreamLayer.convolve`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconv.errors import InputError
from sdconv.models.blocks import AsymmetricDownsample2D, Upsample2D
from sdconv.models.padding import ZEROS, Modes, pad
from sdconv.streaming.arena import mmap_zeros, trim_heap
from sdconv.streaming.group_stats import RunningGroupStats, norm_dtype

# A larger workspace makes no strip faster: measured on 2 cores, where the kernels reach their full
# rate from a few million values on.
AMPLE_WORKSPACE = 64 << 20
# A GPU computes so many values in a millisecond; smaller strips would wait for being launched.
AMPLE_GPU_WORKSPACE = 512 << 20


def prefers_channels_first(weight: Tensor) -> bool:
    """Whether a convolution on a CPU should use torch's channels-first kernel.

    With few channels, the channels-last kernel is faster. With many channels, its rounding error is
    three times as large on processors with AVX-512, because it adds up all products in sequence.
    """
    return weight.shape[1] > 128


@dataclass(frozen=True)
class StepContext:
    """The tensors that a step works on; each feature map is ``(H, W, C)``, on any device.

    Attributes:
        source, target, residual: see ``StreamStep``.
        resident: feature maps that are read in full for every strip.
        source_stats: statistics of the source, if the layer normalises it.
        target_stats: collects those of the target, if the next layer normalises it.
        device: where strips are computed.
        in_place: whether the target overwrites the source.
        source_row: number of the source's first row in the whole feature map, if it is a part.
        target_row: number of the target's and the residual's first row in theirs.
        whole_height: rows of the whole target, if the target is a part.
        has_halo: whether the source has every row that the strips need, those beyond the edges
            included.
    """

    source: Tensor
    target: Tensor
    residual: Tensor | None
    resident: tuple[Tensor, ...]
    source_stats: RunningGroupStats | None
    target_stats: RunningGroupStats | None
    device: torch.device
    in_place: bool = False
    source_row: int = 0
    target_row: int = 0
    whole_height: int | None = None
    has_halo: bool = False


class StepRunner(Protocol):
    """Runs one step, from the top strip to the bottom one."""

    def run_strip(self, first: int, last: int) -> None:
        """Computes units ``first`` up to ``last`` and write them into the target."""

    def restart(self) -> None:
        """Forgets the rows kept for the next strip, so that strips may begin further up again."""


def row_beyond(mode: str, height: int) -> Mapping[int, int]:
    """Which row of a feature map stands for the one above it, number -1, and for the one below it,
    number ``height``; neither in mode ``zeros``."""
    return {
        "zeros": {},
        "circular": {-1: height - 1, height: 0},
        "reflect": {-1: 1, height: height - 2},
        "replicate": {-1: 0, height: height - 1},
    }[mode]


class SlidingWindow:
    """Prepared rows of a feature map, with rows of zeros, or other padding, above and below it.

    Each row is prepared once. Rows that two strips share are carried over from one to the next, so
    that a step may overwrite the feature map that it reads.

    Args:
        source: the feature map, ``(H, W, C)``.
        rows: most rows of one window.
        right_padding: columns of zeros on the right.
        prepare: called with source rows and the slice of the window to write them to.
        device: of the window.
        beyond: see `row_beyond`. These rows are prepared first of all, since a step may overwrite
            them before it needs them.
    """

    def __init__(
        self,
        source: Tensor,
        rows: int,
        right_padding: int,
        prepare: Callable[[Tensor, Tensor], None],
        device: torch.device,
        beyond: Mapping[int, int],
    ) -> None:
        self._source, self._prepare = source, prepare
        self._height, self._width, channels = source.shape
        shape = rows, self._width + right_padding, channels
        self._buffer = mmap_zeros(shape, source.dtype, device)
        self.restart()
        self._beyond: dict[int, Tensor] = {}
        for number, row in beyond.items():
            kept = source.new_zeros(1, *shape[1:], device=device)
            prepare(source[row : row + 1].to(device), kept[:, : self._width])
            self._beyond[number] = kept[0]

    def restart(self) -> None:
        """Forgets the rows of the call before."""
        self._first = self._last = -len(self._buffer)

    def slide(self, first: int, last: int) -> Tensor:
        """Rows ``first`` up to ``last``; neither may be less than in the call before."""
        kept = max(0, self._last - first)
        if kept:
            start = first - self._first
            self._buffer[:kept] = self._buffer[start : start + kept].clone()
        window = self._buffer[: last - first]
        top, bottom = max(first + kept, 0), min(last, self._height)
        if top < bottom:
            window[kept : top - first] = 0
            rows = self._source[top:bottom].to(self._buffer.device)
            self._prepare(rows, window[top - first : bottom - first, : self._width])
        window[max(bottom - first, kept) :] = 0
        for number, row in self._beyond.items():
            if first + kept <= number < last:
                window[number - first] = row
        self._first, self._last = first, last
        return window


@dataclass(frozen=True)
class StreamLayer:
    """A layer that runs on strips: normalises, activates, convolves and adds a residual.

    The height of a strip is counted in units. A unit is one row of the output; for upsampling, one
    row of the input.

    Attributes:
        module: the convolution, or a linear layer over channels.
        norm: applied to the input first.
        silu: whether SiLU follows the normalisation.
        shortcut: convolution applied to the residual before it is added.
        modes: how rows and columns are padded.
    """

    module: nn.Conv2d | nn.Linear
    norm: nn.GroupNorm | None = None
    silu: bool = False
    shortcut: nn.Conv2d | None = None
    modes: Modes = ZEROS

    # columns of zeros on the right that the window adds to the input
    right_padding = 0
    # whether a runner checks its output, and raises NotFiniteError
    checks_finite = False

    @property
    def out_channels(self) -> int:
        return self.module.weight.shape[0]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output."""
        return height, width

    def units(self, height: int) -> int:
        """The number of units in an input of ``height`` rows."""
        return self.output_size(height, 1)[0]

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        """First row, and last row plus one, that units ``first`` up to ``last`` need; rows outside
        the input are zeros."""
        return first, last

    def output_rows(self, first: int, last: int) -> tuple[int, int]:
        """First row, and last row plus one, that units ``first`` up to ``last`` produce."""
        return first, last

    def rows_beyond(self, height: int) -> Mapping[int, int]:
        """See `row_beyond`, for an input of ``height`` rows."""
        return row_beyond(self.modes[0], height)

    def apply(self, window: Tensor) -> Tensor:
        """The module's output for a window of prepared input rows."""
        raise NotImplementedError

    @property
    def channels_first(self) -> bool:
        """Whether strips on a CPU are converted to channels-first order for the kernel."""
        return prefers_channels_first(self.module.weight)

    def convolve(self, window: Tensor, stride: int = 1, side_padding: int = 1) -> Tensor:
        """The module's convolution of a window, ``(rows, W, C)``, in the same order.

        No rows are padded (the window has them); ``side_padding`` columns are added on the left and
        on the right.
        """
        x = window[None].permute(0, 3, 1, 2)
        if side_padding and self.modes[1] != "zeros":
            sides = (side_padding, side_padding, 0, 0)
            x, side_padding = pad(x, sides, ("zeros", self.modes[1])), 0
        if self.channels_first and x.device.type == "cpu":
            x = x.contiguous()
        y = F.conv2d(x, self.module.weight, self.module.bias, stride, (0, side_padding))
        del x  # before its output is copied
        return y.permute(0, 2, 3, 1)[0].contiguous()

    def scratch_numel(self, rows: int, width: int) -> int:
        """Values held at once while a window of ``rows`` rows is computed: the output and its
        intermediate results, without the window and the weights."""
        out_rows, columns = self.output_size(rows, width)
        return out_rows * columns * self.out_channels

    def conv_input_numel(self, rows: int, width: int) -> int:
        """Values that the module itself reads for a window of ``rows`` rows."""
        return rows * (width + self.right_padding) * self.module.weight.shape[1]

    def multiplies(self, height: int, width: int) -> int:
        """Multiply-accumulates for an input of this size."""
        rows, columns = self.output_size(height, width)
        shortcut = 0 if self.shortcut is None else self.shortcut.weight.numel()
        return rows * columns * (self.module.weight.numel() + shortcut)

    def make_runner(self, context: StepContext, units: int) -> StepRunner:
        """A runner of this layer, in strips of at most ``units``."""
        return _TorchRunner(self, context, units)

    def ample_workspace(self, width: int) -> int:
        """The workspace in bytes beyond which strips get no faster."""
        return AMPLE_GPU_WORKSPACE if self.module.weight.device.type == "cuda" else AMPLE_WORKSPACE

    def workspace(self, units: int, width: int) -> int:
        """Bytes that a strip of ``units`` needs in addition to the feature maps, for an input
        ``width`` columns wide."""
        first, last = self.input_rows(0, units)
        rows, weight = last - first, self.module.weight
        window = rows * (width + self.right_padding) * weight.shape[1]
        scratch = self.scratch_numel(rows, width)
        if self.channels_first:  # both orders of input and output, and the kernel's own input
            out_rows, columns = self.output_size(rows, width)
            scratch += 2 * self.conv_input_numel(rows, width)
            scratch += out_rows * columns * weight.shape[0]
        weights = 2 * weight.numel()  # the kernel reorders them at each call
        # copies for normalising 16-bit rows in float32
        wide = 0 if norm_dtype(weight.dtype) == weight.dtype else 2 * window
        if self.modes != ZEROS:  # the rows beyond the edges, and a copy with padded columns
            window += 2 * (width + self.right_padding) * weight.shape[1]
            scratch += self.conv_input_numel(rows, width + 2)
        own = (window + scratch + weights) * weight.dtype.itemsize
        return own + wide * norm_dtype(weight.dtype).itemsize

    def prepare(self, rows: Tensor, out: Tensor, stats: RunningGroupStats | None) -> None:
        """Writes the input's ``rows`` into ``out``, normalised and activated for the module."""
        if self.norm is None or stats is None:
            out.copy_(rows)
            return
        scale, shift = stats.scale_and_shift(self.norm)
        if out.dtype == scale.dtype:
            torch.addcmul(shift, rows, scale, out=out)
            ready = out
        else:
            ready = torch.addcmul(shift, rows.to(scale.dtype), scale)
        if self.silu:
            F.silu(ready, inplace=True)
        if ready is not out:
            out.copy_(ready)

    def compute(
        self, window: Tensor, residual: Tensor | None, resident: Sequence[Tensor]
    ) -> Tensor:
        """The output's rows, as a new tensor.

        Args:
            window: prepared input rows.
            residual: the residual's rows.
            resident: feature maps that are read in full.
        """
        out = self.apply(window)
        if residual is None:
            return out
        if self.shortcut is None:
            return out.add_(residual)
        weight, bias = self.shortcut.weight.flatten(1), self.shortcut.bias
        out.view(-1, out.shape[-1]).addmm_(residual.flatten(0, 1), weight.T)
        return out if bias is None else out.add_(bias)


class _TorchRunner:
    """Runs a layer with torch's own operations, on a window that slides over the source."""

    def __init__(self, layer: StreamLayer, context: StepContext, units: int) -> None:
        first, last = layer.input_rows(0, units)
        self._layer, self._context = layer, context
        self._window = SlidingWindow(
            context.source,
            last - first,
            layer.right_padding,
            lambda rows, out: layer.prepare(rows, out, context.source_stats),
            context.device,
            {} if context.has_halo else layer.rows_beyond(context.source.shape[0]),
        )

    def run_strip(self, first: int, last: int) -> None:
        layer, context = self._layer, self._context
        above, below = layer.input_rows(first, last)
        top, bottom = (row - context.target_row for row in layer.output_rows(first, last))
        window = self._window.slide(above - context.source_row, below - context.source_row)
        residual = context.residual
        if residual is not None:
            residual = residual[top:bottom].to(context.device)
        out = layer.compute(window, residual, context.resident)
        context.target[top:bottom] = out
        if context.target_stats is not None:
            context.target_stats.update(out)
        del out
        # otherwise the allocator would keep freed blocks of every strip size
        trim_heap(context.device)

    def restart(self) -> None:
        self._window.restart()


class Conv1x1(StreamLayer):
    """A 1x1 convolution of few channels, by the kernel that the network uses without streaming."""

    channels_first = True

    def apply(self, window: Tensor) -> Tensor:
        return self.convolve(window, side_padding=0)


class Projection(StreamLayer):
    """A linear layer over the channels of each pixel."""

    channels_first = False

    def apply(self, window: Tensor) -> Tensor:
        return F.linear(window, self.module.weight, self.module.bias)


@dataclass(frozen=True, kw_only=True)
class AttentionLayer(Projection):
    """Attention of a strip's queries to all keys and values, which are resident.

    Attributes:
        module: projects the queries.
        out: projects the result.
    """

    out: nn.Linear

    def compute(
        self, window: Tensor, residual: Tensor | None, resident: Sequence[Tensor]
    ) -> Tensor:
        query, key, value = (
            x.reshape(1, 1, -1, x.shape[-1]) for x in (self.apply(window), *resident)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.view_as(window))
        return out if residual is None else out.add_(residual)

    def workspace(self, units: int, width: int) -> int:
        # the attention's result and its projection
        more = 2 * units * width * self.out_channels * self.module.weight.dtype.itemsize
        return super().workspace(units, width) + more


class Conv3x3(StreamLayer):
    """A 3x3 convolution at stride 1, padded with one row or column on every side."""

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        return first - 1, last + 1

    def apply(self, window: Tensor) -> Tensor:
        return self.convolve(window)


class UpsampleConv(StreamLayer):
    """Nearest-neighbour x2 upsampling, one strip at a time, then a 3x3 convolution."""

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return 2 * height, 2 * width

    def units(self, height: int) -> int:
        return height

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        return first - 1, last + 1

    def output_rows(self, first: int, last: int) -> tuple[int, int]:
        return 2 * first, 2 * last

    def rows_beyond(self, height: int) -> Mapping[int, int]:
        # The upsampled feature map's second row is a copy of the input's first.
        mode = self.modes[0]
        return row_beyond("replicate" if mode == "reflect" else mode, height)

    def apply(self, window: Tensor) -> Tensor:
        rows, width, channels = window.shape
        squares = window[:, None, :, None].expand(rows, 2, width, 2, channels)
        upsampled = squares.reshape(2 * rows, 2 * width, channels)
        # of the upsampled rows above and below the strip, the convolution needs the nearer one only
        return self.convolve(upsampled[1:-1])

    def scratch_numel(self, rows: int, width: int) -> int:
        return self.conv_input_numel(rows, width) + super().scratch_numel(rows, width)

    def conv_input_numel(self, rows: int, width: int) -> int:
        return 4 * super().conv_input_numel(rows, width)


class DownsampleConv(StreamLayer):
    """A 3x3 convolution at stride 2, padded on the right and at the bottom only."""

    right_padding = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        return 2 * first, 2 * last + 1

    def apply(self, window: Tensor) -> Tensor:
        if self.modes[1] == "circular":
            window[:, -1] = window[:, 0]
        return self.convolve(window, stride=2, side_padding=0)


@dataclass(frozen=True, kw_only=True)
class WholeConv(StreamLayer):
    """A convolution that strips cannot do justice to (another size or dilation, a ``_conv_forward``
    of its own): the module is called with the whole feature map, in one strip.

    Attributes:
        block: what calls the module: the module itself, or the block that resizes first.
        height: rows of the input.
    """

    block: nn.Module
    height: int

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        conv, factor = cast(nn.Conv2d, self.module), 2 if isinstance(self.block, Upsample2D) else 1
        more = 1 if isinstance(self.block, AsymmetricDownsample2D) else 0
        sides = []
        for axis, side in enumerate((height, width)):
            size, stride = factor * side + more, conv.stride[axis]
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            if isinstance(conv.padding, str):
                padding = reach if conv.padding == "same" else 0
            else:
                padding = 2 * conv.padding[axis]
            sides.append((size + padding - reach - 1) // stride + 1)
        return sides[0], sides[1]

    def units(self, height: int) -> int:
        return 1

    def input_rows(self, first: int, last: int) -> tuple[int, int]:
        return 0, self.height

    def output_rows(self, first: int, last: int) -> tuple[int, int]:
        return 0, self.output_size(self.height, 1)[0]

    def compute(
        self, window: Tensor, residual: Tensor | None, resident: Sequence[Tensor]
    ) -> Tensor:
        out = self.block(window.permute(2, 0, 1)[None].contiguous())
        if residual is not None:
            residual = residual.permute(2, 0, 1)[None].contiguous()
            out = (residual if self.shortcut is None else self.shortcut(residual)) + out
        if out.shape[2:] != (size := self.output_size(*window.shape[:2])):
            raise InputError(
                "a convolution's output has an unexpected size",
                where="streaming",
                expected=size,
                got=tuple(out.shape[2:]),
                hint="call disable_streaming()",
            )
        return cast(Tensor, out[0].permute(1, 2, 0))

    def workspace(self, units: int, width: int) -> int:
        (out_channels, channels), pixels = self.module.weight.shape[:2], self.height * width
        rows, columns = self.output_size(self.height, width)
        larger = max(pixels, rows * columns)
        # input, padded copy and normalisation; output, shortcut and sum; torch's own copies
        values = pixels * channels + 4 * larger * (channels + out_channels)
        values += 2 * self.module.weight.numel()
        return units * values * norm_dtype(self.module.weight.dtype).itemsize
