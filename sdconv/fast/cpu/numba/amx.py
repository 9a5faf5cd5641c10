"""3x3 convolutions of bfloat16 by Intel's matrix units (AMX), by Numba: direct summation.

A thread takes a band of rows at a time. It normalises the band's input into scratch memory, with a
border of zeros, so that the 9 taps of a kernel are 9 offsets there; multiplies 32 pixels by 32
output channels at a time, summed in float32; and adds bias and residual while the sums are in the
cache. Scratch memory has planes of 32 channels, in which pixels follow each other row after row:
those of the border are computed too, and dropped.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. A tile
register holds 16 rows of 64 bytes.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import (
    atomic_next,
    carray,
    doubles,
    f32,
    floats,
    inner,
    int64s,
    job,
    kernel,
    llvm,
    uint16s,
    uint64s,
)
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode
from sdconv.fast.cpu.tiling import AMX_BLOCK

# pixels, and output channels, that are multiplied at a time; channels of the input in a plane
SIDE = STEP = AMX_BLOCK
_TILE = 16
_VECTORS = SIDE // LANES

# rows: of the input in a band; plane: numbers in a plane of scratch memory; first, end: the rows
# that are computed; steps: planes of the input's channels; taps: the bytes from a pixel's upper
# left neighbour to each tap, for each phase; phases: 4 after upsampling, each of which has weights
# of its own and writes every other row and column; residual_steps: planes of the residual where it
# is multiplied; sums: of each channel, and of their squares, in each row of the input
CONV = job(
    *("rows", "plane", "first", "end", "height", "width", "channels", "steps", "out_channels", "x"),
    *("scale", "shift", "silu", "taps", "tap_count", "phases", "weight", "offsets"),
    *("residual", "residual_channels", "residual_steps", "shortcut", "relu", "out", "sums"),
)


# bytes before a band in scratch memory: the tile registers' shapes, and those before; the sums
_SHAPES = 128
BEFORE = _SHAPES + 4 * SIDE * SIDE


class _Code(VectorCode):
    """Writes the LLVM code of AMX's instructions, and of bfloat16 numbers in vectors."""

    def instruction(self, name: str, *args: Any) -> None:
        """Calls one of LLVM's functions for AMX."""
        kinds = [arg.type for arg in args]
        full = f"llvm.x86.{name}"
        function = self.builder.module.globals.get(full) or ir.Function(
            self.builder.module, ir.FunctionType(ir.VoidType(), kinds), full
        )
        self.builder.call(function, args)

    def prefetch(self, address: Any, *, write: bool) -> None:
        """Brings the cache line at an address to the cache."""
        pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        name = "llvm.prefetch.p0i8"
        function = self.builder.module.globals.get(name) or ir.Function(
            self.builder.module,
            ir.FunctionType(ir.VoidType(), [pointer, *[integer] * 3]),
            name,
        )
        hints = (integer(int(write)), integer(3), integer(1))
        self.builder.call(function, [_bytes_at(self.builder, address), *hints])

    def halves(self, address: Any) -> Any:
        """The vector of bfloat16 at an address, as float32."""
        builder = self.builder
        narrow, wide = (ir.VectorType(ir.IntType(bits), LANES) for bits in (16, 32))
        bits = builder.load(builder.bitcast(address, narrow.as_pointer()), align=2)
        shifted = builder.shl(builder.zext(bits, wide), wide([16] * LANES))
        return builder.bitcast(shifted, self.vector)

    def store_halves(self, vector: Any, address: Any) -> Any:
        """Writes a vector as bfloat16, rounded to nearest even; returns it as rounded."""
        builder = self.builder
        narrow, wide = (ir.VectorType(ir.IntType(bits), LANES) for bits in (16, 32))
        bits, shift = builder.bitcast(vector, wide), wide([16] * LANES)
        odd = builder.and_(builder.lshr(bits, shift), wide([1] * LANES))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, wide([0x7FFF] * LANES))), shift)
        nan = builder.fcmp_unordered("uno", vector, vector)
        rounded = builder.select(nan, wide([0x7FC0] * LANES), rounded)
        to = builder.bitcast(address, narrow.as_pointer())
        builder.store(builder.trunc(rounded, narrow), to, align=2)
        return builder.bitcast(builder.shl(rounded, shift), self.vector)


def _byte(value: int) -> Any:
    return ir.IntType(8)(value)


def _bytes_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


@llvm
def _configure(typing_context: Any, saved: Any, wanted: Any) -> Any:
    """Sets the tile registers' shapes, and saves those that were set before; both by address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (before, now) = _Code(builder), (_bytes_at(builder, one) for one in args)
        code.instruction("sttilecfg", before)
        code.instruction("ldtilecfg", now)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@llvm
def _restore(typing_context: Any, saved: Any) -> Any:
    """Sets the tile registers' shapes to those that `_configure` has saved."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Code(builder).instruction("ldtilecfg", _bytes_at(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@llvm
def _clear_tiles(typing_context: Any) -> Any:
    """Sets the sums to 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for tile in range(4):
            _Code(builder).instruction("tilezero", _byte(tile))
        return context.get_dummy_value()

    return types.void(), codegen


@llvm
def _multiply(
    typing_context: Any, pixels: Any, plane: Any, taps: Any, count: Any, steps: Any, weight: Any
) -> Any:
    """Adds the products of `SIDE` pixels with `SIDE` output channels to the sums: ``steps`` times
    `STEP` channels, ``plane`` bytes apart, with ``count`` taps each."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pixels, plane, taps, count, steps, weight = args
        code, integer = _Code(builder), ir.IntType(64)
        row, tile = integer(2 * STEP), 2 * STEP * _TILE

        def step(i: Any, carried: list[Any]) -> list[Any]:
            channels = builder.add(pixels, builder.mul(i, plane))

            def tap(j: Any, carried: list[Any]) -> list[Any]:
                (at,) = carried
                a = builder.add(channels, builder.load(builder.gep(taps, [j])))
                after = builder.add(at, integer(2 * tile))
                for line in range(0, 2 * tile, 64):  # of the tap after the next
                    code.prefetch(builder.add(after, integer(2 * tile + line)), write=False)
                for half in range(2):
                    b = _bytes_at(builder, builder.add(at, integer(half * tile)))
                    code.instruction("tileloadd64", _byte(6 + half), b, row)
                for half in range(2):
                    first = _bytes_at(builder, builder.add(a, integer(half * tile)))
                    code.instruction("tileloadd64", _byte(4 + half), first, row)
                    for other in range(2):
                        tiles = (2 * half + other, 4 + half, 6 + other)
                        code.instruction("tdpbf16ps", *map(_byte, tiles))
                return [after]

            return code.loop(integer(0), count, carried, tap)

        code.loop(integer(0), steps, [weight], step)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, taps, i64, i64, i64), codegen


@llvm
def _prefetch(typing_context: Any, address: Any, step: Any, pixels: Any) -> Any:
    """Brings `SIDE` channels of some pixels, ``step`` bytes apart, to the cache, to be written."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, step, pixels = args
        code, integer = _Code(builder), ir.IntType(64)

        def pixel(i: Any, carried: list[Any]) -> list[Any]:
            code.prefetch(builder.add(address, builder.mul(i, step)), write=True)
            return []

        code.loop(integer(0), pixels, [], pixel)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@llvm
def _store_tiles(typing_context: Any, out: Any) -> Any:
    """Writes the sums, ``(SIDE, SIDE)`` in float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, integer = _Code(builder), ir.IntType(64)
        for tile in range(4):
            at = builder.add(args[0], integer(4 * (tile // 2 * _TILE * SIDE + tile % 2 * _TILE)))
            address = _bytes_at(builder, at)
            code.instruction("tilestored64", _byte(tile), address, integer(4 * SIDE))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _normaliser(silu: bool) -> Any:
    """Makes a function that normalises the channels of some pixels, a multiple of LANES, into
    planes, and applies SiLU if ``silu``."""

    def fill(
        context: Any, out: Any, plane: Any, x: Any, scale: Any, shift: Any, pixels: Any, n: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, plane, x, scale, shift, pixels, n = args
            code, integer = _Code(builder), ir.IntType(64)
            in_plane = STEP // LANES

            def pixel(i: Any, carried: list[Any]) -> list[Any]:
                to, at = builder.mul(i, integer(STEP)), builder.mul(i, n)

                def channel(v: Any, carried: list[Any]) -> list[Any]:
                    c = builder.mul(v, integer(LANES))
                    y = code.halves(code.at(x, at, c))
                    terms = [y, code.load(scale, c), code.load(shift, c)]
                    y = builder.call(code.fma, terms)
                    first = builder.mul(builder.sdiv(v, integer(in_plane)), plane)
                    rest = builder.mul(builder.srem(v, integer(in_plane)), integer(LANES))
                    code.store_halves(code.silu(y) if silu else y, code.at(out, to, first, rest))
                    return []

                code.loop(integer(0), builder.sdiv(n, integer(LANES)), [], channel)
                return []

            code.loop(integer(0), pixels, [], pixel)
            return context.get_dummy_value()

        return types.void(out, plane, x, scale, shift, pixels, n), codegen

    return llvm(fill)


_normalise, _normalise_silu = _normaliser(False), _normaliser(True)


def _finisher(residual: bool) -> Any:
    """Makes a function that writes some pixels of `SIDE` output channels, and adds their sums."""

    def fill(
        typing_context: Any,
        products: Any,
        offsets: Any,
        added: Any,
        added_step: Any,
        least: Any,
        out: Any,
        step: Any,
        pixels: Any,
        sums: Any,
        squares: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            products, offsets, added, added_step, least, out, step, pixels, sums, squares = args
            code, integer = _Code(builder), ir.IntType(64)
            least = code.splat(least)
            parts = [v * LANES for v in range(_VECTORS)]
            terms = [code.load(offsets, c) for c in parts]

            wide = ir.VectorType(ir.DoubleType(), LANES)
            places = [
                builder.bitcast(code.at(into, c), wide.as_pointer())
                for c in parts
                for into in (sums, squares)
            ]

            def pixel(i: Any, carried: list[Any]) -> list[Any]:
                following = []
                at, to, by = (builder.mul(i, one) for one in (integer(SIDE), step, added_step))
                totals = zip(parts, terms, carried[::2], carried[1::2], strict=True)
                for c, term, total, square in totals:
                    y = builder.fadd(code.load(products, at, c), term)
                    if residual:
                        y = builder.fadd(y, code.halves(code.at(added, by, c)))
                    y = builder.select(builder.fcmp_ordered("<", y, least), least, y)
                    y = builder.fpext(code.store_halves(y, code.at(out, to, c)), wide)
                    following.append(builder.fadd(total, y))
                    following.append(builder.fadd(square, builder.fmul(y, y)))
                return following

            before = [builder.load(place, align=8) for place in places]
            for total, place in zip(
                code.loop(integer(0), pixels, before, pixel), places, strict=True
            ):
                builder.store(total, place, align=8)
            return context.get_dummy_value()

        kinds = (products, offsets, added, added_step, least, out, step, pixels, sums, squares)
        return types.void(*kinds), codegen

    return llvm(fill)


_finish, _finish_with_residual = (_finisher(residual) for residual in (False, True))


@inner
def _fill(out: Any, to: int, n: int) -> None:
    """Writes zeros."""
    for i in range(n):
        out[to + i] = np.uint16(0)


@inner
def _copy(out: Any, to: int, plane: int, x: Any, at: int, channels: int, pixels: int) -> None:
    """Copies pixels to planes; a last plane that is not filled is filled up with zeros."""
    for pixel in range(pixels):
        for c0 in range(0, channels, STEP):
            start = to + c0 // STEP * plane + pixel * STEP
            n = min(STEP, channels - c0)
            for c in range(n):
                out[start + c] = x[at + pixel * channels + c0 + c]
            for c in range(n, STEP):
                out[start + c] = np.uint16(0)


@inner
def _fill_band(job: Any, first: int, rows: int, plane: int, to: int) -> None:
    """Writes the input of a band, normalised and with its border."""
    band, x, width, channels = uint16s(to), uint16s(job.x), job.width, job.channels
    scale, shift = floats(job.scale), floats(job.shift)
    row_size, last = (width + 2) * STEP, channels // STEP
    for r in range(rows + 2):
        y = first - 1 + r
        inside = 0 <= y and y < job.height
        for step in range(job.steps):
            at = step * plane + r * row_size
            # nothing but zeros, or zeros on both sides; and where channels are missing
            _fill(band, at, row_size if not inside or (step == last) else STEP)
            _fill(band, at + row_size - STEP, STEP)
        if not inside:
            continue
        at, source = r * row_size + STEP, y * width * channels
        if job.scale == 0:
            _copy(band, at, plane, x, source, channels, width)
        elif job.silu != 0:
            _normalise_silu(
                uint16s(to + 2 * at),
                plane,
                uint16s(job.x + 2 * source),
                scale,
                shift,
                width,
                channels,
            )
        else:
            _normalise(
                uint16s(to + 2 * at),
                plane,
                uint16s(job.x + 2 * source),
                scale,
                shift,
                width,
                channels,
            )


@llvm
def _rounded(typing_context: Any, value: Any) -> Any:
    """A float32 as bfloat16, rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(32)
        bits = builder.bitcast(args[0], wide)
        odd = builder.and_(builder.lshr(bits, wide(16)), wide(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, wide(0x7FFF))), wide(16))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(nan, wide(0x7FC0), rounded), ir.IntType(16))

    return types.uint16(types.float32), codegen


@llvm
def _widened(typing_context: Any, half: Any) -> Any:
    """A bfloat16 as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(32)
        bits = builder.shl(builder.zext(args[0], wide), wide(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.uint16), codegen


@inner
def _finish_few(
    products: Any,
    offsets: Any,
    added: Any,
    added_step: int,
    least: Any,
    out: Any,
    step: int,
    pixels: int,
    sums: Any,
    squares: Any,
    n: int,
) -> None:
    """Writes some pixels of ``n`` output channels, and adds their sums."""
    for i in range(pixels):
        for c in range(n):
            y = products[i * SIDE + c] + offsets[c]
            if added_step != 0:
                y += _widened(added[i * added_step + c])
            half = _rounded(least if y < least else y)
            out[i * step + c] = half
            y = _widened(half)
            sums[c] += np.float64(y)
            squares[c] += np.float64(y) * np.float64(y)


@kernel(CONV)
def conv(pointer: Any) -> None:
    """A 3x3 convolution. A unit is a band of ``rows`` rows of the input."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    config = (own + 63) // 64 * 64
    products = config + _SHAPES
    band = config + BEFORE
    shapes = uint64s(config)
    for i in range(8):
        shapes[i] = np.uint64(0)
    shapes[0] = np.uint64(1)
    for i in (2, 3):
        shapes[i] = np.uint64(0x0040004000400040)
    shapes[6] = np.uint64(0x1010101010101010)
    width, out_channels, steps = job.width, job.out_channels, job.steps
    pitch, plane = width + 2, job.plane
    added_band = band + 2 * steps * plane
    blocks = (out_channels + SIDE - 1) // SIDE
    scale = 2 if job.phases == 4 else 1
    least = f32(0.0) if job.relu != 0 else f32(-inf)
    added = job.residual if job.shortcut == 0 else 0
    by_step = out_channels if added != 0 else 0
    block_size = 2 * job.tap_count * steps * STEP * SIDE
    shortcut_size = 2 * job.residual_steps * STEP * SIDE
    _configure(config + 64, config)
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        first = job.first + unit * job.rows
        rows = min(job.rows, job.end - first)
        _fill_band(job, first, rows, plane, band)
        if job.shortcut != 0:
            for r in range(rows):
                source = (first + r) * width * job.residual_channels
                _copy(
                    *(uint16s(added_band), r * pitch * STEP, plane),
                    *(uint16s(job.residual), source, job.residual_channels, width),
                )
        end = (rows - 1) * pitch + width
        for phase in range(job.phases):
            down, across = phase // 2, phase % 2
            taps = int64s(job.taps + 8 * phase * job.tap_count)
            for block in range(blocks):
                c0 = block * SIDE
                n = min(SIDE, out_channels - c0)
                weight = job.weight + (phase * blocks + block) * block_size
                bias = floats(job.offsets + 4 * c0)
                for position in range(0, end, SIDE):
                    r = position // pitch
                    row, column = (first + r) * scale + down, (position - r * pitch) * scale
                    pixel = row * width * scale + min(column, width * scale - scale) + across
                    to = 2 * (pixel * out_channels + c0)
                    _prefetch(job.out + to, 2 * scale * out_channels, SIDE)
                    if added != 0:
                        _prefetch(added + to, 2 * out_channels, SIDE)
                    _clear_tiles()
                    _multiply(
                        band + 2 * STEP * position, 2 * plane, taps, job.tap_count, steps, weight
                    )
                    if job.shortcut != 0:  # by the first tap, which is the pixel itself
                        _multiply(
                            *(added_band + 2 * STEP * position, 2 * plane, int64s(job.taps), 1),
                            *(job.residual_steps, job.shortcut + block * shortcut_size),
                        )
                    _store_tiles(products)
                    # the pixels of each row
                    after = min(position + SIDE, end)
                    at = position
                    while at < after:
                        r = at // pitch
                        column = at - r * pitch
                        count = min(after - at, width - column)
                        if count <= 0:
                            at = (r + 1) * pitch
                            continue
                        row = (first + r) * scale + down
                        pixel = (row * width + column) * scale + across
                        to = 2 * (pixel * out_channels + c0)
                        made = floats(products + 4 * (at - position) * SIDE)
                        out, by = uint16s(job.out + to), uint16s(added + to)
                        sums = job.sums + 8 * (2 * (first + r) * out_channels + c0)
                        own, squares = doubles(sums), doubles(sums + 8 * out_channels)
                        step = scale * out_channels
                        if n < SIDE:
                            _finish_few(
                                made, bias, by, by_step, least, out, step, count, own, squares, n
                            )
                        elif added != 0:
                            _finish_with_residual(
                                made, bias, by, by_step, least, out, step, count, own, squares
                            )
                        else:
                            _finish(made, bias, by, by_step, least, out, step, count, own, squares)
                        at += count
    _restore(config + 64)
