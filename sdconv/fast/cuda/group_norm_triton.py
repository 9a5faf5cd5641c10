"""GroupNorm and SiLU of channels-last feature maps in Triton: two passes over the feature map, one
for the statistics and one to normalise.

Arithmetic is in float32, sums over a group in float64. Each part of a feature map has its own mean
and squared deviations from it, which are combined by the formula of Chan, Golub and LeVeque
(1979), so that values far from zero lose little precision. The order of all sums is fixed, so the
result is the same each time, bit for bit.

The kernels run on a CPU in Triton's interpreter and compile for NVIDIA's architectures. They have
not run on a GPU yet, and nothing here says how fast they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The values and the channels that a program holds at a time, and the most parts of a feature map.
_VALUES, _CHANNELS, _PARTS = 4096, 128, 256
# Parts that are combined at a time.
_MERGED = 32


def _kernel(function: Callable[..., None]) -> Any:
    return triton.jit(function)


@_kernel
def part_stats(
    x: tl.tensor,
    added: tl.tensor,
    parts: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    HAS_ADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Writes each channel's mean and sum of squared deviations, for every part of ``rows`` pixels:
    ``(B, parts, 2, C)``."""
    part, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    offset = tl.zeros([CHANNELS], tl.float32)
    if HAS_ADDED:
        offset = tl.load(added + sample * channels + c, mask=exists, other=0).to(tl.float32)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    first = part * rows
    last = tl.minimum(first + rows, pixels)
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < last)[:, None] & exists[None, :]
        at = (sample * pixels + p)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32) + offset[None, :]
        value = tl.where(inside, value, 0)
        count = tl.minimum(last - start, PIXELS).to(tl.float32)
        before = (start - first).to(tl.float32)
        own_mean = tl.sum(value, 0) / count
        about = tl.where(inside, value - own_mean[None, :], 0)
        step = own_mean - mean
        mean += step * (count / (before + count))
        squares += tl.sum(about * about, 0) + step * step * (before * count / (before + count))
    to = parts + (sample * tl.num_programs(0) + part) * 2 * channels + c
    tl.store(to, mean, mask=exists)
    tl.store(to + channels, squares, mask=exists)


@_kernel
def group_stats(
    parts: tl.tensor,
    stats: tl.tensor,
    count: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    """Writes each group's mean and reciprocal standard deviation, ``(B, G, 2)``, from ``count``
    parts of its ``SIZE`` channels."""
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDTH)
    total = tl.zeros([MERGED, WIDTH], tl.float64)
    for start in range(0, count, MERGED):
        part = start + tl.arange(0, MERGED)
        inside = (part < count)[:, None] & (c < SIZE)[None, :]
        at = (sample * count + part)[:, None] * 2 * channels + group * SIZE + c[None, :]
        values = tl.minimum(pixels - part * rows, rows).to(tl.float64)[:, None]
        total += tl.load(parts + at, mask=inside, other=0).to(tl.float64) * values
    size = tl.cast(pixels, tl.float64) * SIZE
    mean = tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([MERGED, WIDTH], tl.float64)
    for start in range(0, count, MERGED):
        part = start + tl.arange(0, MERGED)
        inside = (part < count)[:, None] & (c < SIZE)[None, :]
        at = (sample * count + part)[:, None] * 2 * channels + group * SIZE + c[None, :]
        values = tl.minimum(pixels - part * rows, rows).to(tl.float64)[:, None]
        about = tl.load(parts + at, mask=inside, other=0).to(tl.float64) - mean
        squares = tl.load(parts + at + channels, mask=inside, other=0).to(tl.float64)
        total += tl.where(inside, squares + about * about * values, 0)
    variance = tl.sum(tl.sum(total, 1), 0) / size
    to = stats + (sample * tl.num_programs(0) + group) * 2
    tl.store(to, mean.to(tl.float32))
    tl.store(to + 1, (1 / tl.sqrt(variance + eps)).to(tl.float32))


@_kernel
def normalise(
    x: tl.tensor,
    added: tl.tensor,
    stats: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    HAS_ADDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Writes ``silu((x + added - mean) / deviation * weight + bias)``."""
    block, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    at = stats + (sample * groups + c // size) * 2
    less = tl.load(at, mask=exists, other=0)
    if HAS_ADDED:
        less -= tl.load(added + sample * channels + c, mask=exists, other=0).to(tl.float32)
    scale = tl.load(at + 1, mask=exists, other=0)
    scale *= tl.load(weight + c, mask=exists, other=0).to(tl.float32)
    shift = tl.load(bias + c, mask=exists, other=0).to(tl.float32)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = (p < pixels)[:, None] & exists[None, :]
    at = (sample * pixels + p)[:, None] * channels + c[None, :]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    value = (value - less[None, :]) * scale[None, :] + shift[None, :]
    value = value / (1 + tl.exp(-value))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def norm_silu(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Implements ``group_norm.norm_silu`` for CUDA tensors."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    added = None if added is None else added.contiguous()
    pixels, size = height * width, channels // groups
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    tile = _VALUES // block
    rows = tile * triton.cdiv(triton.cdiv(pixels, _PARTS), tile)
    count, blocks = triton.cdiv(pixels, rows), triton.cdiv(channels, block)
    parts = x.new_empty(batch, count, 2, channels, dtype=torch.float32)
    stats = x.new_empty(batch, groups, 2, dtype=torch.float32)
    out = torch.empty_like(x)
    more: dict[str, Any] = {"HAS_ADDED": added is not None, "PIXELS": tile, "CHANNELS": block}
    # The tensor's device need not be the current one.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        part_stats[(count, blocks, batch)](x, added, parts, pixels, channels, rows, **more)
        group_stats[(groups, batch)](
            parts, stats, count, pixels, channels, rows, eps,
            SIZE=size, WIDTH=triton.next_power_of_2(size), MERGED=_MERGED,
        )  # fmt: skip
        normalise[(triton.cdiv(pixels, tile), blocks, batch)](
            x, added, stats, weight, bias, out, pixels, channels, groups, size, **more
        )
    return out
