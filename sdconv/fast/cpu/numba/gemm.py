"""Matrix products of float32 by Numba: most of the fast backend's arithmetic.

The innermost loop is written in LLVM vectors, because a loop over scalars does not keep a block of
the output in registers: ROWS rows and up to PANEL columns stay there while the rows of the right
factor are multiplied in one after another. The right factor is packed into panels of PANEL columns
beforehand, so that it is read in one stream.

The idea is that of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import atomic_next, carray, floats, inner, job, kernel, llvm

BMM = job("rows", "depth", "width", "a", "b", "start", "out")

# floats in a vector register, and vectors in a panel: with ROWS, as many as the registers hold
LANES, VECTORS = (16, 4) if binding.get_host_cpu_features().get("avx512f") else (8, 2)
PANEL = LANES * VECTORS
ROWS = 6
# rows of the left factor in a unit of work: they stay in a core's own cache
CHUNK = 40 * ROWS


def block(rows: int, vectors: int, *, zero: bool = False) -> Any:
    """Makes a function that computes a block of the output, ``rows`` high and ``vectors`` vectors
    wide.

    ``out[r, v] = start[r, v] + sum over k < depth of a[r, k] * b[k, v]``: the sum first, so that
    its rounding does not grow with ``start``, which may be ``out``. Rows of ``start`` and
    ``out`` are ``start_step`` and ``step`` numbers apart, rows and columns of ``a`` are ``a_row``
    and ``a_column`` apart; ``b`` is a packed panel. With ``zero``, ``start`` is not read and counts
    as 0.
    """

    def fill(
        typing_context: Any,
        start: Any,
        start_step: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        depth: Any,
        out: Any,
        step: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start = (None, None) if zero else args[:2]
            _Code(builder).block(rows, vectors, *start, *args[2:])
            return context.get_dummy_value()

        given = (start, start_step, a, a_row, a_column, b, depth, out, step)
        return types.void(*given), codegen

    return llvm(fill)


class VectorCode:
    """Writes LLVM code with vectors of floats."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.vector = ir.VectorType(ir.FloatType(), LANES)
        name = f"llvm.fma.v{LANES}f32"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        self.fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

    def at(self, base: Any, *offsets: Any) -> Any:
        """The address that is the sum of ``offsets`` numbers after ``base``."""
        for offset in offsets:
            offset = ir.IntType(64)(offset) if isinstance(offset, int) else offset
            base = self.builder.gep(base, [offset])
        return base

    def load(self, base: Any, *offsets: Any) -> Any:
        """The vector at an address."""
        return self.builder.load(self.vector_at(self.at(base, *offsets)), align=4)

    def store(self, vector: Any, base: Any, *offsets: Any) -> None:
        """Writes a vector to an address."""
        self.builder.store(vector, self.vector_at(self.at(base, *offsets)), align=4)

    def vector_at(self, address: Any) -> Any:
        """The address of a float as the address of a vector."""
        return self.builder.bitcast(address, self.vector.as_pointer())

    def constant(self, value: float) -> Any:
        """A vector with a number in every lane."""
        return self.vector([value] * LANES)

    def broadcast(self, address: Any) -> Any:
        """A vector with the number at an address in every lane."""
        undefined, index = self.vector(ir.Undefined), ir.IntType(32)
        number = self.builder.load(address, align=4)
        first = self.builder.insert_element(undefined, number, index(0))
        lanes = ir.VectorType(index, LANES)([0] * LANES)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def loop(
        self,
        first: Any,
        end: Any,
        carried: list[Any],
        body: Callable[[Any, list[Any]], list[Any]],
    ) -> list[Any]:
        """Writes a loop over the integers from ``first`` up to ``end``.

        ``body`` gets the integer and the values that the step before has returned, at first
        ``carried``. Returns those of the last step.
        """
        builder, before = self.builder, self.builder.block
        head, step, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(first.type)
        values = [builder.phi(value.type) for value in carried]
        builder.cbranch(builder.icmp_signed("<", i, end), step, after)
        builder.position_at_end(step)
        results = body(i, values)
        following = builder.add(i, first.type(1))
        last = builder.block
        builder.branch(head)
        i.add_incoming(first, before)
        i.add_incoming(following, last)
        for value, start, result in zip(values, carried, results, strict=True):
            value.add_incoming(start, before)
            value.add_incoming(result, last)
        builder.position_at_end(after)
        return values


class _Code(VectorCode):
    """Writes the LLVM code of a block."""

    def block(
        self,
        rows: int,
        vectors: int,
        start: Any,
        start_step: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        depth: Any,
        out: Any,
        out_step: Any,
    ) -> None:
        """Writes the body of the function that `block` makes."""
        builder, integer = self.builder, depth.type
        cells = [(r, v) for r in range(rows) for v in range(vectors)]

        def step(k: Any, sums: list[Any]) -> list[Any]:
            from_b = builder.mul(k, integer(vectors * LANES))
            right = [self.load(b, from_b, v * LANES) for v in range(vectors)]
            column = builder.mul(k, a_column)
            left = [
                self.broadcast(self.at(a, builder.mul(a_row, integer(r)), column))
                for r in range(rows)
            ]
            return [
                builder.call(self.fma, [left[r], right[v], total])
                for (r, v), total in zip(cells, sums, strict=True)
            ]

        totals = self.loop(integer(0), depth, [self.constant(0.0)] * len(cells), step)
        for (r, v), total in zip(cells, totals, strict=True):
            if start is not None:
                begin = self.load(start, builder.mul(start_step, integer(r)), v * LANES)
                total = builder.fadd(begin, total)
            self.store(total, out, builder.mul(out_step, integer(r)), v * LANES)


def _panel(vectors: int) -> Any:
    """Makes a function that computes some rows of the output, in one panel's columns."""
    several, one = block(ROWS, vectors), block(1, vectors)

    @inner
    def panel(start: int, a: int, b: int, out: int, depth: int, width: int, rows: int) -> None:
        begin, right = floats(start), floats(b)
        if rows < ROWS:
            for row in range(rows):
                to = floats(out + 4 * row * width)
                one(begin, 0, floats(a + 4 * row * depth), depth, 1, right, depth, to, width)
            return
        for first in range(0, rows, ROWS):
            # the last block ends with the last row and overlaps the block before
            row = min(first, rows - ROWS)
            to = floats(out + 4 * row * width)
            several(begin, 0, floats(a + 4 * row * depth), depth, 1, right, depth, to, width)

    return panel


_panel_of_1, _panel_of_2, _panel_of_3, _whole_panel = (
    _panel(vectors) for vectors in (1, 2, 3, VECTORS)
)


@inner
def multiply(
    start: int, a: int, b: int, out: int, depth: int, width: int, rows: int, vectors: int
) -> None:
    """Computes some rows in one panel's columns; ``vectors`` vectors or more are left."""
    if vectors >= VECTORS:
        _whole_panel(start, a, b, out, depth, width, rows)
    elif vectors == 3:
        _panel_of_3(start, a, b, out, depth, width, rows)
    elif vectors == 2:
        _panel_of_2(start, a, b, out, depth, width, rows)
    else:
        _panel_of_1(start, a, b, out, depth, width, rows)


@kernel(BMM)
def bmm(pointer: Any) -> None:
    """Batched product of ``(rows, depth)`` and packed ``(depth, width)``. A unit is a panel of a
    chunk of rows. ``start``: a panel of zeros."""
    job = carray(pointer, 1)[0]
    atomic_next(pointer, 1)
    depth, width = job.depth, job.width
    panels = (width + PANEL - 1) // PANEL
    chunks = (job.rows + CHUNK - 1) // CHUNK
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        column = unit % panels * PANEL
        item = unit // panels // chunks
        row = unit // panels % chunks * CHUNK
        a = job.a + 4 * (item * job.rows + row) * depth
        b = job.b + 4 * (item * width + column) * depth
        out = job.out + 4 * ((item * job.rows + row) * width + column)
        rows = min(CHUNK, job.rows - row)
        multiply(job.start, a, b, out, depth, width, rows, (width - column) // LANES)
