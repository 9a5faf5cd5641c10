"""LLVM code of Winograd's transforms, in vectors of channels: a tile's numbers stay in registers.

The sums along one axis are those of the matrices in :mod:`sdconv.fast.cpu.winograd`, with what the
points have in common computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import BLOCK, llvm
from sdconv.fast.cpu.numba.sixteen_bits import FLOAT32
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, OUTPUT_TILE, UPSAMPLE_CONV

# the schemes' points, as in `sdconv.fast.cpu.winograd`
_P, _Q, _R = CONV3X3.output[1][1], CONV3X3.output[1][3], UPSAMPLE_CONV.output[1][2]
_S, _T = DOWNSAMPLE_CONV.output[1][1], DOWNSAMPLE_CONV.output[1][3]

Vectors = list[Any]


def input_1d(code: VectorCode, x: Vectors) -> Vectors:
    """Multiplies six values by ``B^T`` of CONV3X3, to six."""
    a, b, d, e, f, g = x
    pp, qq, sum_ = _P * _P, _Q * _Q, code.linear
    even_q, odd_q = sum_((1, f), (-qq, d)), sum_((1, e), (-qq, b))
    even_p, odd_p = sum_((1, f), (-pp, d)), sum_((1, e), (-pp, b))
    return [
        sum_((1, f), (-pp - qq, d), (pp * qq, a)),
        sum_((1, even_q), (_P, odd_q)),
        sum_((1, even_q), (-_P, odd_q)),
        sum_((1, even_p), (_Q, odd_p)),
        sum_((1, even_p), (-_Q, odd_p)),
        sum_((1, g), (-pp - qq, e), (pp * qq, b)),
    ]


def upsample_input_1d(code: VectorCode, x: Vectors) -> Vectors:
    """Multiplies four values by ``B^T`` of UPSAMPLE_CONV, to five."""
    a, b, d, e = x
    rr, sum_ = _R * _R, code.linear
    step = sum_((1, d), (-1, b))
    return [
        sum_((1, d), (-rr - 1, b), (rr, a)),
        sum_((2, d), (-2 * rr, b)),
        sum_((_R + 1, step)),
        sum_((1 - _R, step)),
        sum_((1, e), (-rr - 1, d), (rr, b)),
    ]


def downsample_input_1d(code: VectorCode, x: Vectors) -> Vectors:
    """Multiplies nine values by ``B^T`` of DOWNSAMPLE_CONV, to nine."""
    even, odd, sum_ = x[::2], x[1::2], code.linear
    ss = _S * _S
    a, b, d, e = (sum_((1, after), (-_T, one)) for one, after in pairwise(even))
    return [
        sum_((1, d), (-ss, a)),
        sum_((1, d), (_S, b)),
        sum_((1, d), (-_S, b)),
        sum_((1, even[3]), (-ss, even[1])),
        sum_((1, e), (-ss, b)),
        *odd,
    ]


def output_1d(code: VectorCode, x: Vectors) -> Vectors:
    """Multiplies six values by ``A^T`` of CONV3X3, to four."""
    a, b, d, e, f, g = x
    sum_ = code.linear
    even_p, odd_p = sum_((1, b), (1, d)), sum_((1, b), (-1, d))
    even_q, odd_q = sum_((1, e), (1, f)), sum_((1, e), (-1, f))
    return [
        sum_((1, a), (1, even_p), (1, even_q)),
        sum_((_P, odd_p), (_Q, odd_q)),
        sum_((_P**2, even_p), (_Q**2, even_q)),
        sum_((1, g), (_P**3, odd_p), (_Q**3, odd_q)),
    ]


def upsample_output_1d(code: VectorCode, x: Vectors) -> Vectors:
    """Multiplies five values by ``A^T`` of UPSAMPLE_CONV, to four."""
    a, b, d, e, f = x
    sum_ = code.linear
    even, odd = sum_((1, d), (1, e)), sum_((1, d), (-1, e))
    return [
        sum_((1, a), (1, b), (1, even)),
        sum_((1, b), (_R, odd)),
        sum_((1, b), (_R**2, even)),
        sum_((1, f), (1, b), (_R**3, odd)),
    ]


def downsample_output_1d(code: VectorCode, x: Vectors) -> Vectors:
    """Multiplies nine values by ``A^T`` of DOWNSAMPLE_CONV, to four."""
    a, b, d, e, f, *odd = x
    sum_ = code.linear
    even_s, odd_s = sum_((1, b), (1, d)), sum_((1, b), (-1, d))
    return [
        sum_((1, odd[0]), (1, a), (1, even_s), (1, e)),
        sum_((1, odd[1]), (_S, odd_s), (_T, e)),
        sum_((1, odd[2]), (_S**2, even_s), (_T**2, e)),
        sum_((1, odd[3]), (1, f), (_S**3, odd_s), (_T**3, e)),
    ]


class _Code(VectorCode):
    """Writes the LLVM code of the transforms."""

    def along(self, transform: Any, size: int, args: Any) -> None:
        """Writes the body of what `along` makes."""
        out, to, out_step, x, at, step, vectors, *ahead = args

        def body(c: Any) -> None:
            made = transform(self, [self.load(x, at, self.times(step, i), c) for i in range(size)])
            for i, vector in enumerate(made):
                place = self.at(out, to, self.times(out_step, i), c)
                if ahead:
                    self.prefetch(self.at(place, *ahead), write=True)
                self.store(vector, place)

        self.each(vectors, body)

    def affine(self, silu: bool, dtype: int, args: Any) -> None:
        """Writes the body of what `affine` makes."""
        out, to, x, at, scale, shift, vectors, ahead = args

        def body(c: Any) -> None:
            factor, term = self.load(scale, c), self.load(shift, c)
            place = self.at(x, at, c)
            self.prefetch(self.at(place, ahead))
            y = self.builder.call(self.fma, [self.load(place, dtype=dtype), factor, term])
            self.store(self.silu(y) if silu else y, out, to, c)

        self.each(vectors, body)

    def tile(self, transform: Any, side: int, dtype: int, residual: int | None, args: Any) -> None:
        """Writes the body of what `output_tile` makes."""
        products, at, plane, ahead, bias, least, out, to, *further = args
        row, step, sums, vectors, *added = further
        builder, wide = self.builder, ir.VectorType(ir.DoubleType(), LANES)
        least = self.splat(least)

        def body(c: Any) -> None:
            columns = []
            for j in range(side):
                planes = [self.times(plane, i * side + j) for i in range(side)]
                places = [self.at(products, at, p, c) for p in planes]
                for place in places:
                    self.prefetch(self.at(place, ahead))
                columns.append(transform(self, [self.load(place) for place in places]))
            total, squares = (self.double(sums, wide, c, k * BLOCK) for k in range(2))
            offset = self.load(bias, c)
            for i in range(OUTPUT_TILE):
                for j, y in enumerate(transform(self, [column[i] for column in columns])):
                    y = builder.fadd(y, offset)
                    if residual is not None:
                        by_row, by_step = added[2:]
                        by = self.at(*added[:2], self.times(by_row, i), self.times(by_step, j), c)
                        self.prefetch(self.at(by, self.times(by_step, OUTPUT_TILE)))
                        y = builder.fadd(y, self.load(by, dtype=residual))
                    place = self.times(row, i), self.times(step, j), c
                    y = self.store(self.larger(least, y), out, to, *place, dtype=dtype)
                    y = builder.fpext(y, wide)
                    total = builder.fadd(total, y)
                    squares = builder.fadd(squares, builder.fmul(y, y))
            for k, value in enumerate((total, squares)):
                address = self.at(sums, c, k * BLOCK)
                builder.store(value, builder.bitcast(address, wide.as_pointer()), align=8)

        self.each(vectors, body)

    def double(self, base: Any, kind: Any, *offsets: Any) -> Any:
        """The vector of float64 at an address."""
        address = self.builder.bitcast(self.at(base, *offsets), kind.as_pointer())
        return self.builder.load(address, align=8)

    def times(self, step: Any, count: int) -> Any:
        return self.builder.mul(step, step.type(count))

    def each(self, vectors: Any, body: Callable[[Any], None]) -> None:
        """Writes a loop over the first channels of ``vectors`` vectors."""

        def step(i: Any, none: Vectors) -> Vectors:
            body(self.times(i, LANES))
            return none

        self.loop(vectors.type(0), vectors, [], step)


def along(transform: Any, size: int) -> Any:
    """Makes a function that transforms ``size`` values, ``step`` numbers apart, of each channel in
    some vectors."""

    def fill(
        context: Any, out: Any, to: Any, out_step: Any, x: Any, at: Any, step: Any, vectors: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).along(transform, size, args)
            return context.get_dummy_value()

        return types.void(out, to, out_step, x, at, step, vectors), codegen

    return llvm(fill)


def along_planes(transform: Any, size: int) -> Any:
    """`along`, where each of the results has a plane of its own: the places ``ahead`` numbers
    farther, which are written next, come into the cache meanwhile. They are in more pages than a
    processor foresees by itself."""

    def fill(
        context: Any,
        out: Any,
        to: Any,
        plane: Any,
        ahead: Any,
        x: Any,
        at: Any,
        step: Any,
        vectors: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).along(transform, size, (*args[:3], *args[4:], args[3]))
            return context.get_dummy_value()

        return types.void(out, to, plane, ahead, x, at, step, vectors), codegen

    return llvm(fill)


def affine(silu: bool, dtype: int = FLOAT32) -> Any:
    """Makes a function that normalises some vectors of channels, and applies SiLU if ``silu``;
    those ``ahead`` numbers farther come into the cache meanwhile. ``x`` is of a
    ``dtype``."""

    def fill(
        context: Any,
        out: Any,
        to: Any,
        x: Any,
        at: Any,
        scale: Any,
        shift: Any,
        vectors: Any,
        ahead: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).affine(silu, dtype, args)
            return context.get_dummy_value()

        return types.void(out, to, x, at, scale, shift, vectors, ahead), codegen

    return llvm(fill)


def output_tile(
    transform: Any, side: int, dtype: int = FLOAT32, residual: int | None = None
) -> Any:
    """Makes a function that computes a whole tile of the output, of a ``dtype``, for some
    vectors of channels, and adds its values and their squares to ``sums``. What is ``added`` is of
    the dtype ``residual``, and not read where this is None. The products ``ahead`` numbers farther,
    in planes as in `along_planes`, and what is added to the next tile, come into the cache
    meanwhile."""

    def fill(
        context: Any,
        products: Any,
        at: Any,
        plane: Any,
        ahead: Any,
        bias: Any,
        least: Any,
        out: Any,
        to: Any,
        row: Any,
        step: Any,
        sums: Any,
        vectors: Any,
        added: Any,
        by: Any,
        by_row: Any,
        by_step: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).tile(transform, side, dtype, residual, args)
            return context.get_dummy_value()

        given = (products, at, plane, ahead, bias, least, out, to, row, step, sums, vectors)
        return types.void(*given, added, by, by_row, by_step), codegen

    return llvm(fill)
