"""Matrix products of float32 by Numba: most of the fast backend's arithmetic.

The innermost loop is written in LLVM vectors, because a loop over scalars does not keep a block of
the output in registers: ROWS rows and up to PANEL columns stay there while the rows of the right
factor are multiplied in one after another. The right factor is packed into panels of PANEL columns
beforehand, so that it is read in one stream.

The idea is that of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication".
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import BLOCK, atomic_next, carray, floats, inner, job, kernel, llvm

BMM = job("rows", "depth", "width", "a", "b", "start", "out")
LINEAR = job("rows", "chunk", "depth", "width", "a", "b", "start", "out")

# floats in a vector register, and vectors in a panel: with ROWS, as many as the registers hold
LANES, VECTORS = (16, 4) if binding.get_host_cpu_features().get("avx512f") else (8, 2)
PANEL = LANES * VECTORS
ROWS = 6
# rows of the left factor in a unit of work: they stay in a core's own cache
CHUNK = 40 * ROWS


def block(rows: int, vectors: int) -> Any:
    """Makes a function that computes a block of the output, ``rows`` high and ``vectors`` vectors
    wide.

    ``out[r, v] = start[r, v] + sum over k < depth of a[r, k] * b[k, v]``. Rows of ``start`` and
    ``out`` are ``start_step`` and ``step`` numbers apart, rows and columns of ``a`` are ``a_row``
    and ``a_column`` apart; ``b`` is a packed panel.
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
            _Code(builder).block(rows, vectors, *args)
            return context.get_dummy_value()

        given = (start, start_step, a, a_row, a_column, b, depth, out, step)
        return types.void(*given), codegen

    return llvm(fill)


class _Code:
    """Writes the LLVM code of a block."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.vector = ir.VectorType(ir.FloatType(), LANES)
        name = f"llvm.fma.v{LANES}f32"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        self.fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

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
        step: Any,
    ) -> None:
        """Writes the body of the function that `block` makes."""
        builder, integer = self.builder, depth.type
        cells = [(r, v) for r in range(rows) for v in range(vectors)]
        first = {
            (r, v): self.load(start, builder.mul(start_step, integer(r)), v * LANES)
            for r, v in cells
        }
        before = builder.block
        loop = builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(integer)
        sums = {cell: builder.phi(self.vector) for cell in cells}
        from_b = builder.mul(k, integer(vectors * LANES))
        right = [self.load(b, from_b, v * LANES) for v in range(vectors)]
        column = builder.mul(k, a_column)
        left = [
            self.broadcast(self.at(a, builder.mul(a_row, integer(r)), column)) for r in range(rows)
        ]
        totals = {(r, v): builder.call(self.fma, [left[r], right[v], sums[r, v]]) for r, v in cells}
        following = builder.add(k, integer(1))
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        k.add_incoming(integer(0), before)
        k.add_incoming(following, loop)
        for cell in cells:
            sums[cell].add_incoming(first[cell], before)
            sums[cell].add_incoming(totals[cell], loop)

        builder.position_at_end(after)
        for (r, v), total in totals.items():
            to = self.at(out, builder.mul(step, integer(r)), v * LANES)
            builder.store(total, self.vector_at(to), align=4)

    def at(self, base: Any, *offsets: Any) -> Any:
        """The address that is the sum of ``offsets`` numbers after ``base``."""
        for offset in offsets:
            offset = ir.IntType(64)(offset) if isinstance(offset, int) else offset
            base = self.builder.gep(base, [offset])
        return base

    def load(self, base: Any, *offsets: Any) -> Any:
        """The vector at an address."""
        return self.builder.load(self.vector_at(self.at(base, *offsets)), align=4)

    def vector_at(self, address: Any) -> Any:
        """The address of a float as the address of a vector."""
        return self.builder.bitcast(address, self.vector.as_pointer())

    def broadcast(self, address: Any) -> Any:
        """A vector with the number at an address in every lane."""
        undefined, index = self.vector(ir.Undefined), ir.IntType(32)
        number = self.builder.load(address, align=4)
        first = self.builder.insert_element(undefined, number, index(0))
        lanes = ir.VectorType(index, LANES)([0] * LANES)
        return self.builder.shuffle_vector(first, undefined, lanes)


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
def _multiply(
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
        _multiply(job.start, a, b, out, depth, width, rows, (width - column) // LANES)


@kernel(LINEAR)
def linear(pointer: Any) -> None:
    """A linear layer: ``(rows, depth)`` times the transpose of ``(width, depth)``, plus the bias
    ``start``. A unit is a panel of ``chunk`` rows; it packs its panel of the weight first."""
    job = carray(pointer, 1)[0]
    own = job.scratch + 4 * atomic_next(pointer, 1) * job.scratch_size
    depth, width = job.depth, job.width
    packed, weight = floats(own), floats(job.b)
    panels = (width + PANEL - 1) // PANEL
    while True:
        unit = atomic_next(pointer, 0)
        if unit >= job.units:
            break
        column = unit % panels * PANEL
        row = unit // panels * job.chunk
        columns = min(PANEL, width - column)
        for k0 in range(0, depth, BLOCK):
            for c in range(columns):
                at = (column + c) * depth
                for k in range(k0, min(k0 + BLOCK, depth)):
                    packed[k * columns + c] = weight[at + k]
        a = job.a + 4 * row * depth
        out = job.out + 4 * (row * width + column)
        rows = min(job.chunk, job.rows - row)
        start = job.start + 4 * column
        _multiply(start, a, own, out, depth, width, rows, columns // LANES)
