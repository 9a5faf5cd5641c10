"""Matrix products of float32, compiled by Numba: the fast backend's arithmetic itself.

The innermost loop is written in LLVM's vectors, because no loop over scalars keeps a block of the
output in registers: ROWS rows and up to PANEL columns of it stay there while one row of the right
factor after another is multiplied in. The right factor is packed into panels of that many columns
beforehand, so that it is read in one stream.

The idea is that of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication".
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import BLOCK, carray, floats, inner, job, kernel, spelled, take

PRODUCT = job("rows", "depth", "width", "a", "b", "start", "out")
LINEAR = job("rows", "chunk", "depth", "width", "a", "b", "start", "out")

# floats in a vector register, and vectors in a panel: with ROWS, as many as the registers hold
LANES, VECTORS = (16, 4) if binding.get_host_cpu_features().get("avx512f") else (8, 2)
PANEL = LANES * VECTORS
ROWS = 6
# rows of the left factor that a unit of work reads: they stay in the cache that a core has for
# itself
CHUNK = 40 * ROWS


def block(rows: int, vectors: int) -> Any:
    """A function that fills a block of the output, ``rows`` high and ``vectors`` vectors wide.

    ``out[r, v] = start[r, v] + sum over k < depth of a[r, k] * b[k, v]``, where the rows of
    ``start`` and ``out`` are ``start_step`` and ``step`` numbers apart, those of ``a`` ``a_row``
    and its columns ``a_column``; ``b`` is a packed panel.
    """

    def filled(
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

    return spelled(filled)


class _Code:
    """Writes a block's code."""

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
        """See `block`."""
        builder, whole = self.builder, depth.type
        places = [(r, v) for r in range(rows) for v in range(vectors)]
        first = {
            (r, v): self.load(start, builder.mul(start_step, whole(r)), v * LANES)
            for r, v in places
        }
        before = builder.block
        loop = builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(whole)
        sums = {place: builder.phi(self.vector) for place in places}
        from_b = builder.mul(k, whole(vectors * LANES))
        right = [self.load(b, from_b, v * LANES) for v in range(vectors)]
        column = builder.mul(k, a_column)
        left = [self.spread(self.at(a, builder.mul(a_row, whole(r)), column)) for r in range(rows)]
        totals = {
            (r, v): builder.call(self.fma, [left[r], right[v], sums[r, v]]) for r, v in places
        }
        following = builder.add(k, whole(1))
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        k.add_incoming(whole(0), before)
        k.add_incoming(following, loop)
        for place in places:
            sums[place].add_incoming(first[place], before)
            sums[place].add_incoming(totals[place], loop)

        builder.position_at_end(after)
        for (r, v), total in totals.items():
            to = self.at(out, builder.mul(step, whole(r)), v * LANES)
            builder.store(total, self.wide(to), align=4)

    def at(self, base: Any, *offsets: Any) -> Any:
        """The place so many numbers after another."""
        for offset in offsets:
            offset = ir.IntType(64)(offset) if isinstance(offset, int) else offset
            base = self.builder.gep(base, [offset])
        return base

    def load(self, base: Any, *offsets: Any) -> Any:
        """The vector so many numbers after a place."""
        return self.builder.load(self.wide(self.at(base, *offsets)), align=4)

    def wide(self, place: Any) -> Any:
        """A number's place as a vector's."""
        return self.builder.bitcast(place, self.vector.as_pointer())

    def spread(self, place: Any) -> Any:
        """The number there in every lane."""
        blank, index = self.vector(ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(blank, self.builder.load(place, align=4), index(0))
        lanes = ir.VectorType(index, LANES)([0] * LANES)
        return self.builder.shuffle_vector(first, blank, lanes)


def _panel(vectors: int) -> Any:
    """A function that fills one panel's columns of some rows of the output."""
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
            # the last block ends with the last row, over some of the block before
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
    """One panel's columns, of which there are ``vectors`` vectors or more."""
    if vectors >= VECTORS:
        _whole_panel(start, a, b, out, depth, width, rows)
    elif vectors == 3:
        _panel_of_3(start, a, b, out, depth, width, rows)
    elif vectors == 2:
        _panel_of_2(start, a, b, out, depth, width, rows)
    else:
        _panel_of_1(start, a, b, out, depth, width, rows)


@kernel(PRODUCT)
def product(pointer: Any) -> None:
    """``(places, rows, depth)`` times packed ``(places, depth, width)`` for each place; a unit is a
    panel of a chunk of rows. ``start``: a panel of zeros."""
    job = carray(pointer, 1)[0]
    take(pointer, 1)
    depth, width = job.depth, job.width
    panels = (width + PANEL - 1) // PANEL
    chunks = (job.rows + CHUNK - 1) // CHUNK
    while True:
        unit = take(pointer, 0)
        if unit >= job.units:
            break
        column = unit % panels * PANEL
        place = unit // panels // chunks
        row = unit // panels % chunks * CHUNK
        a = job.a + 4 * (place * job.rows + row) * depth
        b = job.b + 4 * (place * width + column) * depth
        out = job.out + 4 * ((place * job.rows + row) * width + column)
        rows = min(CHUNK, job.rows - row)
        _multiply(job.start, a, b, out, depth, width, rows, (width - column) // LANES)


@kernel(LINEAR)
def linear(pointer: Any) -> None:
    """``(rows, depth)`` times the transpose of ``(width, depth)``, which each unit packs a panel
    of, and the bias ``start``; a unit is a panel of a chunk of so many rows."""
    job = carray(pointer, 1)[0]
    mine = job.scratch + 4 * take(pointer, 1) * job.scratch_size
    depth, width = job.depth, job.width
    packed, weight = floats(mine), floats(job.b)
    panels = (width + PANEL - 1) // PANEL
    while True:
        unit = take(pointer, 0)
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
        _multiply(start, a, mine, out, depth, width, rows, columns // LANES)
