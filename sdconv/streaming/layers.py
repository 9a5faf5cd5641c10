"""Convolutions over strips of rows: which rows a strip needs, and what it makes of them.

Everything here is channels-last: a map is ``(H, W, C)``, so that a strip of rows is one contiguous
piece of memory or of a file. :func:`convolve` is the one place where a strip is convolved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


def convolve(strip: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: int) -> Tensor:
    """A convolution of ``strip``, ``(rows, W, C)``, to the same form.

    No row is added above or below (the strip brings its own), ``sides`` columns of zeros are at
    either side.
    """
    x = strip[None].permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, (0, sides)).permute(0, 2, 3, 1)[0]


@dataclass(frozen=True)
class Layer:
    """A layer that takes rows of a map to rows of another one.

    A strip is counted in units: rows of the output, or of the input where each makes two.

    Attributes:
        module: the convolution, or a linear layer over channels.
    """

    module: nn.Conv2d | nn.Linear

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

    def scratch(self, rows: int, width: int) -> int:
        """Numbers held at once beside the window of ``rows`` rows: the output and what leads to
        it, without weights."""
        height, columns = self.output_size(rows, width)
        return height * columns * self.channels

    def multiplies(self, height: int, width: int) -> int:
        """Multiplications that a map of this size takes."""
        rows, columns = self.output_size(height, width)
        return rows * columns * self.module.weight.numel()


class Point(Layer):
    """A 1x1 convolution, or a linear layer: each pixel by itself."""

    def apply(self, strip: Tensor) -> Tensor:
        return F.linear(strip, self.module.weight.flatten(1), self.module.bias)


class Same(Layer):
    """A 3x3 convolution with one row or column of zeros on every side."""

    def window(self, first: int, last: int) -> tuple[int, int]:
        return first - 1, last + 1

    def apply(self, strip: Tensor) -> Tensor:
        return convolve(strip, self.module.weight, self.module.bias, 1, 1)


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
        return convolve(doubled[1:-1], self.module.weight, self.module.bias, 1, 1)

    def scratch(self, rows: int, width: int) -> int:
        return 4 * rows * width * self.module.weight.shape[1] + super().scratch(rows, width)


class Halved(Layer):
    """A 3x3 convolution at stride 2 with zeros at the right and at the bottom only."""

    right = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 2, width // 2

    def window(self, first: int, last: int) -> tuple[int, int]:
        return 2 * first, 2 * last + 1

    def apply(self, strip: Tensor) -> Tensor:
        return convolve(strip, self.module.weight, self.module.bias, 2, 0)
