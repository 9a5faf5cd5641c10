"""3x3 convolutions by Winograd's method, which `sdconv.fast.cpu.winograd` derives.

An image is computed in strips of rows that fit a cache: rows are normalised as they are read,
multiplied, and written with bias and residual, while the sums for the next normalisation are
computed. Where the weight is packed, threads take bands of rows through all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.fast.cpu.buffer_pool import copied_rows, dense_rows, empty_nhwc, rows_of, scratch
from sdconv.fast.cpu.fusion import COMPUTE_DTYPE, Epilogue, Prologue
from sdconv.fast.cpu.group_stats import combine
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.tiling import MULTIPLE, Strip, bands, strips, whole_strip
from sdconv.fast.cpu.weight_cache import Pack, weight_cache
from sdconv.fast.cpu.winograd import (
    CONV3X3,
    DOWNSAMPLE_CONV,
    OUTPUT_TILE,
    UPSAMPLE_CONV,
    Scheme,
)


class NotFiniteError(ArithmeticError):
    """The output has infinity or NaN, so it has to be computed directly: Winograd's transforms
    spread these over more pixels than direct summation does."""


# packed weights, each by a module-level function, which is a key of the weight cache


def pack_winograd(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` transformed by F(4x4, 3x3)."""
    return kernels_for(COMPUTE_DTYPE).pack_kernels(CONV3X3, weight)


def pack_upsample(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` transformed for an upsampled input."""
    return kernels_for(COMPUTE_DTYPE).pack_kernels(UPSAMPLE_CONV, weight)


def pack_downsample(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` transformed for stride 2."""
    return kernels_for(COMPUTE_DTYPE).pack_kernels(DOWNSAMPLE_CONV, weight)


def pack_pointwise(weight: Tensor) -> Tensor:
    """A 1x1 convolution's ``(O, C, 1, 1)`` as a right factor."""
    return kernels_for(COMPUTE_DTYPE).pack(weight.flatten(1).T.to(COMPUTE_DTYPE)[None])


WINOGRAD_PACK: dict[Scheme, Pack] = {
    CONV3X3: pack_winograd,
    UPSAMPLE_CONV: pack_upsample,
    DOWNSAMPLE_CONV: pack_downsample,
}


@dataclass(frozen=True)
class Multiply:
    """Multiplies a strip's tiles by a weight.

    ``into``: takes tiles ``(blocks, positions, T, C / blocks)`` and writes the products
    ``(positions, T, padded(O))``. ``blocks``: of channels, each with its tiles in one place.
    ``packed``: the packed weight, if there is one.
    """

    into: Callable[[Tensor, Tensor], None]
    blocks: int = 1
    packed: Tensor | None = None


def by_packed(packed: Tensor, scheme: Scheme) -> Multiply:
    """Products with a packed weight."""
    kernels, order = kernels_for(COMPUTE_DTYPE), scheme.order
    return Multiply(lambda tiles, out: kernels.bmm(tiles[0], packed, out, order), packed=packed)


def cached_products(weight: Tensor, scheme: Scheme) -> Multiply:
    """Products with a weight that is packed once and kept."""
    return by_packed(weight_cache.get(weight, WINOGRAD_PACK[scheme]), scheme)


def uncached_products(weight: Tensor, scheme: Scheme) -> Multiply:
    """Products with a weight that is transformed for each strip."""
    kernels = kernels_for(COMPUTE_DTYPE)
    # in one block, each row of each position would be on a page of its own: more pages than the
    # processor has addresses of at hand
    return Multiply(
        lambda tiles, out: kernels.multiply_tiles(scheme, tiles, weight, out),
        blocks=weight.shape[1] // MULTIPLE,
    )


PRODUCTS: dict[str, Callable[[Tensor, Scheme], Multiply]] = {
    "winograd": cached_products,
    "winograd_uncached": uncached_products,
}
"""The methods that are Winograd's, by the products that they use."""


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    scheme: Scheme,
    prologue: Prologue | None,
    epilogue: Epilogue,
    groups: int,
    in_place: bool = False,
    products: Callable[[Tensor, Scheme], Multiply] = cached_products,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution of ``x``, at stride 1, at stride 2 or after upsampling, as ``scheme`` says.

    Raises:
        NotFiniteError: the output is not finite; ``x`` is overwritten if ``in_place``.
    """
    batch, out_channels = len(x), len(weight)
    height, width = (size * OUTPUT_TILE // scheme.step for size in x.shape[2:])
    out = x if in_place else empty_nhwc(batch, out_channels, height, width, x.dtype)
    offsets = epilogue.offsets(batch, out_channels)
    norm = None if prologue is None else prologue.affine()
    multiply = products(weight, scheme)
    shortcut, stats = None, []
    if epilogue.shortcut is not None:
        shortcut = weight_cache.get(epilogue.shortcut[0], pack_pointwise)
    for b in range(batch):
        run = WinogradPass(
            scheme=scheme,
            x=x[b],
            out=out[b],
            multiply=multiply,
            affine=None if norm is None else (norm[0][b], norm[1][b]),
            silu=prologue is not None and prologue.silu,
            offsets=offsets[b],
            residual=None if epilogue.residual is None else epilogue.residual[b],
            shortcut=shortcut,
            relu=epilogue.relu,
            groups=groups,
            in_place=in_place,
        )
        sums, counts = run.image()
        # finite if and only if the whole output is
        if not sums.isfinite().all():
            raise NotFiniteError
        stats.append(combine(sums, counts))
    return out, torch.stack(stats)


@dataclass
class WinogradPass:
    """Computes one image's Winograd convolution strip by strip, from the top.

    ``x``: ``(C, H, W)``. ``out``: ``(O, H, W)``, or ``(O, 2H, 2W)`` where ``scheme`` upsamples.
    ``multiply``: the products with the weight. ``affine``: the normalisation's scale and shift,
    ``(C,)`` each. ``offsets``: ``(O,)``. ``residual``: ``(R, H, W)``, multiplied by the packed
    ``shortcut`` if there is one. ``relu``: whether ReLU follows. ``groups``: whose sums are
    returned. ``in_place``: whether ``out`` is ``x``. ``x_row``, ``out_row``: the numbers of the
    first rows of ``x``, and of ``out`` and ``residual``, where these are only parts of an image.
    """

    scheme: Scheme
    x: Tensor
    out: Tensor
    multiply: Multiply
    affine: tuple[Tensor, Tensor] | None
    silu: bool
    offsets: Tensor
    residual: Tensor | None
    shortcut: Tensor | None
    relu: bool
    groups: int
    in_place: bool
    x_row: int = 0
    out_row: int = 0
    # the input row before the strip, where the strip before has overwritten it
    above: Tensor | None = None

    def __post_init__(self) -> None:
        self._rows = dense_rows(self.x, COMPUTE_DTYPE)
        self._out_rows = dense_rows(self.out, COMPUTE_DTYPE)

    def image(self) -> tuple[Tensor, Tensor]:
        """Writes the whole output; returns its sums and counts, see `group_stats.combine`."""
        (out_channels, height, width), channels = self.out.shape, len(self.x)
        found = self._in_bands(whole_strip(self.scheme, height, width))
        if found is not None:
            return found
        parts = [
            self.strip(strip)
            for strip in strips(self.scheme, height, width, channels, out_channels)
        ]
        sums, counts = (torch.cat(several) for several in zip(*parts, strict=True))
        return sums, counts

    def _in_bands(self, whole: Strip) -> tuple[Tensor, Tensor] | None:
        """`image` in one call; None where it has to be or is better computed strip by strip."""
        rows, out, residual, packed = self._rows, self._out_rows, None, self.multiply.packed
        division = bands(whole, len(self.x), len(self.out), torch.get_num_threads())
        if rows is None or out is None or packed is None or division is None:
            return None
        if self.residual is not None:
            residual = dense_rows(self.residual, COMPUTE_DTYPE)
            if residual is None:  # has to be copied
                return None
        return kernels_for(COMPUTE_DTYPE).conv_in_bands(
            whole,
            division,
            rows,
            self.affine,
            self.silu,
            packed,
            self.offsets,
            residual,
            self.shortcut,
            self.relu,
            out,
            self.groups,
        )

    def strip(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """Writes a strip of the output; returns its sums and counts, see `group_stats.combine`."""
        kernels, scheme, (row, end) = kernels_for(COMPUTE_DTYPE), self.scheme, strip.input_rows
        if self._rows is not None:
            rows, row = self._rows, self.x_row
        else:
            part = self.x[:, row - self.x_row : end - self.x_row]
            rows = copied_rows(part, COMPUTE_DTYPE, "input")
        blocks = self.multiply.blocks
        shape = strip.tiles, rows.shape[2] // blocks
        tiles = scratch.planes("tiles", blocks * scheme.positions, shape, COMPUTE_DTYPE)
        tiles = tiles.view(blocks, scheme.positions, *shape)
        kernels.input_transform(strip, rows, row, self.above, self.affine, self.silu, tiles)
        if self.in_place:
            self.above = scratch.take("above", tuple(rows.shape[1:]), COMPUTE_DTYPE)
            self.above.copy_(rows[strip.end - 1 - row])
        channels = self.out.shape[0]
        shape = (strip.tiles, kernels.padded(channels))
        products = scratch.planes("products", scheme.positions, shape, COMPUTE_DTYPE)
        self.multiply.into(tiles, products)
        first, end = strip.first - self.out_row, strip.end - self.out_row
        residual = self._residual(first, end)
        if self._out_rows is not None:
            out = self._out_rows[first:end]
        else:
            out = scratch.take("output", (end - first, strip.width, channels), COMPUTE_DTYPE)
        sums = kernels.output_transform(
            strip, products, self.offsets, residual, self.relu, out, self.groups
        )
        if self._out_rows is None:
            self.out[:, first:end].copy_(out.permute(2, 0, 1))
        return sums

    def _residual(self, first: int, end: int) -> Tensor | None:
        if self.residual is None:
            return None
        rows = rows_of(self.residual, first, end, COMPUTE_DTYPE, "residual")
        if self.shortcut is None:
            return rows
        channels, kernels = self.out.shape[0], kernels_for(COMPUTE_DTYPE)
        shape = (1, rows.shape[0] * rows.shape[1], kernels.padded(channels))
        out = scratch.take("shortcut", shape, COMPUTE_DTYPE)
        kernels.bmm(rows.flatten(0, 1).unsqueeze(0), self.shortcut, out)
        return out.view(*rows.shape[:2], -1)[:, :, :channels]
