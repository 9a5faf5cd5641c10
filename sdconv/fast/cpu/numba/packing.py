"""Packs weights for matrix products, in float32 whatever their dtype: rows as a panel, in squares
that are transposed in registers, and 3x3 kernels after Winograd's transform."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import (
    atomic_next,
    carray,
    copy,
    floats,
    inner,
    job,
    kernel,
    llvm,
    uint16s,
)
from sdconv.fast.cpu.numba.gemm import PANEL
from sdconv.fast.cpu.numba.sixteen_bits import BFLOAT16, FLOAT16, FLOAT32, read, size_of
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode
from sdconv.fast.cpu.tiling import MULTIPLE
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, UPSAMPLE_CONV, Scheme

# dtype: of the weight's numbers
PACK = job("channels", "width", "first", "dtype", "b", "out", "out_step")

# input channels whose kernels are transformed at a time
CHANNELS = min(MULTIPLE, 2048 // PANEL)
TAPS = 9
# from one tile position's kernels to the next: not a multiple of a page, see `Scratch.planes`
PLANE = CHANNELS * PANEL + 64
# floats of scratch memory for each thread: the taps and the transformed kernels of these channels
PACK_SCRATCH = TAPS * CHANNELS * PANEL + CONV3X3.kernels * PLANE


def _transposing(dtype: int) -> Any:
    """Makes a function that writes the transpose of a square of LANES rows and columns of a
    ``dtype``; rows are ``x_step`` and ``out_step`` numbers apart."""

    def fill(typing_context: Any, x: Any, x_step: Any, out: Any, out_step: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).transpose(dtype, *args)
            return context.get_dummy_value()

        return types.void(x, x_step, out, out_step), codegen

    return llvm(fill)


_transpose, _transpose_bfloat16, _transpose_float16 = map(
    _transposing, (FLOAT32, BFLOAT16, FLOAT16)
)


class _Code(VectorCode):
    """Writes the LLVM code of a transpose, and of the kernels' transform."""

    def transpose(self, dtype: int, x: Any, x_step: Any, out: Any, out_step: Any) -> None:
        """Writes the body of what `_transposing` makes: squares of half the size change places,
        then those inside them."""
        builder, lanes = self.builder, range(LANES)
        rows = [self.load(x, builder.mul(x_step, x_step.type(i)), dtype=dtype) for i in lanes]
        distance = LANES // 2
        while distance:
            for i in (i for i in lanes if not i & distance):
                a, b = rows[i], rows[i + distance]
                # lanes of b are numbered from LANES on
                first = [j + LANES - distance if j & distance else j for j in lanes]
                second = [j + LANES if j & distance else j + distance for j in lanes]
                rows[i], rows[i + distance] = self.lanes(a, b, first), self.lanes(a, b, second)
            distance //= 2
        for i in lanes:
            self.store(rows[i], out, builder.mul(out_step, out_step.type(i)))

    def transform(
        self, scheme: Scheme, exact: bool, taps: Any, kernels: Any, channels: Any
    ) -> None:
        """Writes the body of what `transform` makes."""
        side, multiply = len(scheme.kernel), self.builder.mul
        arithmetic = VectorCode(self.builder, double=exact)

        def by(row: tuple[float, ...], values: list[Any]) -> Any:
            terms = zip(row, values, strict=True)
            return arithmetic.linear(*(term for term in terms if term[0]))

        def body(c: Any, none: list[Any]) -> list[Any]:
            for v in range(0, PANEL, LANES):
                at = multiply(c, c.type(TAPS * PANEL))
                g = [self.load(taps, at, tap * PANEL + v) for tap in range(TAPS)]
                if exact:
                    g = [self.builder.fpext(one, arithmetic.vector) for one in g]
                to = multiply(c, c.type(PANEL))
                for i, row in enumerate(scheme.kernel):
                    along = [by(row, g[column::3]) for column in range(3)]
                    for j, other in enumerate(scheme.kernel):
                        y = by(other, along)
                        y = self.builder.fptrunc(y, self.vector) if exact else y
                        self.store(y, kernels, to, (i * side + j) * PLANE + v)
            return none

        self.loop(channels.type(0), channels, [], body)

    def lanes(self, a: Any, b: Any, numbers: list[int]) -> Any:
        """A vector of lanes of ``a`` and ``b``."""
        return self.builder.shuffle_vector(a, b, ir.VectorType(ir.IntType(32), LANES)(numbers))


@inner
def pack(weight: int, dtype: int, step: int, rows: int, depth: int, packed: int) -> None:
    """Packs ``depth`` numbers of each of some rows of a weight of a ``dtype``, ``step`` numbers
    apart, as a panel ``(depth, rows)``."""
    squares, number = depth // LANES * LANES, size_of(dtype)
    out = floats(packed)
    for c in range(0, rows, LANES):
        for k in range(0, squares, LANES):
            of, to = weight + number * (c * step + k), floats(packed + 4 * (k * rows + c))
            if dtype == FLOAT32:
                _transpose(floats(of), step, to, rows)
            elif dtype == BFLOAT16:
                _transpose_bfloat16(uint16s(of), step, to, rows)
            else:
                _transpose_float16(uint16s(of), step, to, rows)
        for k in range(squares, depth):
            for i in range(c, c + LANES):
                read(out, k * rows + i, weight + number * (i * step + k), 1, dtype)


def transform(scheme: Scheme, *, exact: bool) -> Any:
    """Makes a function that transforms kernels ``(channels, 9, PANEL)`` into those of tile
    positions, ``(kernels, channels, PANEL)``, PLANE numbers apart; in float64 if ``exact``."""

    def fill(context: Any, taps: Any, kernels: Any, channels: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).transform(scheme, exact, *args)
            return context.get_dummy_value()

        return types.void(taps, kernels, channels), codegen

    return llvm(fill)


def packing(scheme: Scheme) -> Any:
    """Makes the body of a kernel that packs the transformed kernels of a weight ``(columns,
    channels, 3, 3)``, whose rows are a multiple of PANEL, as columns from number ``first`` on of
    right factors ``(kernels, channels, width)``. A unit is a panel."""
    count, exactly = scheme.kernels, transform(scheme, exact=True)

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        taps = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
        kernels = taps + 4 * TAPS * CHANNELS * PANEL
        out, made, channels = floats(job.out), floats(kernels), job.channels
        while True:
            unit = atomic_next(pointer, 0)
            if unit >= job.units:
                break
            row = unit * PANEL
            column = job.first + row
            columns = min(PANEL, job.width - column)
            for c in range(0, channels, CHANNELS):
                n = min(CHANNELS, channels - c)
                weight = job.b + size_of(job.dtype) * TAPS * (row * channels + c)
                pack(weight, job.dtype, TAPS * channels, PANEL, TAPS * n, taps)
                exactly(floats(taps), made, n)
                for number in range(count):
                    to = number * job.out_step + column * channels + c * columns
                    if columns == PANEL:
                        copy(out, to, made, number * PLANE, n * PANEL)
                    else:
                        for i in range(n):
                            at = number * PLANE + i * PANEL
                            copy(out, to + i * columns, made, at, columns)

    return body


_body, _upsample_body, _downsample_body = (
    packing(one) for one in (CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV)
)


@kernel(PACK)
def pack_kernels(pointer: Any) -> None:
    """The kernels of a weight, transformed by CONV3X3 and packed."""
    _body(pointer)


@kernel(PACK)
def pack_upsample_kernels(pointer: Any) -> None:
    """`pack_kernels` by UPSAMPLE_CONV."""
    _upsample_body(pointer)


@kernel(PACK)
def pack_downsample_kernels(pointer: Any) -> None:
    """`pack_kernels` by DOWNSAMPLE_CONV."""
    _downsample_body(pointer)
