"""3x3 convolutions on a CPU, fused with the normalisation before them and the sums after them.

`plan_for` returns the plan of a convolution; `conv3x3` and `upsample_conv` follow it.
Winograd's method computes an image in strips of rows that fit a cache: rows are normalised as they
are read, multiplied, and written with bias and residual, while the sums for the next normalisation
are computed.

Feature maps are ``(B, C, H, W)`` in float32, float16 or bfloat16 and any memory layout. Arithmetic
is in float32. Results are in channels-last order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.buffer_pool import copied_rows, dense_rows, empty_nhwc, rows_of, scratch
from sdconv.fast.cpu.cost_constants import constants_for
from sdconv.fast.cpu.cost_model import SCHEMES, ConvPlan, Kind, packed_bytes, plan_by
from sdconv.fast.cpu.group_stats import affine, combine, group_stats, normalise
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.processor import direct_rate
from sdconv.fast.cpu.tiling import Strip, strips
from sdconv.fast.cpu.weight_cache import Pack, weight_cache
from sdconv.fast.cpu.winograd import CONV3X3, OUTPUT_TILE, UPSAMPLE_CONV, Scheme

# the dtype of the arithmetic, in which strips, scratch memory and packed weights are
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
        offsets = torch.zeros(batch, channels, dtype=COMPUTE_DTYPE)
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


# --- packed weights, each by a module-level function, which is a key of the weight cache


def pack_winograd(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` transformed by F(4x4, 3x3)."""
    return kernels_for(COMPUTE_DTYPE).pack(CONV3X3.kernel_transform(weight))


def pack_upsample(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` transformed for an upsampled input."""
    return kernels_for(COMPUTE_DTYPE).pack(UPSAMPLE_CONV.kernel_transform(weight))


def pack_im2col(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` as the right factor of patches ``(3 * 3 * C)``."""
    right = weight.permute(2, 3, 1, 0).flatten(0, 2).to(COMPUTE_DTYPE)
    return kernels_for(COMPUTE_DTYPE).pack(right[None])


def pack_pointwise(weight: Tensor) -> Tensor:
    """A 1x1 convolution's ``(O, C, 1, 1)`` as a right factor."""
    return kernels_for(COMPUTE_DTYPE).pack(weight.flatten(1).T.to(COMPUTE_DTYPE)[None])


WINOGRAD_PACK: dict[Scheme, Pack] = {CONV3X3: pack_winograd, UPSAMPLE_CONV: pack_upsample}
_PACK: dict[Kind, dict[str, Pack]] = {
    "conv3x3": {"winograd": pack_winograd, "im2col": pack_im2col},
    "upsample_conv": {"winograd": pack_upsample},
}


# --- the dispatch


def plan_for(kind: Kind, x: Tensor, weight: Tensor, normalised: bool) -> ConvPlan:
    """The plan of a convolution of ``x``, among the methods whose packed weights have room."""
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    size = packed_bytes(kind, channels, out_channels)
    available = tuple(
        method
        for method, pack in _PACK[kind].items()
        if weight_cache.has_room(weight, pack, size[method])
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


def run_plan(
    plan: ConvPlan,
    x: Tensor,
    weight: Tensor,
    prologue: Prologue | None,
    epilogue: Epilogue,
    groups: int,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Runs a plan; computes directly if the result of its method is not finite."""
    if plan.method == "im2col":
        out, stats = _with_stats(im2col_conv(x, weight, prologue, epilogue), groups)
        # a weight that is not finite makes NaN of the padding's zeros, which torch never reads
        if stats.isfinite().all():
            return out, stats
    if plan.method == "winograd":
        scheme = SCHEMES[plan.kind]
        try:
            return winograd_conv(x, weight, scheme, prologue, epilogue, groups, in_place)
        except NotFiniteError:
            if in_place:
                raise
    if plan.kind == "upsample_conv":
        return _with_stats(direct_upsample_conv(x, weight, epilogue.bias), groups)
    return _with_stats(direct_conv(x, weight, prologue, epilogue), groups)


def _with_stats(out: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    out = out.contiguous(memory_format=torch.channels_last)
    return out, group_stats(out, groups)


# --- the methods


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


def im2col_conv(x: Tensor, weight: Tensor, prologue: Prologue | None, epilogue: Epilogue) -> Tensor:
    """A 3x3 convolution as one matrix product of im2col patches with a packed weight.

    For small feature maps: torch's kernel reorders a weight in each call, which for 1280 channels
    at 8x8 takes longer than the convolution itself.
    """
    batch, channels, height, width = x.shape
    out_channels, kernels = len(weight), kernels_for(COMPUTE_DTYPE)
    rows = (x if prologue is None else prologue.apply(x)).permute(0, 2, 3, 1).to(COMPUTE_DTYPE)
    rows = functional.pad(rows, (0, 0, 1, 1, 1, 1))
    patches = rows.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    patches = patches.reshape(1, batch * height * width, 9 * channels).contiguous()
    packed = weight_cache.get(weight, pack_im2col)
    out = torch.empty(1, patches.shape[1], kernels.padded(out_channels), dtype=COMPUTE_DTYPE)
    kernels.bmm(patches, packed, out)
    out = out[0, :, :out_channels].view(batch, height, width, out_channels)
    if epilogue.bias is not None:
        out = out + epilogue.bias
    return epilogue.apply(out.permute(0, 3, 1, 2).to(x.dtype)).contiguous(
        memory_format=torch.channels_last
    )


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    scheme: Scheme,
    prologue: Prologue | None,
    epilogue: Epilogue,
    groups: int,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution of ``x``, or of ``x`` upsampled by 2, as ``scheme`` says.

    Raises:
        NotFiniteError: the output is not finite; ``x`` is overwritten if ``in_place``.
    """
    batch, (out_channels, channels) = len(x), weight.shape[:2]
    height, width = (size * OUTPUT_TILE // scheme.step for size in x.shape[2:])
    out = x if in_place else empty_nhwc(batch, out_channels, height, width, x.dtype)
    offsets = epilogue.offsets(batch, out_channels)
    norm = None if prologue is None else prologue.affine()
    packed = weight_cache.get(weight, WINOGRAD_PACK[scheme])
    shortcut, stats = None, []
    if epilogue.shortcut is not None:
        shortcut = weight_cache.get(epilogue.shortcut[0], pack_pointwise)
    for b in range(batch):
        run = WinogradPass(
            scheme=scheme,
            x=x[b],
            out=out[b],
            weight=packed,
            affine=None if norm is None else (norm[0][b], norm[1][b]),
            silu=prologue is not None and prologue.silu,
            offsets=offsets[b],
            residual=None if epilogue.residual is None else epilogue.residual[b],
            shortcut=shortcut,
            relu=epilogue.relu,
            groups=groups,
            in_place=in_place,
        )
        parts = [
            run.strip(strip) for strip in strips(scheme, height, width, channels, out_channels)
        ]
        sums, counts = (torch.cat(several) for several in zip(*parts, strict=True))
        # finite if and only if the whole output is
        if not sums.isfinite().all():
            raise NotFiniteError
        stats.append(combine(sums, counts))
    return out, torch.stack(stats)


@dataclass
class WinogradPass:
    """Computes one image's Winograd convolution strip by strip, from the top.

    ``x``: ``(C, H, W)``. ``out``: ``(O, H, W)``, or ``(O, 2H, 2W)`` where ``scheme`` upsamples.
    ``weight``: packed for ``scheme``. ``affine``: the normalisation's scale and shift, ``(C,)``
    each. ``offsets``: ``(O,)``. ``residual``: ``(R, H, W)``, multiplied by the packed ``shortcut``
    if there is one. ``relu``: whether ReLU follows. ``groups``: whose sums are returned.
    ``in_place``: whether ``out`` is ``x``. ``x_row``, ``out_row``: the numbers of the first rows of
    ``x``, and of ``out`` and ``residual``, where these are only parts of an image.
    """

    scheme: Scheme
    x: Tensor
    out: Tensor
    weight: Tensor
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

    def strip(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """Writes a strip of the output; returns its sums and counts, see `group_stats.combine`."""
        kernels, scheme, (row, end) = kernels_for(COMPUTE_DTYPE), self.scheme, strip.input_rows
        if self._rows is not None:
            rows, row = self._rows, self.x_row
        else:
            part = self.x[:, row - self.x_row : end - self.x_row]
            rows = copied_rows(part, COMPUTE_DTYPE, "input")
        tiles = scratch.planes(
            "tiles", scheme.positions, (strip.tiles, rows.shape[2]), COMPUTE_DTYPE
        )
        kernels.input_transform(strip, rows, row, self.above, self.affine, self.silu, tiles)
        if self.in_place:
            self.above = scratch.take("above", tuple(rows.shape[1:]), COMPUTE_DTYPE)
            self.above.copy_(rows[strip.end - 1 - row])
        channels = self.out.shape[0]
        shape = (strip.tiles, kernels.padded(channels))
        products = scratch.planes("products", scheme.positions, shape, COMPUTE_DTYPE)
        kernels.bmm(tiles, self.weight, products)
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
