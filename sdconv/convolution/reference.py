"""Reference implementations of convolution, written to be read: the sum, and the layer.

The networks compute with torch's own kernels. These functions define what those kernels compute,
and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional

from sdconv.convolution.geometry import output_size, pair, whole_number
from sdconv.errors import InputError


def convolve(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The full discrete convolution of two sequences: ``len(a) + len(b) - 1`` numbers.

    ``(a * b)[n] = sum over m of a[m] * b[n - m]``, where everything outside a sequence is 0::

        >>> convolve([1, 2, 3], [0, 1, 10])
        [0, 1, 12, 23, 30]

    As ``m`` runs forwards, ``b`` is read backwards. This flip makes the operation symmetric
    (``a * b = b * a``); multiplying polynomials and adding dice work the same way. Networks leave
    out the flip: their "convolution" reads the kernel forwards, ``sum over m of a[n + m] * w[m]``,
    which is called cross-correlation. Because the kernel is learned, nothing is lost. Flipping the
    kernel by hand makes the two agree: `conv2d_reference` of one row ``a`` with the kernel
    ``b[::-1]`` and padding "valid" is the part of ``convolve(a, b)`` in which ``b`` overlaps
    ``a`` completely.

    Raises:
        InputError: a sequence is empty, or an element is not a real number.
    """
    _require_numbers("a", a)
    _require_numbers("b", b)
    return [
        sum(a[m] * b[n - m] for m in range(max(0, n - len(b) + 1), min(n + 1, len(a))))
        for n in range(len(a) + len(b) - 1)
    ]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) an axis that TensorFlow's SAME adds, so that the output has
    ``ceil(size / stride)`` pixels.

    ``total = max((ceil(size / stride) - 1) * stride + kernel - size, 0)``. If that is odd, the
    extra zero comes after: at the bottom or on the right. At stride 1, torch's ``padding="same"``
    agrees. At stride 2, a kernel of 3 gets (0, 1) on an even size and (1, 1) on an odd one.

    Source: "Notes on padding" in TensorFlow's ``tf.nn``.

    Raises:
        InputError: a number is below 1.
    """
    size, kernel = whole_number("size", size, 1), whole_number("kernel", kernel, 1)
    stride = whole_number("stride", stride, 1)
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True, kw_only=True)
class _DimensionOrder:
    """The order of dimensions, as einops patterns, which error messages show too."""

    image: str
    weight: str


_CHANNELS_FIRST = _DimensionOrder(
    image="batch channels rows columns",
    weight="out_channels in_channels kernel_rows kernel_columns",
)
_CHANNELS_LAST = _DimensionOrder(
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
    """A convolutional layer, written directly from its equation: slow, but a reference for tests.

    The neuron at row ``i`` and column ``j`` of feature map ``k`` multiplies the pixels under its
    kernel, in every input channel ``k'``, by weights, and adds up the products and its bias::

        z[i,j,k] = b[k] + sum over u,v,k' of x[i*s+u, j*s+v, k'] * w[u,v,k',k]

    All neurons of one feature map share one ``w`` and one ``b``. ``x`` is the padded image, ``s``
    the stride.

    Args:
        x: images, (B, C, H, W); with ``channels_last`` (B, H, W, C). float16, bfloat16, float32 or
            float64.
        weight: (out, in, rows, columns), torch's order; with ``channels_last`` (rows, columns, in,
            out), TensorFlow's. Same dtype and device as ``x``.
        bias: (out,); None for zeros.
        stride: pixels from one position of the kernel to the next: one number or (rows, columns),
            1 or more.
        padding: zeros around the image. "valid": none; "same": see `same_padding`; or the numbers
            for (top, bottom, left, right). Note that `torch.nn.functional.pad` has another order,
            (left, right, top, bottom).
        channels_last: images, weight and result are in TensorFlow's order.

    Returns:
        (B, out, H', W'); with ``channels_last`` (B, H', W', out).
        `sdconv.convolution.geometry.output_size` computes H' and W'.

    Raises:
        InputError: shapes, channels, dtypes or devices do not match; the kernel is larger than the
            padded image; a padding is negative or unknown; a stride is below 1.
    """
    order = _CHANNELS_LAST if channels_last else _CHANNELS_FIRST
    _require_tensor("x", x, order.image, like=x)
    _require_tensor("weight", weight, order.weight, like=x)
    x = rearrange(x, f"{order.image} -> {_CHANNELS_LAST.image}")
    weight = rearrange(weight, f"{order.weight} -> {_CHANNELS_LAST.weight}")

    rows, columns, in_channels, out_channels = weight.shape
    if x.shape[3] != in_channels:
        raise InputError(
            "the image and the weight differ in input channels",
            where="x",
            expected=f"{in_channels} channels, as in the weight ({order.weight})",
            got=f"{x.shape[3]} channels ({order.image})",
            hint="the default is torch's order; for TensorFlow's use channels_last=True",
        )
    if bias is not None:
        _require_tensor("bias", bias, "out_channels", like=x)
        if bias.shape[0] != out_channels:
            raise InputError(
                "a bias needs one number for each output channel",
                where="bias",
                expected=out_channels,
                got=bias.shape[0],
            )

    strides = pair("stride", stride, 1)
    vertical, horizontal = _padding_pairs(padding, tuple(x.shape[1:3]), (rows, columns), strides)
    output_size(x.shape[1], rows, strides[0], vertical)  # raises if the kernel is too large
    output_size(x.shape[2], columns, strides[1], horizontal)

    x = functional.pad(x, (0, 0, *horizontal, *vertical))
    # A view, not a copy: patches[b, i, j, k', u, v] = x[b, i*s + u, j*s + v, k'].
    patches = x.unfold(1, rows, strides[0]).unfold(2, columns, strides[1])
    z = einsum(patches, weight, "b i j k_in u v, u v k_in k -> b i j k")
    if bias is not None:
        z = z + bias
    return rearrange(z, f"{_CHANNELS_LAST.image} -> {order.image}")


def _require_numbers(name: str, sequence: object) -> None:
    """Raises InputError unless ``sequence`` has one real number or more."""
    elements = list(sequence) if isinstance(sequence, Iterable) else []
    if not elements or not all(isinstance(element, Real) for element in elements):
        raise InputError(
            "not a sequence of numbers",
            where=name,
            expected="one real number or more",
            got=repr(sequence),
        )


def _require_tensor(name: str, value: object, dimensions: str, *, like: Tensor) -> None:
    """Raises InputError unless ``value`` is a floating-point tensor with these dimensions, and the
    dtype and device of ``like``."""
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
            "unsupported dtype",
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


def _padding_pairs(
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
