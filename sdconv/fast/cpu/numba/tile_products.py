"""Winograd's products with a weight that is transformed as it is read, by Numba.

A transformed weight has four times as many values as the weight. With few tiles, reading it takes
longer than the products do. Here each panel of output channels transforms the kernels of a few
input channels at a time, which stay in a core's own cache while they are multiplied, so that only
the weight itself is read, and nothing is kept from call to call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import atomic_next, carray, copy, floats, inner, job, kernel, llvm
from sdconv.fast.cpu.numba.gemm import PANEL, ROWS, VECTORS, block
from sdconv.fast.cpu.numba.packing import pack
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode
from sdconv.fast.cpu.tiling import MULTIPLE
from sdconv.fast.cpu.winograd import CONV3X3, UPSAMPLE_CONV, Scheme

PRODUCTS = job(
    *("rows", "chunk", "channels", "columns", "width"),
    *("a", "b", "start", "out", "out_step"),
)

# input channels whose kernels are transformed at a time
_CHANNELS = min(MULTIPLE, 2048 // PANEL)
_TAPS = 9
# floats in a cache line
_LINE = 16
# from one tile position's kernels to the next: not a multiple of a page, see `Scratch.planes`
_PLANE = _CHANNELS * PANEL + 64


@cache
def scratch_size(rows: int) -> int:
    """Floats of scratch memory for each thread, with units of ``rows`` tiles."""
    return _TAPS * _CHANNELS * PANEL + CONV3X3.positions * (_PLANE + rows * PANEL)


_rows_6, _rows_4, _rows_2, _rows_1 = (block(rows, VECTORS) for rows in (ROWS, 4, 2, 1))


class _Code(VectorCode):
    """Writes the LLVM code of the kernels' transform."""

    def transform(self, scheme: Scheme, taps: Any, kernels: Any, channels: Any) -> None:
        """Writes the body of what `_transform` makes."""
        side, multiply = len(scheme.kernel), self.builder.mul

        def by(row: tuple[float, ...], values: list[Any]) -> Any:
            terms = zip(row, values, strict=True)
            return self.linear(*(term for term in terms if term[0]))

        def body(c: Any, none: list[Any]) -> list[Any]:
            for v in range(0, PANEL, LANES):
                at = multiply(c, c.type(_TAPS * PANEL))
                g = [self.load(taps, at, tap * PANEL + v) for tap in range(_TAPS)]
                to = multiply(c, c.type(PANEL))
                for i, row in enumerate(scheme.kernel):
                    along = [by(row, g[column::3]) for column in range(3)]
                    for j, other in enumerate(scheme.kernel):
                        self.store(by(other, along), kernels, to, (i * side + j) * _PLANE + v)
            return none

        self.loop(channels.type(0), channels, [], body)


def _transform(scheme: Scheme) -> Any:
    """Makes a function that transforms kernels ``(channels, 9, PANEL)`` into tile positions
    ``(positions, channels, PANEL)``, which are _PLANE numbers apart."""

    def fill(context: Any, taps: Any, kernels: Any, channels: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _Code(builder).transform(scheme, *args)
            return context.get_dummy_value()

        return types.void(taps, kernels, channels), codegen

    return llvm(fill)


@llvm
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line of an address, to be in a core's second cache when it is read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        name = "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [builder.inttoptr(args[0], pointer), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inner
def _multiply(
    start: int,
    start_step: int,
    a: int,
    a_row: int,
    b: Any,
    depth: int,
    out: int,
    step: int,
    rows: int,
) -> None:
    """Adds the products of some rows with a panel to ``start``, as `block` does."""
    row = 0
    while row < rows:
        left, begin = floats(a + 4 * row * a_row), floats(start + 4 * row * start_step)
        to = floats(out + 4 * row * step)
        if rows - row >= ROWS:
            _rows_6(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += ROWS
        elif rows - row >= 4:
            _rows_4(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += 4
        elif rows - row >= 2:
            _rows_2(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += 2
        else:
            _rows_1(begin, start_step, left, a_row, 1, b, depth, to, step)
            row += 1


def _kernel(scheme: Scheme) -> Any:
    """Makes the kernel of a scheme. A unit is a panel of ``chunk`` tiles, of all positions."""
    positions, transform = scheme.positions, _transform(scheme)

    @inner
    def body(pointer: Any) -> None:
        job = carray(pointer, 1)[0]
        taps = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
        kernels = taps + 4 * _TAPS * _CHANNELS * PANEL
        sums = kernels + 4 * positions * _PLANE
        channels, width, panels = job.channels, job.width, job.columns // PANEL
        while True:
            unit = atomic_next(pointer, 0)
            if unit >= job.units:
                break
            column, first = unit % panels * PANEL, unit // panels * job.chunk
            rows = min(job.chunk, job.rows - first)
            for c in range(0, channels, _CHANNELS):
                weight = job.b + 4 * _TAPS * (column * channels + c)
                pack(weight, _TAPS * channels, PANEL, _TAPS * _CHANNELS, taps)
                transform(floats(taps), floats(kernels), _CHANNELS)
                block = c // MULTIPLE * positions * job.rows * MULTIPLE + c % MULTIPLE
                for position in range(positions):
                    a = job.a + 4 * (block + (position * job.rows + first) * MULTIPLE)
                    for row in range(PANEL):  # a line of each row of the next weights
                        ahead = row * channels + _CHANNELS
                        _prefetch(weight + 4 * (_TAPS * ahead + position * _LINE))
                    b = floats(kernels + 4 * position * _PLANE)
                    to = sums + 4 * position * rows * PANEL
                    if c == 0:
                        _multiply(job.start, 0, a, MULTIPLE, b, _CHANNELS, to, PANEL, rows)
                    else:
                        _multiply(to, PANEL, a, MULTIPLE, b, _CHANNELS, to, PANEL, rows)
            out, made = floats(job.out), floats(sums)
            for position in range(positions):
                for row in range(rows):
                    to = position * job.out_step + (first + row) * width + column
                    copy(out, to, made, (position * rows + row) * PANEL, PANEL)

    return body


_body, _upsample_body = _kernel(CONV3X3), _kernel(UPSAMPLE_CONV)


@kernel(PRODUCTS)
def products(pointer: Any) -> None:
    """Tiles ``(36, rows, channels)`` times the kernels of a weight ``(columns, channels, 3, 3)``,
    transformed by CONV3X3, into ``(36, rows, width)``."""
    _body(pointer)


@kernel(PRODUCTS)
def upsample_products(pointer: Any) -> None:
    """`products` by UPSAMPLE_CONV, with 25 tile positions."""
    _upsample_body(pointer)
