"""LLVM code of AMX's kernel: tile registers, and bfloat16 numbers in vectors.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. A tile
register holds 16 rows of 64 bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import llvm
from sdconv.fast.cpu.numba.sixteen_bits import BFLOAT16
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode
from sdconv.fast.cpu.tiling import AMX_BLOCK

# pixels, and output channels, that are multiplied at a time; channels of the input in a plane
SIDE = STEP = AMX_BLOCK
_TILE = 16
_VECTORS = SIDE // LANES


class _Code(VectorCode):
    """Writes the LLVM code of AMX's instructions, and of bfloat16 numbers in vectors."""

    def instruction(self, name: str, *args: Any) -> None:
        """Calls one of LLVM's functions for AMX."""
        takes = [arg.type for arg in args]
        self.builder.call(self.function(f"llvm.x86.{name}", ir.VoidType(), takes), args)

    def divide(self, y: Any, by: Any) -> Any:
        """``y / by`` within a few units in the last place, by a product with the reciprocal, whose
        estimate is improved once: a division takes as long as all else."""
        mask = ir.IntType(16)
        takes = [self.vector, self.vector, mask]
        function = self.function("llvm.x86.avx512.rcp14.ps.512", self.vector, takes)
        estimate = self.builder.call(function, [by, self.constant(0.0), mask(-1)])
        lacking = self.builder.fsub(self.constant(2.0), self.builder.fmul(by, estimate))
        return self.builder.fmul(y, self.builder.fmul(estimate, lacking))

    def silu(self, y: Any) -> Any:
        """As in the reference, infinity of infinity and NaN of minus infinity."""
        builder, infinity, out = self.builder, self.constant(float("inf")), super().silu(y)
        is_lowest = builder.fcmp_ordered("==", y, builder.fneg(infinity))
        out = builder.select(is_lowest, self.constant(float("nan")), out)
        return builder.select(builder.fcmp_ordered("==", y, infinity), y, out)


def _byte(value: int) -> Any:
    return ir.IntType(8)(value)


def _bytes_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


@llvm
def configure(typing_context: Any, saved: Any, wanted: Any) -> Any:
    """Sets the tile registers' shapes, and saves those that were set before; both by address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, (before, now) = _Code(builder), (_bytes_at(builder, one) for one in args)
        code.instruction("sttilecfg", before)
        code.instruction("ldtilecfg", now)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@llvm
def restore(typing_context: Any, saved: Any) -> Any:
    """Sets the tile registers' shapes to those that `configure` has saved."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Code(builder).instruction("ldtilecfg", _bytes_at(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@llvm
def clear_tiles(typing_context: Any) -> Any:
    """Sets the sums to 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for tile in range(4):
            _Code(builder).instruction("tilezero", _byte(tile))
        return context.get_dummy_value()

    return types.void(), codegen


@llvm
def multiply(
    typing_context: Any,
    pixels: Any,
    plane: Any,
    taps: Any,
    count: Any,
    steps: Any,
    weight: Any,
    out: Any,
    out_step: Any,
    added: Any,
    added_step: Any,
) -> Any:
    """Adds the products of `SIDE` pixels with `SIDE` output channels to the sums: ``steps`` times
    `STEP` channels, ``plane`` bytes apart, with ``count`` taps each.

    Meanwhile brings the cache lines of `SIDE` pixels of the output and of the residual to the
    cache, from ``out`` and ``added`` on, one of each after another: more at once would be waited
    for.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pixels, plane, taps, count, steps, weight, out, out_step, added, added_step = args
        code, integer = _Code(builder), ir.IntType(64)
        row, tile = integer(2 * STEP), 2 * STEP * _TILE

        def prefetch(address: Any, *, write: bool = False) -> None:
            code.prefetch(_bytes_at(builder, address), write=write)

        def step(i: Any, carried: list[Any]) -> list[Any]:
            channels = builder.add(pixels, builder.mul(i, plane))

            def tap(j: Any, carried: list[Any]) -> list[Any]:
                at, number = carried
                line = builder.and_(number, integer(SIDE - 1))
                prefetch(builder.add(out, builder.mul(line, out_step)), write=True)
                prefetch(builder.add(added, builder.mul(line, added_step)))
                a = builder.add(channels, builder.load(builder.gep(taps, [j])))
                after = builder.add(at, integer(2 * tile))
                for place in range(0, 2 * tile, 64):  # of the tap after the next
                    prefetch(builder.add(after, integer(2 * tile + place)))
                for half in range(2):
                    b = _bytes_at(builder, builder.add(at, integer(half * tile)))
                    code.instruction("tileloadd64", _byte(6 + half), b, row)
                for half in range(2):
                    first = _bytes_at(builder, builder.add(a, integer(half * tile)))
                    code.instruction("tileloadd64", _byte(4 + half), first, row)
                    for other in range(2):
                        tiles = (2 * half + other, 4 + half, 6 + other)
                        code.instruction("tdpbf16ps", *map(_byte, tiles))
                return [after, builder.add(number, integer(1))]

            return code.loop(integer(0), count, carried, tap)

        code.loop(integer(0), steps, [weight, integer(0)], step)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, taps, i64, i64, i64, i64, i64, i64, i64), codegen


@llvm
def store_tiles(typing_context: Any, out: Any) -> Any:
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
                    y = code.load(x, at, c, dtype=BFLOAT16)
                    terms = [y, code.load(scale, c), code.load(shift, c)]
                    y = builder.call(code.fma, terms)
                    first = builder.mul(builder.sdiv(v, integer(in_plane)), plane)
                    rest = builder.mul(builder.srem(v, integer(in_plane)), integer(LANES))
                    y = code.silu(y) if silu else y
                    code.store(y, out, to, first, rest, dtype=BFLOAT16)
                    return []

                code.loop(integer(0), builder.sdiv(n, integer(LANES)), [], channel)
                return []

            code.loop(integer(0), pixels, [], pixel)
            return context.get_dummy_value()

        return types.void(out, plane, x, scale, shift, pixels, n), codegen

    return llvm(fill)


normalise, normalise_silu = _normaliser(False), _normaliser(True)


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
                        y = builder.fadd(y, code.load(added, by, c, dtype=BFLOAT16))
                    y = builder.select(builder.fcmp_ordered("<", y, least), least, y)
                    y = builder.fpext(code.store(y, out, to, c, dtype=BFLOAT16), wide)
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


finish, finish_with_residual = (_finisher(residual) for residual in (False, True))
