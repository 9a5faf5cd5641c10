"""The Triton kernels: what follows a convolution, GroupNorm's statistics, GroupNorm itself, and the
summed taps of upsampling convolutions.

`sum_and_stats` is one pass over a channels-last feature map: it adds what a convolution was called
without (bias, time embedding, residual), writes the sum, and takes the sum's statistics. Each part
of a few hundred pixels is a program of its own, so that a feature map of 512 channels and 64x64
pixels has 1024 programs, and one of 128 channels and 1024x1024 pixels 2048. `combine` merges the
parts' statistics into those of groups, and `normalise` applies them. `normalise_group` does all of
it for a small feature map. `add_taps` is independent of them, see :mod:`sdconv.fast.cuda.upsample`.

All arithmetic is in float32. Statistics are kept as means and sums of squared deviations from the
mean, updated by Welford's formula (1962) and merged by that of Chan, Golub and LeVeque (1979). Sums
of means are taken relative to one of them, so that values far from zero lose little precision. How
a feature map is divided depends on its size alone and the order of all sums is fixed: the result is
the same bits each time, on each GPU and in each batch.

On an H200, `normalise` and `sum_and_stats` of 128 channels and 1024x1024 pixels take 1.15 and 1.3
times as long as a copy of the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdconv.fast.cuda.choices import Tiling


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit``, which has no types."""
    return triton.jit(function)


@dataclass(frozen=True)
class Division:
    """One feature map divided: ``channels`` and ``pixels`` of a tile, ``blocks`` of channels, and
    ``parts`` of ``rows`` pixels, each with statistics of its own."""

    channels: int
    pixels: int
    blocks: int
    parts: int
    rows: int


@cache
def divide(channels: int, pixels: int, tiling: Tiling) -> Division:
    """Divides a feature map. The batch has no part in it, and changes no sample's result."""
    block = min(tiling.channels, _power_of_2(channels))
    tile = max(tiling.values // block, 1)
    blocks = _divided(channels, block)
    tiles = _divided(pixels, tile)
    rows = tile * _divided(tiles * blocks, tiling.programs)
    return Division(block, tile, blocks, _divided(pixels, rows), rows)


def _divided(number: int, by: int) -> int:
    """Rounded up. Triton's own function takes as long as launching a kernel."""
    return -(-number // by)


def _power_of_2(number: int) -> int:
    """The least one that is no less than a number."""
    return 1 << (number - 1).bit_length()


@kernel
def sum_and_stats(
    x: tl.tensor,
    bias: tl.tensor,
    added: tl.tensor,
    residual: tl.tensor,
    residual_bias: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    SUBPIXEL: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Adds to ``x``, for each pixel and channel, ``bias`` (C,), ``added`` (B, C), ``residual``
    (B, H, W, C) and ``residual_bias`` (C,); writes the sum to ``out``, and each part's mean and sum
    of squared deviations in each channel to ``parts``, (B, parts, 2, C). Each of them may be None.

    With ``SUBPIXEL``, ``x`` is (B, H/2 + 1, W/2 + 1, 2, 2, C): for even and odd rows and columns, a
    convolution that begins one pixel early.
    """
    part, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    offset = tl.zeros([CHANNELS], tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, mask=exists, other=0).to(tl.float32)
    if added is not None:
        offset += tl.load(added + sample * channels + c, mask=exists, other=0).to(tl.float32)
    if residual_bias is not None:
        offset += tl.load(residual_bias + c, mask=exists, other=0).to(tl.float32)
    mean = tl.zeros([PIXELS, CHANNELS], tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
    first = part * rows
    last = tl.minimum(first + rows, pixels)
    number = 0
    for start in range(first, last, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < last)[:, None] & exists[None, :]
        at = (sample * pixels + p)[:, None] * channels + c[None, :]
        source = at
        if SUBPIXEL:
            row, column = p // width, p % width
            odd_row, odd_column = row % 2, column % 2
            row, column = row // 2 + odd_row, column // 2 + odd_column
            # a row of x has width / 2 + 1 pixels, and x (H/2 + 1) rows: pixels / width / 2 + 1
            pixel = (sample * (pixels // width // 2 + 1) + row) * (width // 2 + 1) + column
            phase = pixel * 4 + odd_row * 2 + odd_column
            source = phase[:, None] * channels + c[None, :]
        value = tl.load(x + source, mask=inside, other=0).to(tl.float32) + offset[None, :]
        if residual is not None:
            value += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        if out is not None:
            rounded = value.to(out.dtype.element_ty)
            tl.store(out + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
        if parts is not None:
            number += 1
            step = value - mean
            updated = mean + step * (1.0 / number)
            squares = tl.where(inside, squares + step * (value - updated), squares)
            mean = tl.where(inside, updated, mean)
    if parts is not None:
        slot = tl.arange(0, PIXELS)
        # how many pixels the statistics at each position of the tile are of
        counts = tl.maximum(last - first - slot + PIXELS - 1, 0) // PIXELS
        counts = counts.to(tl.float32)[:, None]
        pivot = tl.sum(tl.where((slot == 0)[:, None], mean, 0), 0)
        about = tl.where(counts > 0, mean - pivot[None, :], 0)
        total = tl.sum(about * counts, 0) / (last - first).to(tl.float32)
        about = tl.where(counts > 0, about - total[None, :], 0)
        to = parts + (sample * tl.num_programs(0) + part) * 2 * channels + c
        tl.store(to, pivot + total, mask=exists)
        tl.store(to + channels, tl.sum(squares + about * about * counts, 0), mask=exists)


@kernel
def combine(
    parts: tl.tensor,
    stats: tl.tensor,
    count: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    rows: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    """Writes each group's mean and variance, ``(B, G, 2)``, from ``count`` parts of its ``SIZE``
    channels."""
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDTH)
    base = parts + sample * count * 2 * channels + group * SIZE
    pivot = tl.load(base)
    size = pixels.to(tl.float32) * SIZE
    total = tl.zeros([MERGED, WIDTH], tl.float32)
    for start in range(0, count, MERGED):
        part = start + tl.arange(0, MERGED)
        inside = (part < count)[:, None] & (c < SIZE)[None, :]
        at = part[:, None] * 2 * channels + c[None, :]
        counts = tl.minimum(pixels - part * rows, rows).to(tl.float32)[:, None]
        about = tl.load(base + at, mask=inside, other=0) - pivot
        total += tl.where(inside, about * counts, 0)
    shift = tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([MERGED, WIDTH], tl.float32)
    for start in range(0, count, MERGED):
        part = start + tl.arange(0, MERGED)
        inside = (part < count)[:, None] & (c < SIZE)[None, :]
        at = part[:, None] * 2 * channels + c[None, :]
        counts = tl.minimum(pixels - part * rows, rows).to(tl.float32)[:, None]
        about = tl.load(base + at, mask=inside, other=0) - pivot - shift
        squares = tl.load(base + at + channels, mask=inside, other=0)
        total += tl.where(inside, squares + about * about * counts, 0)
    to = stats + (sample * tl.num_programs(0) + group) * 2
    tl.store(to, pivot + shift)
    tl.store(to + 1, tl.sum(tl.sum(total, 1), 0) / size)


@kernel
def normalise(
    x: tl.tensor,
    bias: tl.tensor,
    added: tl.tensor,
    stats: tl.tensor,
    weight: tl.tensor,
    shift: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Writes ``(x + bias + added - mean) / deviation * weight + shift``, and SiLU of it."""
    block, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    at = stats + (sample * groups + c // size) * 2
    less = tl.load(at, mask=exists, other=0)
    if bias is not None:
        less -= tl.load(bias + c, mask=exists, other=0).to(tl.float32)
    if added is not None:
        less -= tl.load(added + sample * channels + c, mask=exists, other=0).to(tl.float32)
    scale = tl.load(weight + c, mask=exists, other=0).to(tl.float32)
    scale /= tl.sqrt(tl.load(at + 1, mask=exists, other=0) + eps)
    offset = tl.load(shift + c, mask=exists, other=0).to(tl.float32)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = (p < pixels)[:, None] & exists[None, :]
    at = (sample * pixels + p)[:, None] * channels + c[None, :]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    value = (value - less[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        value = value / (1 + tl.exp(-value))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@kernel
def normalise_group(
    x: tl.tensor,
    bias: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    shift: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    SILU: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    """`sum_and_stats`, `combine` and `normalise` in one, for a small feature map: a program reads
    one group of ``SIZE`` channels three times."""
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = tl.arange(0, WIDTH)
    exists = own < SIZE
    c = group * SIZE + own
    offset = tl.zeros([WIDTH], tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, mask=exists, other=0).to(tl.float32)
    if added is not None:
        offset += tl.load(added + sample * channels + c, mask=exists, other=0).to(tl.float32)
    first = sample * pixels * channels + c
    size = pixels.to(tl.float32) * SIZE
    # sums relative to one of the values, so that values far from zero lose little
    pivot = tl.load(x + sample * pixels * channels + group * SIZE).to(tl.float32)
    total = tl.zeros([PIXELS, WIDTH], tl.float32)
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & exists[None, :]
        value = tl.load(x + p[:, None] * channels + first[None, :], mask=inside, other=0)
        about = value.to(tl.float32) - pivot + offset[None, :]
        total += tl.where(inside, about, 0)
    mean = pivot + tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([PIXELS, WIDTH], tl.float32)
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & exists[None, :]
        value = tl.load(x + p[:, None] * channels + first[None, :], mask=inside, other=0)
        about = value.to(tl.float32) - mean + offset[None, :]
        total += tl.where(inside, about * about, 0)
    scale = tl.load(weight + c, mask=exists, other=0).to(tl.float32)
    scale /= tl.sqrt(tl.sum(tl.sum(total, 1), 0) / size + eps)
    add = tl.load(shift + c, mask=exists, other=0).to(tl.float32)
    for start in range(0, pixels, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & exists[None, :]
        at = p[:, None] * channels + first[None, :]
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        value = (value - mean + offset[None, :]) * scale[None, :] + add[None, :]
        if SILU:
            value = value / (1 + tl.exp(-value))
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@kernel
def add_taps(
    weight: tl.tensor,
    out: tl.tensor,
    outputs: tl.tensor,
    channels: tl.tensor,
    from_output: tl.tensor,
    from_channel: tl.tensor,
    from_row: tl.tensor,
    from_column: tl.tensor,
    base: tl.tensor,
    to_output: tl.tensor,
    to_channel: tl.tensor,
    odd_row: tl.tensor,
    odd_column: tl.tensor,
    next_row: tl.tensor,
    next_column: tl.tensor,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Adds the taps of 3x3 kernels that fall on the same pixel of an upsampled feature map: four
    2x2 kernels for each, for even and odd rows and columns. The other arguments are strides."""
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (o < outputs) & (c < channels)
    source = weight + o * from_output + c * from_channel
    to = out + base + o * to_output + c * to_channel
    for i in tl.static_range(2):
        for a in tl.static_range(2):
            for j in tl.static_range(2):
                for b in tl.static_range(2):
                    total = tl.zeros([OUTPUTS, CHANNELS], tl.float32)
                    # even: 0, then 1 and 2; odd: 0 and 1, then 2
                    for row in tl.static_range(a * (1 + i), i + a * (2 - i) + 1):
                        for column in tl.static_range(b * (1 + j), j + b * (2 - j) + 1):
                            at = row * from_row + column * from_column
                            total += tl.load(source + at, mask=inside, other=0).to(tl.float32)
                    at = i * odd_row + j * odd_column + a * next_row + b * next_column
                    tl.store(to + at, total.to(out.dtype.element_ty), mask=inside)


def run_sum_and_stats(
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    out: Tensor | None,
    groups: int,
    tiling: Tiling,
    *,
    subpixel: bool = False,
) -> Tensor:
    """Runs `sum_and_stats` and `combine`; returns the sum's mean and variance, ``(B, groups, 2)``
    in float32. ``groups`` of 0 asks for no statistics.

    ``x``, ``residual`` and ``out`` are channels-last, and ``out`` may be ``x`` or ``residual``.
    """
    batch, channels, height, width = x.shape
    if subpixel:
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    pixels, by = height * width, divide(channels, height * width, tiling)
    stats = x.new_empty(batch, groups, 2, dtype=torch.float32)
    parts = x.new_empty(batch, by.parts, 2, channels, dtype=torch.float32) if groups else None
    added = None if added is None else added.contiguous()
    # The tensor's device need not be the current one.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        sum_and_stats[(by.parts, by.blocks, batch)](
            x, bias, added, residual, residual_bias, out, parts,
            pixels, channels, by.rows, width if subpixel else 2,
            SUBPIXEL=subpixel, PIXELS=by.pixels, CHANNELS=by.channels, num_warps=tiling.warps,
        )  # fmt: skip
        if groups:
            size = channels // groups
            columns = _power_of_2(size)
            merged = min(_power_of_2(by.parts), max(tiling.merged // columns, 1))
            combine[(groups, batch)](
                parts, stats, by.parts, pixels, channels, by.rows,
                SIZE=size, WIDTH=columns, MERGED=merged, num_warps=tiling.warps,
            )  # fmt: skip
    return stats


def run_normalise(
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    stats: Tensor,
    weight: Tensor,
    shift: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    tiling: Tiling,
) -> Tensor:
    """Runs `normalise` on a channels-last feature map."""
    batch, channels, height, width = x.shape
    pixels, by = height * width, divide(channels, height * width, tiling)
    added = None if added is None else added.contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        normalise[(_divided(pixels, by.pixels), by.blocks, batch)](
            x, bias, added, stats, weight, shift, out,
            pixels, channels, groups, channels // groups, eps,
            SILU=silu, PIXELS=by.pixels, CHANNELS=by.channels, num_warps=tiling.warps,
        )  # fmt: skip
    return out


def run_normalise_group(
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Runs `normalise_group` on a channels-last feature map."""
    batch, channels, height, width = x.shape
    size = channels // groups
    columns = _power_of_2(size)
    added = None if added is None else added.contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        normalise_group[(groups, batch)](
            x, bias, added, weight, shift, out, height * width, channels, eps,
            SILU=silu, SIZE=size, WIDTH=columns, PIXELS=max(4096 // columns, 1), num_warps=8,
        )  # fmt: skip
    return out


def run_add_taps(weight: Tensor, transposed: bool) -> Tensor:
    """Runs `add_taps` on a weight, ``(O, C, 3, 3)``; returns ``(4O, C, 2, 2)`` for a convolution,
    or ``(C, O, 4, 4)`` for a transposed one, channels-last."""
    outputs, channels = weight.shape[:2]
    shape = (channels, outputs, 4, 4) if transposed else (4 * outputs, channels, 2, 2)
    out = torch.empty(
        shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last
    )
    if transposed:
        row, column = 4 * outputs, outputs
        to = (3 * row + 3 * column, 1, 16 * outputs, -row, -column, -2 * row, -2 * column)
    else:
        phase = 4 * channels * outputs
        to = (0, 4 * channels, 1, 2 * phase, phase, 2 * channels, channels)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        add_taps[(_divided(outputs, 16), _divided(channels, 32))](
            weight, out, outputs, channels, *weight.stride(), *to, OUTPUTS=16, CHANNELS=32
        )
    return out
