"""Output size, receptive field, parameters and multiplications of convolutions, from sizes alone.

Pure Python. Sizes are for one axis at a time, because rows and columns are independent.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import SupportsIndex, cast

from sdconv.errors import InputError


def whole_number(name: str, value: object, minimum: int) -> int:
    """``value`` as an ``int``.

    Raises:
        InputError: it is not a whole number, or below ``minimum``; ``name`` says which argument.
    """
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise InputError(
            "not a valid number",
            where=name,
            expected=f"a whole number, {minimum} or more",
            got=repr(value),
        )
    return number


def pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    """``value`` as (rows, columns): two whole numbers, or one for both.

    Raises:
        InputError: it is neither, or a number is below ``minimum``; ``name`` says which argument.
    """
    if not isinstance(value, tuple | list):
        value = (value, value)
    if len(value) != 2:
        raise InputError(
            "not a valid number or pair",
            where=name,
            expected="one whole number, or two for (rows, columns)",
            got=repr(value),
        )
    rows, columns = (whole_number(name, number, minimum) for number in value)
    return rows, columns


def output_size(size: int, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> int:
    """Pixels of the output on one axis: ``(size + before + after - kernel) // stride + 1``.

    Args:
        size: pixels of the input on this axis, 1 or more.
        kernel: pixels of the kernel, 1 or more.
        stride: pixels from one position of the kernel to the next, 1 or more.
        padding: zeros (before, after) the input, 0 or more.

    Raises:
        InputError: a number is out of range, or the kernel is larger than the padded input.
    """
    size, kernel = whole_number("size", size, 1), whole_number("kernel", kernel, 1)
    before, after = pair("padding", padding, 0)
    padded = size + before + after
    if kernel > padded:
        raise InputError(
            "the kernel is larger than the padded input",
            where="kernel",
            expected=f"at most {padded} ({size} of the input, {before} before, {after} after)",
            got=kernel,
            hint="pad more, or use a larger input",
        )
    return (padded - kernel) // whole_number("stride", stride, 1) + 1


@dataclass(frozen=True)
class ReceptiveField:
    """The input pixels that each output of a chain of layers depends on, along one axis.

    ``ReceptiveField()`` belongs to the input itself, where every pixel depends on one pixel. Each
    layer of the chain, from the input to the output, turns one receptive field into the next::

        ReceptiveField().through(kernel=3).through(kernel=3, stride=2, padding=(0, 1)).upsampled(2)

    For a chain of convolutions l = 1..L without upsampling, this is the closed form of Araujo,
    Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019
    (doi 10.23915/distill.00021), in which a product of no strides is 1:

    - ``size      = 1 + sum over l of (k_l - 1) * (s_1 * ... * s_(l-1))``
    - ``downscale = s_1 * ... * s_L``, the effective stride
    - ``offset    = - sum over l of before_l * (s_1 * ... * s_(l-1))``

    After nearest upsampling, neighbouring outputs no longer depend on equally many pixels: copies
    of one pixel share its receptive field, and how far a 3x3 kernel then reaches depends on which
    copy it is centred on. The pattern repeats, so the first and the last pixel are stored for each
    output of one period, and `span` is exact.

    Pixels below 0 or beyond the image are padding. A span inside the image is exact; one that
    reaches outside is cut off at the border, or just before it where a stride left pixels over.
    Normalisation over space and attention depend on the whole image and have no receptive field.

    Attributes:
        firsts: first input pixel for outputs 0, 1, ... of one period.
        lasts: last input pixel for the same outputs.
        period: input pixels from one period to the next.
    """

    firsts: tuple[int, ...] = (0,)
    lasts: tuple[int, ...] = (0,)
    period: int = 1

    @property
    def size(self) -> int:
        """Input pixels from the first to the last that an output depends on; the largest number, if
        outputs differ."""
        return max(last - first + 1 for first, last in zip(self.firsts, self.lasts, strict=True))

    @property
    def downscale(self) -> Fraction:
        """Input pixels from one output to the next, on average; below 1 if the output is larger
        than the input."""
        return Fraction(self.period, len(self.firsts))

    @property
    def offset(self) -> int:
        """The first input pixel that output 0 depends on; negative if it is padding."""
        return self.firsts[0]

    def span(self, index: int) -> tuple[int, int]:
        """First and last input pixel that output ``index`` depends on, both included."""
        periods, phase = divmod(index, len(self.firsts))
        shift = periods * self.period
        return self.firsts[phase] + shift, self.lasts[phase] + shift

    def through(
        self, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> ReceptiveField:
        """The receptive field after one more convolution or pooling, with padding (before, after).

        Output ``i`` of the new layer covers outputs ``i*stride - before`` to
        ``i*stride - before + kernel - 1``, both included, of this one.

        Raises:
            InputError: a number is out of range.
        """
        kernel, stride = whole_number("kernel", kernel, 1), whole_number("stride", stride, 1)
        before, _ = pair("padding", padding, 0)
        shared = math.gcd(len(self.firsts), stride)
        starts = [i * stride - before for i in range(len(self.firsts) // shared)]
        return ReceptiveField(
            firsts=tuple(self.span(start)[0] for start in starts),
            lasts=tuple(self.span(start + kernel - 1)[1] for start in starts),
            period=self.period * stride // shared,
        )

    def upsampled(self, factor: int) -> ReceptiveField:
        """The receptive field after nearest upsampling, which repeats every output ``factor``
        times.

        Raises:
            InputError: the factor is not a whole number, or below 1.
        """
        copies = range(whole_number("factor", factor, 1))
        return ReceptiveField(
            firsts=tuple(first for first in self.firsts for _ in copies),
            lasts=tuple(last for last in self.lasts for _ in copies),
            period=self.period,
        )


def conv_parameters(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int], *, bias: bool = True
) -> int:
    """Parameters of a convolution: its weights, and one bias for each output channel. The image's
    size does not matter.

    Raises:
        InputError: a number is below 1.
    """
    rows, columns = pair("kernel", kernel, 1)
    inputs = whole_number("in_channels", in_channels, 1) * rows * columns
    return dense_parameters(inputs, whole_number("out_channels", out_channels, 1), bias=bias)


def conv_multiplies(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, int],
    output: int | tuple[int, int],
) -> int:
    """Multiply-accumulates of a convolution for one image, given the output's (rows, columns).

    As in torch's own counter, products with the padding's zeros count, and adding the bias does
    not.

    Raises:
        InputError: a number is below 1.
    """
    rows, columns = pair("output", output, 1)
    return rows * columns * conv_parameters(in_channels, out_channels, kernel, bias=False)


def dense_parameters(inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Parameters of a dense layer, which connects every input number to every output number.

    Raises:
        InputError: a number is below 1.
    """
    return whole_number("outputs", outputs, 1) * (whole_number("inputs", inputs, 1) + bias)


def dense_multiplies(inputs: int, outputs: int) -> int:
    """Multiply-accumulates of a dense layer for one image: each weight is used once.

    Raises:
        InputError: a number is below 1.
    """
    return dense_parameters(inputs, outputs, bias=False)
