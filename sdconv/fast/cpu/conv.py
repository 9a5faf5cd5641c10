"""3x3 convolutions on a CPU, fused with the normalisation before them and the sums after them.

`plan_for` returns the plan of a convolution; `conv3x3`, `upsample_conv` and `downsample_conv`
follow it: by torch's own operations, by matrix units, or by Winograd's method. This computes an
image in strips of rows that fit a cache: rows are normalised as they are read, multiplied, and
written with bias and residual, while the sums for the next normalisation are computed.

Feature maps are ``(B, C, H, W)`` in float32, float16 or bfloat16 and any memory layout. Winograd's
method computes in float32; matrix units and torch's kernels multiply in the feature map's dtype.
Results are in channels-last order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import amx, torch_kernels
from sdconv.fast.cpu.buffer_pool import copied_rows, dense_rows, empty_nhwc, rows_of, scratch
from sdconv.fast.cpu.cost_constants import constants_for
from sdconv.fast.cpu.cost_model import ConvPlan, packed_bytes, plan_by
from sdconv.fast.cpu.group_stats import affine, combine, group_stats, normalise
from sdconv.fast.cpu.kernels import kernels_for, methods_for
from sdconv.fast.cpu.processor import direct_rate, in_float32
from sdconv.fast.cpu.tiling import MULTIPLE, Strip, bands, strips, whole_strip
from sdconv.fast.cpu.weight_cache import Pack, weight_cache
from sdconv.fast.cpu.winograd import (
    CONV3X3,
    DOWNSAMPLE_CONV,
    OUTPUT_TILE,
    SCHEMES,
    UPSAMPLE_CONV,
    Kind,
    Scheme,
)

# the dtype of tiles and their products, of packed weights, and of shortcuts' products
COMPUTE_DTYPE = torch.float32


class NotFiniteError(ArithmeticError):
    """The output has infinity or NaN, so it has to be computed directly: Winograd's transforms
    spread these over more pixels than direct summation does."""


@dataclass(frozen=True)
class Prologue:
    """GroupNorm, and SiLU if ``silu``, that a convolution applies to its input.

    ``stats``: of the input, ``(B, G, 2)``, see `group_stats`. ``weight``, ``bias``: ``(C,)``.
    """

    stats: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    silu: bool

    def affine(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``shift``, each ``(B, C)``: GroupNorm is ``x * scale + shift``."""
        return affine(self.stats, self.weight, self.bias, self.eps, COMPUTE_DTYPE)

    def apply(self, x: Tensor) -> Tensor:
        """Normalises by these statistics; no gradient flows through them.

        torch's GroupNorm is not used: of a channels-last feature map it takes the variance as
        ``E[x^2] - E[x]^2`` in float32, which loses it where the mean is large.
        """
        x = normalise(x, self.stats, self.weight, self.bias, self.eps)
        return functional.silu(x) if self.silu else x

    def differentiable(self, x: Tensor) -> Tensor:
        """Normalises by torch's own operations, through which gradients flow.

        In channels-first order, whose kernel takes the variance by Welford's method.
        """
        groups = self.stats.shape[1]
        x = functional.group_norm(x.contiguous(), groups, self.weight, self.bias, self.eps)
        return functional.silu(x) if self.silu else x


@dataclass(frozen=True)
class Epilogue:
    """What a convolution adds to its output, and ReLU of the sum if ``relu``.

    ``bias``: ``(O,)``. ``temb``: the projected time embedding of each image, ``(B, O)``.
    ``residual``: a feature map of the output's shape; with ``shortcut``, the input of that 1x1
    convolution ``(weight (O, R, 1, 1), bias (O,))``, whose output is added.
    """

    bias: Tensor | None = None
    temb: Tensor | None = None
    residual: Tensor | None = None
    shortcut: tuple[Tensor, Tensor | None] | None = None
    relu: bool = False

    def offsets(self, batch: int, channels: int) -> Tensor:
        """The terms that all pixels of an image share, ``(B, O)``: both biases and ``temb``."""
        offsets = torch.zeros(batch, channels, dtype=COMPUTE_DTYPE, device="cpu")
        if self.bias is not None:
            offsets += self.bias
        if self.temb is not None:
            offsets += self.temb
        if self.shortcut is not None and self.shortcut[1] is not None:
            offsets += self.shortcut[1]
        return offsets

    def apply(self, y: Tensor) -> Tensor:
        """Applies all but the bias by torch's own operations."""
        if self.temb is not None:
            y = y + self.temb[:, :, None, None]
        if self.residual is not None:
            residual = self.residual
            if self.shortcut is not None:
                residual = functional.conv2d(residual, *self.shortcut)
            y = residual + y
        return y.relu() if self.relu else y


# --- the dispatch


def plan_for(kind: Kind, x: Tensor, weight: Tensor, normalised: bool) -> ConvPlan:
    """The plan of a convolution of ``x``, among the methods that the kernels have and whose packed
    weights have room."""
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    packs = {"winograd": WINOGRAD_PACK[SCHEMES[kind]]}
    if kind in amx.PACK:
        packs["amx"] = amx.PACK[kind]
    sizes = packed_bytes(kind, channels, out_channels)
    numba = kernels_for(COMPUTE_DTYPE) is not torch_kernels
    available = tuple(
        method
        for method in (methods_for(x.dtype) if numba else ("winograd",))
        if method not in sizes or weight_cache.has_room(weight, packs[method], sizes[method])
    )
    shape = batch, channels, out_channels, height, width
    constants = constants_for(torch.get_num_threads())
    return plan_by(kind, shape, normalised, available, direct_rate(x.dtype), constants)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    prologue: Prologue | None,
    epilogue: Epilogue,
    *,
    groups: int,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution with stride 1 and padding 1, by the method of its plan.

    Args:
        x: ``(B, C, H, W)``. weight: ``(O, C, 3, 3)``.
        groups: whose statistics are returned.
        in_place: allow the output to overwrite ``x``, which must be in channels-last order, have
            ``O`` channels and no other reader.

    Returns:
        ``(B, O, H, W)``, and its statistics ``(B, groups, 2)``.

    Raises:
        NotFiniteError: the output is not finite, and ``x`` was overwritten.
    """
    plan = plan_for("conv3x3", x, weight, prologue is not None)
    return run_plan(plan, x, weight, prologue, epilogue, groups, in_place)


def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int
) -> tuple[Tensor, Tensor]:
    """Nearest upsampling by 2, then a 3x3 convolution with padding 1, by the method of its plan.

    Returns:
        ``(B, O, 2H, 2W)``, and its statistics ``(B, groups, 2)``.
    """
    plan = plan_for("upsample_conv", x, weight, False)
    return run_plan(plan, x, weight, None, Epilogue(bias), groups, in_place=False)


def downsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution with stride 2 and padding (0, 1, 0, 1), by the method of its plan.

    Returns:
        ``(B, O, H // 2, W // 2)``, and its statistics ``(B, groups, 2)``.
    """
    plan = plan_for("downsample_conv", x, weight, False)
    return run_plan(plan, x, weight, None, Epilogue(bias), groups, in_place=False)


def run_plan(
    plan: ConvPlan,
    x: Tensor,
    weight: Tensor,
    prologue: Prologue | None,
    epilogue: Epilogue,
    groups: int,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Runs a plan; computes directly if the result of Winograd's method is not finite."""
    if plan.method == "amx":
        return amx_conv(plan.kind, x, weight, prologue, epilogue, groups, in_place)
    if plan.method in PRODUCTS:
        scheme, products = SCHEMES[plan.kind], PRODUCTS[plan.method]
        try:
            return winograd_conv(x, weight, scheme, prologue, epilogue, groups, in_place, products)
        except NotFiniteError:
            if in_place:
                raise
    with in_float32(x.dtype):
        if plan.kind == "upsample_conv":
            out = direct_upsample_conv(x, weight, epilogue.bias)
        elif plan.kind == "downsample_conv":
            out = direct_downsample_conv(x, weight, epilogue.bias)
        else:
            out = direct_conv(x, weight, prologue, epilogue)
    return _with_stats(out, groups)


def _with_stats(out: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    out = out.contiguous(memory_format=torch.channels_last)
    return out, group_stats(out, groups)


# --- direct convolution, by torch's own operations


def direct_conv(x: Tensor, weight: Tensor, prologue: Prologue | None, epilogue: Epilogue) -> Tensor:
    """A 3x3 convolution by torch's own operations, in any dtype."""
    x = x if prologue is None else prologue.apply(x)
    return epilogue.apply(functional.conv2d(x, weight, epilogue.bias, padding=1))


def differentiable_conv(
    x: Tensor, weight: Tensor, prologue: Prologue | None, epilogue: Epilogue
) -> Tensor:
    """`direct_conv`, but for gradients, which also flow through the statistics."""
    x = x if prologue is None else prologue.differentiable(x)
    return epilogue.apply(functional.conv2d(x, weight, epilogue.bias, padding=1))


def direct_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest upsampling and a 3x3 convolution by torch's own operations, in any dtype."""
    x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return functional.conv2d(x, weight, bias, padding=1)


def direct_downsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride 2 and padding (0, 1, 0, 1) by torch's own operations, in any
    dtype.

    Convolves with padding 2 on every side, which needs no padded copy of the feature map, and drops
    the first row and column; the other outputs are the same.
    """
    height, width = (size // 2 for size in x.shape[2:])
    out = functional.conv2d(x, weight, bias, stride=2, padding=2)
    out = out.narrow(2, 1, height).narrow(3, 1, width)
    return out.contiguous(memory_format=torch.channels_last)


def im2col_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with stride 2 and padding 1 by one matrix product, in any dtype: of each
    output's patch with the weight, which is read as it lies. For channels-last order, torch's
    convolution copies the weight in each call, which takes longer than a few pixels' products.

    Returns:
        ``(B, O, ceil(H/2), ceil(W/2))`` in channels-last order.
    """
    rows = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    patches = rows.unfold(1, 3, 2).unfold(2, 3, 2)  # (B, H/2, W/2, C, 3, 3)
    return functional.linear(patches.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def image_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution with padding 1 of an image, for which `preconditions.is_image_conv` holds.

    Returns:
        ``(B, O, H, W)`` in channels-last order, and its statistics ``(B, groups, 2)``.
    """
    stats = []
    batch, _, height, width = x.shape
    out = empty_nhwc(batch, len(weight), height, width, x.dtype)
    for image, made in zip(x, out, strict=True):
        rows = functional.pad(image.permute(1, 2, 0), (0, 0, 1, 1, 1, 1))
        found = image_conv_rows(rows, weight, bias, made.permute(1, 2, 0), groups)
        if found is None:
            return _with_stats(functional.conv2d(x, weight, bias, padding=1), groups)
        stats.append(combine(*found))
    return out, torch.stack(stats)


def image_conv_rows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, groups: int
) -> tuple[Tensor, Tensor] | None:
    """Writes `image_conv`'s output ``(H, W, O)`` for rows ``(H + 2, W + 2, C)`` that have a border;
    returns its sums and counts, see `group_stats.combine`. None where torch's own kernel is as
    good."""
    kernels = kernels_for(COMPUTE_DTYPE)
    right = weight.permute(2, 3, 1, 0).flatten(0, 2).to(COMPUTE_DTYPE)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    rows, bias = rows.to(COMPUTE_DTYPE).contiguous(), bias.to(COMPUTE_DTYPE)
    return kernels.image_conv(rows, kernels.pack(right[None]), bias, out, groups)


# --- matrix units


def amx_conv(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    prologue: Prologue | None,
    epilogue: Epilogue,
    groups: int,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution of ``(B, C, H, W)`` in bfloat16 and any memory layout, at stride 1 or after
    upsampling; ``C`` is a multiple of 16 where there is a prologue. The output overwrites ``x`` if
    ``in_place``.

    Returns:
        ``(B, O, H, W)``, or twice as large after upsampling, in channels-last order, and its
        statistics ``(B, groups, 2)``.
    """
    batch, _, height, width = x.shape
    out_channels, stats = len(weight), []
    factor, packed = amx.FACTOR[kind], weight_cache.get(weight, amx.PACK[kind])
    shape = batch, out_channels, factor * height, factor * width
    out = x if in_place else empty_nhwc(*shape, x.dtype)
    offsets = epilogue.offsets(batch, out_channels)
    norm = None if prologue is None else prologue.affine()
    residual, shortcut = epilogue.residual, None
    if epilogue.shortcut is not None:
        shortcut = weight_cache.get(epilogue.shortcut[0], amx.pack_conv)
    for b in range(batch):
        conv = amx.AmxConv(
            kind,
            packed,
            out_channels,
            offsets[b],
            affine=None if norm is None else (norm[0][b], norm[1][b]),
            silu=prologue is not None and prologue.silu,
            shortcut=shortcut,
            relu=epilogue.relu,
        )
        added = None if residual is None else amx.rows_of(residual[b])
        sums, counts = conv.run(amx.rows_of(x[b]), 0, height, added, out[b].permute(1, 2, 0))
        size = out_channels // groups
        stats.append(combine(sums.reshape(height, groups, size, 2).sum(2), counts * size))
    return out, torch.stack(stats)


# --- Winograd's method

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
        self._rows = dense_rows(self.x)
        self._out_rows = dense_rows(self.out)

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
            residual = dense_rows(self.residual)
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
            rows = copied_rows(part, self.x.dtype, "input")
        blocks = self.multiply.blocks
        shape = strip.tiles, rows.shape[2] // blocks
        tiles = scratch.planes("tiles", blocks * scheme.positions, shape, COMPUTE_DTYPE)
        tiles = tiles.view(blocks, scheme.positions, *shape)
        kernels.input_transform(strip, rows, row, self.above, self.affine, self.silu, tiles)
        if self.in_place:
            self.above = scratch.take("above", tuple(rows.shape[1:]), rows.dtype)
            self.above.copy_(rows[strip.end - 1 - row])
        shape = (strip.tiles, kernels.padded(len(self.out)))
        products = scratch.planes("products", scheme.positions, shape, COMPUTE_DTYPE)
        self.multiply.into(tiles, products)
        first, end = strip.first - self.out_row, strip.end - self.out_row
        residual = self._residual(first, end)
        if self._out_rows is not None:
            out = self._out_rows[first:end]
        else:
            size = end - first, strip.width, len(self.out)
            out = scratch.take("output", size, self.out.dtype)
        sums = kernels.output_transform(
            strip, products, self.offsets, residual, self.relu, out, self.groups
        )
        if self._out_rows is None:
            self.out[:, first:end] = out.permute(2, 0, 1)
        return sums

    def _residual(self, first: int, end: int) -> Tensor | None:
        if self.residual is None:
            return None
        if self.shortcut is None:
            return rows_of(self.residual, first, end, "residual")
        rows = rows_of(self.residual, first, end, "residual", COMPUTE_DTYPE)
        channels, kernels = self.out.shape[0], kernels_for(COMPUTE_DTYPE)
        shape = (1, rows.shape[0] * rows.shape[1], kernels.padded(channels))
        out = scratch.take("shortcut", shape, COMPUTE_DTYPE)
        kernels.bmm(rows.flatten(0, 1).unsqueeze(0), self.shortcut, out)
        return out.view(*rows.shape[:2], -1)[:, :, :channels]
