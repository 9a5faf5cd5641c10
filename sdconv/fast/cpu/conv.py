"""3x3 convolutions on a CPU, fused with the normalisation before them and the sums after them.

`plan_for` returns the plan of a convolution; `conv3x3`, `upsample_conv` and `downsample_conv`
follow it: by Winograd's method, by matrix units, or by torch's own operations.

Feature maps are ``(B, C, H, W)`` in float32, float16 or bfloat16 and any memory layout. Arithmetic
is in float32. Results are in channels-last order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import amx, torch_kernels
from sdconv.fast.cpu.cost_constants import constants_for
from sdconv.fast.cpu.cost_model import SCHEMES, ConvPlan, Kind, packed_bytes, plan_by
from sdconv.fast.cpu.fusion import COMPUTE_DTYPE, Epilogue, Prologue
from sdconv.fast.cpu.group_stats import group_stats
from sdconv.fast.cpu.kernels import kernels_for, methods_for
from sdconv.fast.cpu.processor import direct_rate
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd_conv import PRODUCTS, WINOGRAD_PACK, NotFiniteError, winograd_conv


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
        return amx_conv(plan.kind, x, weight, prologue, epilogue, groups)
    if plan.method in PRODUCTS:
        scheme, products = SCHEMES[plan.kind], PRODUCTS[plan.method]
        try:
            return winograd_conv(x, weight, scheme, prologue, epilogue, groups, in_place, products)
        except NotFiniteError:
            if in_place:
                raise
    if plan.kind == "upsample_conv":
        return _with_stats(direct_upsample_conv(x, weight, epilogue.bias), groups)
    if plan.kind == "downsample_conv":
        return _with_stats(direct_downsample_conv(x, weight, epilogue.bias), groups)
    return _with_stats(direct_conv(x, weight, prologue, epilogue), groups)


def _with_stats(out: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    out = out.contiguous(memory_format=torch.channels_last)
    return out, group_stats(out, groups)


# --- the methods beside Winograd's


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


def amx_conv(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    prologue: Prologue | None,
    epilogue: Epilogue,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution of bfloat16 by matrix units, at stride 1 or after upsampling."""
    shortcut = None
    if epilogue.shortcut is not None:
        shortcut = weight_cache.get(epilogue.shortcut[0], amx.pack_conv)
    return amx.amx_conv(
        kind,
        x,
        weight_cache.get(weight, amx.PACK[kind]),
        None if prologue is None else prologue.affine(),
        prologue is not None and prologue.silu,
        epilogue.offsets(len(x), len(weight)),
        epilogue.residual,
        shortcut,
        epilogue.relu,
        groups,
    )
