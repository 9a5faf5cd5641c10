"""Convolutions over strips of rows: which rows a strip needs, and what it makes of them.

Everything here is channels-last: a map is ``(H, W, C)``, so that a strip of rows is one contiguous
piece of memory or of a file. :meth:`Layer.convolve` is the one place where a strip is convolved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconv.streaming.arena import trim_heap
from sdconv.streaming.moments import Moments, computing
from sdconv.streaming.passes import Ground, Pass
from sdconv.streaming.window import Window

# Strips that take more are not faster: measured on 2 cores, where the kernels are at their full
# rate from a few million numbers on.
COMFORT = 64 << 20


def is_wide(weight: Tensor) -> bool:
    """Whether a convolution on a CPU is for the kernel that takes channels first.

    The one that takes them last adds all products up in one row: with many channels, its error is
    three times as large. With few it is faster.
    """
    return weight.shape[1] > 128


@dataclass(frozen=True)
class Layer:
    """A layer that takes rows of a map to rows of another one: normalise, activate, convolve, add.

    A strip is counted in units: rows of the output, or of the input where each makes two.

    Attributes:
        module: the convolution, or a linear layer over channels.
        norm: applied to the input first. activated: SiLU after it.
        shortcut: what the residual goes through, if there is one, before it is added.
    """

    module: nn.Conv2d | nn.Linear
    norm: nn.GroupNorm | None = None
    activated: bool = False
    shortcut: nn.Conv2d | None = None

    # columns of zeros that the input gets at the right before it comes here
    right = 0

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.module.weight.shape[0]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output."""
        return height, width

    def units(self, height: int) -> int:
        """In how many units a map with ``height`` rows can be cut."""
        return self.output_size(height, 1)[0]

    def window(self, first: int, last: int) -> tuple[int, int]:
        """The input's rows, from and up to, that units ``first`` up to ``last`` need; those
        outside the map are zeros."""
        return first, last

    def outputs(self, first: int, last: int) -> tuple[int, int]:
        """The output's rows that these units make."""
        return first, last

    def apply(self, strip: Tensor) -> Tensor:
        """The window's rows to the output's rows."""
        raise NotImplementedError

    @property
    def turned(self) -> bool:
        """Whether a strip is turned to channels first and back, for the kernel of a CPU."""
        return is_wide(self.module.weight)

    def convolve(self, strip: Tensor, stride: int = 1, sides: int = 1) -> Tensor:
        """The module's convolution of ``strip``, ``(rows, W, C)``, to the same form.

        No row is added above or below (the strip brings its own), ``sides`` columns of zeros are at
        either side.
        """
        x = strip[None].permute(0, 3, 1, 2)
        if self.turned and x.device.type == "cpu":
            x = x.contiguous()
        y = F.conv2d(x, self.module.weight, self.module.bias, stride, (0, sides))
        del x  # before its output is copied
        return y.permute(0, 2, 3, 1)[0].contiguous()

    def scratch(self, rows: int, width: int) -> int:
        """Numbers held at once beside the window of ``rows`` rows: the output and what leads to
        it, without weights."""
        height, columns = self.output_size(rows, width)
        return height * columns * self.channels

    def convolved(self, rows: int, width: int) -> int:
        """Numbers that the module itself reads of a window of ``rows`` rows."""
        return rows * (width + self.right) * self.module.weight.shape[1]

    def multiplies(self, height: int, width: int) -> int:
        """Multiplications that a map of this size takes."""
        rows, columns = self.output_size(height, width)
        shortcut = 0 if self.shortcut is None else self.shortcut.weight.numel()
        return rows * columns * (self.module.weight.numel() + shortcut)

    def begin(self, ground: Ground, units: int) -> Pass:
        """A step with this layer, under way in strips of at most ``units``."""
        return _Plain(self, ground, units)

    def comfort(self, width: int) -> int:
        """Bytes beside the maps of which more would not make it faster."""
        return COMFORT

    def workspace(self, units: int, width: int) -> int:
        """Bytes that a strip of this many units takes beside the maps, the input's ``width``
        given."""
        first, last = self.window(0, units)
        rows, weight = last - first, self.module.weight
        window = rows * (width + self.right) * weight.shape[1]
        made = self.scratch(rows, width)
        if self.turned:  # both with channels first, and the input in the kernel's own order
            height, columns = self.output_size(rows, width)
            made += 2 * self.convolved(rows, width) + height * columns * weight.shape[0]
        weights = 2 * weight.numel()  # reordered by the kernel at each call
        # in a narrow dtype, copies to normalise in float32
        wide = 0 if computing(weight.dtype) == weight.dtype else 2 * window
        own = (window + made + weights) * weight.dtype.itemsize
        return own + wide * computing(weight.dtype).itemsize

    def remains(self, units: int, width: int) -> int:
        """The same after the first strip, when weights have been made ready."""
        return self.workspace(units, width)

    def prepare(self, rows: Tensor, out: Tensor, moments: Moments | None) -> None:
        """The input's ``rows`` as the module takes them, into ``out``."""
        if self.norm is None or moments is None:
            out.copy_(rows)
            return
        scale, shift = moments.scale_and_shift(self.norm)
        if out.dtype == scale.dtype:
            torch.addcmul(shift, rows, scale, out=out)
            ready = out
        else:
            ready = torch.addcmul(shift, rows.to(scale.dtype), scale)
        if self.activated:
            F.silu(ready, inplace=True)
        if ready is not out:
            out.copy_(ready)

    def compute(self, strip: Tensor, residual: Tensor | None, whole: Sequence[Tensor]) -> Tensor:
        """The output's rows, a tensor of their own.

        Args:
            strip: the window's rows, prepared. residual: the residual map's rows.
            whole: the maps that are read as a whole.
        """
        made = self.apply(strip)
        if residual is None:
            return made
        if self.shortcut is None:
            return made.add_(residual)
        weight, bias = self.shortcut.weight.flatten(1), self.shortcut.bias
        made.view(-1, made.shape[-1]).addmm_(residual.flatten(0, 1), weight.T)
        return made if bias is None else made.add_(bias)


class _Plain:
    """By torch's own operations: a window slides over the source."""

    def __init__(self, layer: Layer, ground: Ground, units: int) -> None:
        first, last = layer.window(0, units)
        self._layer, self._ground = layer, ground
        self._window = Window(
            ground.source,
            last - first,
            layer.right,
            lambda rows, out: layer.prepare(rows, out, ground.moments),
            ground.device,
        )

    def strip(self, first: int, last: int) -> None:
        layer, ground = self._layer, self._ground
        top, bottom = layer.outputs(first, last)
        strip = self._window.slide(*layer.window(first, last))
        added = None if ground.residual is None else ground.residual[top:bottom].to(ground.device)
        made = layer.compute(strip, added, ground.whole)
        ground.target[top:bottom] = made
        if ground.measured is not None:
            ground.measured.add(made)
        del made
        # else an allocator keeps of every size of strip what was freed
        trim_heap()


class Point(Layer):
    """A 1x1 convolution of few channels, by the kernel that the network itself has for it."""

    turned = True

    def apply(self, strip: Tensor) -> Tensor:
        return self.convolve(strip, sides=0)


class Linear(Layer):
    """A linear layer over the channels of each pixel."""

    turned = False

    def apply(self, strip: Tensor) -> Tensor:
        return F.linear(strip, self.module.weight, self.module.bias)


@dataclass(frozen=True, kw_only=True)
class Attended(Linear):
    """Queries by the module, mixed from the whole maps' keys and values, then projected by
    ``out``."""

    out: nn.Linear

    def compute(self, strip: Tensor, residual: Tensor | None, whole: Sequence[Tensor]) -> Tensor:
        query, key, value = (x.reshape(1, 1, -1, x.shape[-1]) for x in (self.apply(strip), *whole))
        mixed = F.scaled_dot_product_attention(query, key, value)
        made: Tensor = self.out(mixed.view_as(strip))
        return made if residual is None else made.add_(residual)

    def workspace(self, units: int, width: int) -> int:
        # the query, what is mixed and what is projected
        more = 2 * units * width * self.channels * self.module.weight.dtype.itemsize
        return super().workspace(units, width) + more


class Same(Layer):
    """A 3x3 convolution with one row or column of zeros on every side."""

    def window(self, first: int, last: int) -> tuple[int, int]:
        return first - 1, last + 1

    def apply(self, strip: Tensor) -> Tensor:
        return self.convolve(strip)


class Doubled(Layer):
    """Each pixel repeated as a 2x2 square, then a 3x3 convolution; one strip is doubled at a
    time."""

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return 2 * height, 2 * width

    def units(self, height: int) -> int:
        return height

    def window(self, first: int, last: int) -> tuple[int, int]:
        return first - 1, last + 1

    def outputs(self, first: int, last: int) -> tuple[int, int]:
        return 2 * first, 2 * last

    def apply(self, strip: Tensor) -> Tensor:
        rows, width, channels = strip.shape
        squares = strip[:, None, :, None].expand(rows, 2, width, 2, channels)
        doubled = squares.reshape(2 * rows, 2 * width, channels)
        # of the rows above and below, the nearer half
        return self.convolve(doubled[1:-1])

    def scratch(self, rows: int, width: int) -> int:
        return self.convolved(rows, width) + super().scratch(rows, width)

    def convolved(self, rows: int, width: int) -> int:
        return 4 * super().convolved(rows, width)


class Halved(Layer):
    """A 3x3 convolution at stride 2 with zeros at the right and at the bottom only."""

    right = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def window(self, first: int, last: int) -> tuple[int, int]:
        return 2 * first, 2 * last + 1

    def apply(self, strip: Tensor) -> Tensor:
        return self.convolve(strip, stride=2, sides=0)
