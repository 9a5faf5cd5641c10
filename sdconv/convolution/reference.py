"""What a convolution is, written to be read: the sum itself, and the layer made of it.

The networks compute with torch's own kernels. These functions say what those kernels compute, and
tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional

from sdconv.convolution.geometry import output_size, pair, whole
from sdconv.errors import InputError


def convolve(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The full discrete convolution of two sequences: ``len(a) + len(b) - 1`` numbers.

    ``(a * b)[n] = sum over m of a[m] * b[n - m]``, where what lies outside a sequence is 0::

        >>> convolve([1, 2, 3], [0, 1, 10])
        [0, 1, 12, 23, 30]

    ``b`` is read backwards as ``m`` runs forwards. That flip makes the operation symmetric
    (``a * b = b * a``), and is what multiplying polynomials or adding dice does. Networks leave
    the flip out: their "convolution" reads the kernel forwards, ``sum over m of a[n + m] * w[m]``,
    which is called cross-correlation. As the kernel is learned, nothing is lost. The two meet where
    the kernel is turned round by hand: `conv2d_reference` of one row ``a`` with the kernel
    ``b[::-1]`` and padding "valid" is the part of ``convolve(a, b)`` where ``b`` lies wholly on
    ``a``.

    Raises:
        InputError: an empty sequence, or an element that is not a real number.
    """
    _require_numbers("a", a)
    _require_numbers("b", b)
    return [
        sum(a[m] * b[n - m] for m in range(max(0, n - len(b) + 1), min(n + 1, len(a))))
        for n in range(len(a) + len(b) - 1)
    ]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) one axis in TensorFlow's SAME: the output has ``ceil(size / stride)``.

    ``total = max((ceil(size / stride) - 1) * stride + kernel - size, 0)``; where that is odd, the
    extra zero comes after: at the bottom and at the right. At stride 1 torch's ``padding="same"``
    agrees; at stride 2 a 3-wide kernel gets (0, 1) on an even size and (1, 1) on an odd one.

    Source: "Notes on padding" in TensorFlow's ``tf.nn``.

    Raises:
        InputError: a number below 1.
    """
    size, kernel = whole("size", size, 1), whole("kernel", kernel, 1)
    stride = whole("stride", stride, 1)
    places = -(-size // stride)
    total = max((places - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The order of dimensions, in einops' words, which the errors use too."""

    image: str
    weight: str


_CHANNELS_FIRST = _Layout(
    image="batch channels rows columns",
    weight="out_channels in_channels kernel_rows kernel_columns",
)
_CHANNELS_LAST = _Layout(
    image="batch rows columns channels",
    weight="kernel_rows kernel_columns in_channels out_channels",
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | tuple[int, int, int, int] = "valid",
    channels_last: bool = False,
) -> Tensor:
    """A convolutional layer as its equation says, slow and plain: a yardstick for tests.

    The neuron at row ``i`` and column ``j`` of feature map ``k`` sees the pixels under its kernel
    in every input channel ``k'``, weighs each, adds them up and adds its bias::

        z[i,j,k] = b[k] + sum over u,v,k' of x[i*s+u, j*s+v, k'] * w[u,v,k',k]

    All neurons of one map share one ``w`` and one ``b``. ``x`` is the padded image.

    Args:
        x: images, (B, C, H, W); with ``channels_last`` (B, H, W, C). float16 up to float64.
        weight: (out, in, rows, columns), torch's order; with ``channels_last`` (rows, columns, in,
            out), TensorFlow's. Same dtype and device as ``x``.
        bias: (out,) or None for zeros.
        stride: the step s, one number or (rows, columns), 1 or more.
        padding: zeros round the image. "valid": none; "same": `same_padding`; or as many as are
            given for (top, bottom, left, right). That is the order in which one reads, not the
            (left, right, top, bottom) of `torch.nn.functional.pad`.
        channels_last: images and weight stand in TensorFlow's order, and so does the result.

    Returns:
        (B, out, H', W'); with ``channels_last`` (B, H', W', out); H' and W' by
        `sdconv.convolution.geometry.output_size`.

    Raises:
        InputError: shapes, channels, dtypes or devices that do not fit together, a kernel larger
            than the padded image, a negative padding, a stride below 1, an unknown padding word.
    """
    layout = _CHANNELS_LAST if channels_last else _CHANNELS_FIRST
    _require_tensor("x", x, layout.image, like=x)
    _require_tensor("weight", weight, layout.weight, like=x)
    x = rearrange(x, f"{layout.image} -> {_CHANNELS_LAST.image}")
    weight = rearrange(weight, f"{layout.weight} -> {_CHANNELS_LAST.weight}")

    rows, columns, in_channels, out_channels = weight.shape
    if x.shape[3] != in_channels:
        raise InputError(
            "the image and the weight differ in input channels",
            where="x",
            expected=f"{in_channels} channels, as the weight ({layout.weight}) has",
            got=f"{x.shape[3]} channels ({layout.image})",
            hint="torch's order is the default; channels_last=True takes TensorFlow's",
        )
    if bias is not None:
        _require_tensor("bias", bias, "out_channels", like=x)
        if bias.shape[0] != out_channels:
            raise InputError(
                "not one number for each output channel",
                where="bias",
                expected=out_channels,
                got=bias.shape[0],
            )

    step = pair("stride", stride, 1)
    vertical, horizontal = _sides(padding, tuple(x.shape[1:3]), (rows, columns), step)
    output_size(x.shape[1], rows, step[0], vertical)  # refuses a kernel that finds no place
    output_size(x.shape[2], columns, step[1], horizontal)

    x = functional.pad(x, (0, 0, *horizontal, *vertical))
    # A view, without a copy: windows[b, i, j, k', u, v] = x[b, i*s + u, j*s + v, k'].
    windows = x.unfold(1, rows, step[0]).unfold(2, columns, step[1])
    z = einsum(windows, weight, "b i j k_in u v, u v k_in k -> b i j k")
    if bias is not None:
        z = z + bias
    return rearrange(z, f"{_CHANNELS_LAST.image} -> {layout.image}")


def _require_numbers(name: str, sequence: object) -> None:
    """InputError unless ``sequence`` holds one real number or more."""
    elements = list(sequence) if isinstance(sequence, Iterable) else []
    if not elements or not all(isinstance(element, Real) for element in elements):
        raise InputError(
            "not a sequence that can be convolved",
            where=name,
            expected="one real number or more",
            got=repr(sequence),
        )


def _require_tensor(name: str, value: object, dimensions: str, *, like: Tensor) -> None:
    """InputError unless ``value`` has these dimensions and the dtype and device of ``like``."""
    if not isinstance(value, Tensor):
        raise InputError("not a tensor", where=name, got=type(value).__name__)
    count = len(dimensions.split())
    if value.ndim != count:
        raise InputError(
            "wrong number of dimensions",
            where=name,
            expected=f"{count}: {dimensions}",
            got=f"{value.ndim}: shape {tuple(value.shape)}",
        )
    if value.dtype not in _DTYPES:
        raise InputError(
            "not a floating-point tensor that can be computed with",
            where=name,
            expected="one of " + ", ".join(str(dtype) for dtype in _DTYPES),
            got=value.dtype,
        )
    if (value.dtype, value.device) != (like.dtype, like.device):
        raise InputError(
            "differs from x in dtype or device",
            where=name,
            expected=f"{like.dtype} on {like.device}",
            got=f"{value.dtype} on {value.device}",
        )


def _sides(
    padding: object, size: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding as ((top, bottom), (left, right))."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        return (
            same_padding(size[0], kernel[0], stride[0]),
            same_padding(size[1], kernel[1], stride[1]),
        )
    if isinstance(padding, tuple | list) and len(padding) == 4:
        return pair("padding", padding[:2], 0), pair("padding", padding[2:], 0)
    raise InputError(
        "unknown padding",
        where="padding",
        expected='"valid", "same" or four whole numbers (top, bottom, left, right)',
        got=repr(padding),
    )
