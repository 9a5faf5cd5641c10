"""Convolutions with what stands before and after them in one pass over the map.

A picture goes through in strips of rows that fit a cache: rows are normalised as they are read,
multiplied, and written with bias and residual, while the sums for the next normalisation are taken.
Maps are ``(B, C, H, W)`` in float32, float16 or bfloat16 and any memory layout; arithmetic is
float32 (float64 for float64). Results lie in channels-last order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import kernels as engines
from sdconv.fast.cpu.buffer_pool import blank
from sdconv.fast.cpu.group_stats import Norm, combined
from sdconv.fast.cpu.tiling import (
    LEAST_BYTES,
    Strip,
    dense_rows,
    scratch,
    strip_bytes,
    strips,
)
from sdconv.fast.cpu.weight_cache import Make, prepared
from sdconv.fast.cpu.winograd import DOUBLED, OUTPUTS, PLAIN, Scheme

# a weight (O, C, ...) to right factors (P, C, O)
Transform = Callable[[Tensor, torch.dtype], Tensor]


class NotFiniteError(ArithmeticError):
    """Infinity or NaN came out, which Winograd's transforms spread over more pixels than the sum
    itself does: the result is to be computed directly."""


@dataclass(frozen=True)
class After:
    """What a convolution adds to its output.

    ``bias``: ``(O,)``. ``added``: for each picture ``(B, O)``, a projection of the time.
    ``residual``: a map of the output's shape; or, where ``shortcut`` is given, a map that this 1x1
    convolution ``(weight (O, R, 1, 1), bias (O,))`` is applied to first.
    """

    bias: Tensor | None = None
    added: Tensor | None = None
    residual: Tensor | None = None
    shortcut: tuple[Tensor, Tensor | None] | None = None

    def offsets(self, batch: int, channels: int, dtype: torch.dtype) -> Tensor:
        """What is the same for all of a picture's pixels, ``(B, O)``, the shortcut's bias too."""
        offsets = torch.zeros(batch, channels, dtype=dtype)
        if self.bias is not None:
            offsets += self.bias
        if self.added is not None:
            offsets += self.added
        if self.shortcut is not None and self.shortcut[1] is not None:
            offsets += self.shortcut[1]
        return offsets

    def apply(self, y: Tensor) -> Tensor:
        """The same, bias apart, by torch's own operations."""
        if self.added is not None:
            y = y + self.added[:, :, None, None]
        if self.residual is None:
            return y
        if self.shortcut is None:
            return self.residual + y
        return functional.conv2d(self.residual, *self.shortcut) + y


def computes_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on a map."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def moments(x: Tensor, groups: int) -> Tensor:
    """Each group's mean and variance, ``(B, groups, 2)`` in float64."""
    dtype = computes_in(x.dtype)
    found = []
    for one in x:
        rows = dense_rows(one, dtype)
        step = one.shape[1] if rows is not None else _rows_for(one)
        parts = [
            engines.of(dtype).sums(_as_rows(one, first, first + step, dtype, "input"), groups)
            for first in range(0, one.shape[1], step)
        ]
        found.append(combined(*(torch.cat(several) for several in zip(*parts, strict=True))))
    return torch.stack(found)


def direct(x: Tensor, weight: Tensor, norm: Norm | None, after: After) -> Tensor:
    """What `winograd_convolution` computes, by torch's own operations."""
    x = x if norm is None else norm.apply(x)
    return after.apply(functional.conv2d(x, weight, after.bias, padding=1))


def direct_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `winograd_convolution` computes of a doubled map, by torch's own operations."""
    x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return functional.conv2d(x, weight, bias, padding=1)


def winograd_convolution(
    x: Tensor,
    weight: Tensor,
    norm: Norm | None = None,
    after: After | None = None,
    *,
    scheme: Scheme = PLAIN,
    groups: int = 1,
    in_place: bool = False,
    tile_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution, stride 1, one row of zeros on every side, by Winograd's F(4x4,3x3).

    Args:
        x: ``(B, C, H, W)``. weight: ``(O, C, 3, 3)``.
        norm: applied to ``x`` as it is read. after: added to the output as it is written.
        scheme: of ``x`` itself, or of what nearest doubling makes of it.
        groups: of which moments of the output are wanted.
        in_place: write the output over ``x``, which must lie in channels-last order, have as many
            channels and no other reader.
        tile_rows: rows of tiles in a strip; None for as many as fit a cache.

    Returns:
        ``(B, O, H, W)``, or twice as high and wide, and its moments ``(B, groups, 2)``.

    Raises:
        NotFiniteError: something in the output is not finite. ``x`` is spoilt if ``in_place``.
    """
    after, dtype = after or After(), computes_in(x.dtype)
    batch, out_channels = len(x), len(weight)
    height, width = (size * OUTPUTS // scheme.step for size in x.shape[2:])
    out = x if in_place else blank(batch, out_channels, height, width, x.dtype)
    offsets = after.offsets(batch, out_channels, dtype)
    affine = None if norm is None else norm.affine(dtype)
    found = []
    kernel = prepared.get(weight, transformed(scheme, dtype))
    tiles = tiles_of(scheme, weight, dtype)
    shortcut = None
    if after.shortcut is not None:
        shortcut = prepared.get(after.shortcut[0], _packed(_pointwise, dtype))
    for b in range(batch):
        run = WinogradPass(
            scheme=scheme,
            x=x[b],
            out=out[b],
            kernel=kernel,
            affine=None if affine is None else (affine[0][b], affine[1][b]),
            silu=norm is not None and norm.silu,
            offsets=offsets[b],
            residual=None if after.residual is None else after.residual[b],
            shortcut=shortcut,
            groups=groups,
            in_place=in_place,
        )
        parts = [run.strip(strip) for strip in strips(height, width, tiles, tile_rows)]
        found.append(_finite(parts))
    return out, torch.stack(found)


def tiles_of(scheme: Scheme, weight: Tensor, dtype: torch.dtype) -> int:
    """Tiles that a strip has best."""
    out_channels, channels = weight.shape[:2]
    place = scheme.places * dtype.itemsize
    return strip_bytes(place * channels * out_channels) // (place * (channels + out_channels))


@dataclass
class WinogradPass:
    """One picture's way through a Winograd convolution, a strip at a time from above.

    ``x``: ``(C, H, W)``. ``out``: ``(O, H, W)``, or twice as high and wide if ``scheme`` is a
    doubled map's. ``kernel``: the weight's transform by that scheme. ``affine``: the
    normalisation's scale and shift, ``(C,)`` each. ``offsets``: ``(O,)``. ``residual``:
    ``(R, H, W)``, through a packed ``shortcut`` if that is given. ``groups``: of which sums are
    wanted.
    """

    scheme: Scheme
    x: Tensor
    out: Tensor
    kernel: Tensor
    affine: tuple[Tensor, Tensor] | None
    silu: bool
    offsets: Tensor
    residual: Tensor | None
    shortcut: Tensor | None
    groups: int
    in_place: bool
    # the row before the strip, where the strip before has been written over it
    above: Tensor | None = None

    def __post_init__(self) -> None:
        dtype = self.kernel.dtype
        # as they lie in memory, if they lie so
        self._rows, self._out_rows = dense_rows(self.x, dtype), dense_rows(self.out, dtype)

    def strip(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """Writes a strip; its parts' sums and counts, see `group_stats.combined`."""
        dtype, engine = self.kernel.dtype, engines.of(self.kernel.dtype)
        scheme, (row, end) = self.scheme, strip.reads(self.scheme)
        if self._rows is not None:
            rows, row = self._rows, 0
        else:
            rows = _copied(self.x, row, end, dtype, "input")
        tiles = scratch.take("tiles", (scheme.places, strip.tiles, rows.shape[2]), dtype)
        engine.load(scheme, rows, row, self.above, strip, self.affine, self.silu, tiles)
        if self.in_place:
            self.above = scratch.take("above", tuple(rows.shape[1:]), dtype)
            self.above.copy_(rows[strip.end - 1 - row])
        channels = self.out.shape[0]
        shape = (scheme.places, strip.tiles, engine.width(channels))
        products = scratch.take("products", shape, dtype)
        engine.product(tiles, self.kernel, products)
        residual = self._residual(strip, dtype)
        if self._out_rows is not None:
            out = self._out_rows[strip.first : strip.end]
            return engine.store(scheme, products, strip, self.offsets, residual, out, self.groups)
        shape = (strip.end - strip.first, strip.width, channels)
        out = scratch.take("output", shape, dtype)
        sums = engine.store(scheme, products, strip, self.offsets, residual, out, self.groups)
        self.out[:, strip.first : strip.end].copy_(out.permute(2, 0, 1))
        return sums

    def _residual(self, strip: Strip, dtype: torch.dtype) -> Tensor | None:
        if self.residual is None:
            return None
        rows = _as_rows(self.residual, strip.first, strip.end, dtype, "residual")
        if self.shortcut is None:
            return rows
        channels = self.out.shape[0]
        engine = engines.of(dtype)
        shape = (1, rows.shape[0] * rows.shape[1], engine.width(channels))
        out = scratch.take("shortcut", shape, dtype)
        engine.product(rows.flatten(0, 1).unsqueeze(0), self.shortcut, out)
        return out.view(*rows.shape[:2], -1)[:, :, :channels]


def _pointwise(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution's ``(O, C, 1, 1)`` as a right factor."""
    return weight.flatten(1).T.to(dtype)[None]


def _gathered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 3x3 convolution's ``(O, C, 3, 3)`` as the right factor of patches ``(3 * 3 * C)``."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2).to(dtype)[None]


@cache
def _packed(transform: Transform, dtype: torch.dtype) -> Make:
    """Makes a weight's right factors, packed as the products read them."""
    return lambda weight: engines.of(dtype).pack(transform(weight, dtype))


def transformed(scheme: Scheme, dtype: torch.dtype) -> Make:
    """Makes a 3x3 convolution's weight ready for a scheme's tiles."""
    return _packed(scheme.kernel_transform, dtype)


def gathered(dtype: torch.dtype) -> Make:
    """Makes a 3x3 convolution's weight ready for patches of its input."""
    return _packed(_gathered, dtype)


WINOGRAD = transformed(PLAIN, torch.float32)
DOUBLING = transformed(DOUBLED, torch.float32)
POINTWISE = _packed(_pointwise, torch.float32)


def _rows_for(one: Tensor) -> int:
    return int(max(1, LEAST_BYTES // (4 * one.shape[0] * one.shape[2])))


def _as_rows(one: Tensor, first: int, end: int, dtype: torch.dtype, name: str) -> Tensor:
    """Rows ``first`` to ``end`` of ``(C, H, W)``: as they lie in memory, or copied."""
    rows = dense_rows(one[:, first:end], dtype)
    return _copied(one, first, end, dtype, name) if rows is None else rows


def _copied(one: Tensor, first: int, end: int, dtype: torch.dtype, name: str) -> Tensor:
    part = one[:, first:end].permute(1, 2, 0)
    return scratch.take(name, tuple(part.shape), dtype).copy_(part)


def _finite(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The moments of a picture, which are finite if and only if the picture is."""
    sums, counts = (torch.cat(several) for several in zip(*parts, strict=True))
    if not sums.isfinite().all():
        raise NotFiniteError
    return combined(sums, counts)
