"""What follows from the sizes of a convolution alone: output size, receptive field, counts.

Pure Python, one axis at a time: rows and columns of a convolution do not depend on each other.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from fractions import Fraction

from sdconv.errors import InputError


def whole(name: str, value: object, minimum: int) -> int:
    """``value`` as an ``int``; InputError that names ``name`` if it is not whole or too small."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise InputError(
            "not a number that can be used here",
            where=name,
            expected=f"a whole number, {minimum} or more",
            got=repr(value),
        )
    return number


def pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    """``value`` as (rows, columns): one whole number for both, or two; else InputError."""
    if not isinstance(value, tuple | list):
        value = (value, value)
    if len(value) != 2:
        raise InputError(
            "not a number or pair that can be used here",
            where=name,
            expected="one whole number, or two for (rows, columns)",
            got=repr(value),
        )
    rows, columns = (whole(name, number, minimum) for number in value)
    return rows, columns


def output_size(size: int, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> int:
    """Places of a kernel on one axis: ``(size + before + after - kernel) // stride + 1``.

    Args:
        size: pixels of the input on this axis, 1 or more.
        kernel: pixels of the kernel, 1 or more.
        stride: step between two places, 1 or more.
        padding: zeros (before, after) the input, 0 or more.

    Raises:
        InputError: a number out of range, or a kernel larger than the padded input.
    """
    size, kernel = whole("size", size, 1), whole("kernel", kernel, 1)
    before, after = pair("padding", padding, 0)
    padded = size + before + after
    if kernel > padded:
        raise InputError(
            "the kernel is larger than the padded input",
            where="kernel",
            expected=f"at most {padded} ({size} of the input, {before} before, {after} after)",
            got=kernel,
            hint="pad more, or give a larger input",
        )
    return (padded - kernel) // whole("stride", stride, 1) + 1


@dataclass(frozen=True)
class Window:
    """The receptive field of a chain of layers, on one axis: the input pixels an output sees.

    ``Window()`` is the input itself: every pixel sees one pixel. Each layer of the chain makes a
    new window of the last, from the input towards the output::

        Window().through(kernel=3).through(kernel=3, stride=2, padding=(0, 1)).upsampled(2)

    Along a chain of convolutions l = 1..L alone this is the closed form of Araujo, Norris and Sim,
    "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019
    (doi 10.23915/distill.00021), where s_i is 1 for no layer:

    - ``size   = 1 + sum over l of (k_l - 1) * (s_1 * ... * s_(l-1))``
    - ``stride = s_1 * ... * s_L``
    - ``offset = - sum over l of before_l * (s_1 * ... * s_(l-1))``

    After nearest upsampling, neighbours no longer see equally many pixels: two outputs made of one
    input pixel share its window, and what a 3x3 kernel sees depends on where it stands among them.
    So the first and last pixel are kept for every output of one period, and `span` is exact.

    Pixels below 0 or beyond the image are padding. A window inside the image is exact; one that
    reaches out of it is cut off at the border, or just before it where a stride left pixels over.
    Normalisation over space and attention see the whole image and have no window.

    Attributes:
        firsts: first input pixel that outputs 0, 1, ... of one period see.
        lasts: last input pixel that they see.
        step: input pixels from one period to the next.
    """

    firsts: tuple[int, ...] = (0,)
    lasts: tuple[int, ...] = (0,)
    step: int = 1

    @property
    def size(self) -> int:
        """Input pixels that one output sees, from the first to the last; the most that any does."""
        return max(last - first + 1 for first, last in zip(self.firsts, self.lasts, strict=True))

    @property
    def stride(self) -> Fraction:
        """Input pixels from one output to the next, on average: below 1 if the output is larger."""
        return Fraction(self.step, len(self.firsts))

    @property
    def offset(self) -> int:
        """The first input pixel that output 0 sees; negative if that is padding."""
        return self.firsts[0]

    def span(self, index: int) -> tuple[int, int]:
        """First and last input pixel that output ``index`` sees, both included."""
        periods, place = divmod(index, len(self.firsts))
        return self.firsts[place] + periods * self.step, self.lasts[place] + periods * self.step

    def through(self, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Window:
        """The window after one more convolution or pooling, with padding (before, after).

        Output ``i`` of the new layer covers outputs ``i*stride - before`` up to and with
        ``i*stride - before + kernel - 1`` of this one.

        Raises:
            InputError: a number out of range.
        """
        kernel, stride = whole("kernel", kernel, 1), whole("stride", stride, 1)
        before, _ = pair("padding", padding, 0)
        shared = math.gcd(len(self.firsts), stride)
        starts = [i * stride - before for i in range(len(self.firsts) // shared)]
        return Window(
            firsts=tuple(self.span(start)[0] for start in starts),
            lasts=tuple(self.span(start + kernel - 1)[1] for start in starts),
            step=self.step * stride // shared,
        )

    def upsampled(self, factor: int) -> Window:
        """The window after nearest upsampling: every output stands ``factor`` times in a row.

        Raises:
            InputError: a factor that is not whole or below 1.
        """
        repeats = range(whole("factor", factor, 1))
        return Window(
            firsts=tuple(first for first in self.firsts for _ in repeats),
            lasts=tuple(last for last in self.lasts for _ in repeats),
            step=self.step,
        )


def conv_parameters(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int], *, bias: bool = True
) -> int:
    """Weights of a convolution and its biases, one for each output channel, at any image size.

    Raises:
        InputError: a number below 1.
    """
    rows, columns = pair("kernel", kernel, 1)
    inputs = whole("in_channels", in_channels, 1) * rows * columns
    return dense_parameters(inputs, whole("out_channels", out_channels, 1), bias=bias)


def conv_multiplies(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, int],
    output: int | tuple[int, int],
) -> int:
    """Multiply-accumulates of a convolution for one image whose output has (rows, columns).

    Those with padding's zeros are counted, and adding the bias is not, as torch's own counter does.

    Raises:
        InputError: a number below 1.
    """
    rows, columns = pair("output", output, 1)
    return rows * columns * conv_parameters(in_channels, out_channels, kernel, bias=False)


def dense_parameters(inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Weights of a layer that joins every input number to every output number, and its biases.

    Raises:
        InputError: a number below 1.
    """
    return whole("outputs", outputs, 1) * (whole("inputs", inputs, 1) + bias)


def dense_multiplies(inputs: int, outputs: int) -> int:
    """Multiply-accumulates of such a layer for one image: each weight is used once.

    Raises:
        InputError: a number below 1.
    """
    return dense_parameters(inputs, outputs, bias=False)
