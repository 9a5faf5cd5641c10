"""Packs rows of a weight into a panel of a matrix product, in squares transposed in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import floats, inner, llvm
from sdconv.fast.cpu.numba.vectors import LANES, VectorCode


@llvm
def _transpose(typing_context: Any, x: Any, x_step: Any, out: Any, out_step: Any) -> Any:
    """Writes the transpose of a square of LANES rows and columns; rows are ``x_step`` and
    ``out_step`` numbers apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _Code(builder).transpose(*args)
        return context.get_dummy_value()

    return types.void(x, x_step, out, out_step), codegen


class _Code(VectorCode):
    """Writes the LLVM code of a transpose."""

    def transpose(self, x: Any, x_step: Any, out: Any, out_step: Any) -> None:
        """Writes the body of ``_transpose``: squares of half the size change places, then those
        inside them."""
        builder, lanes = self.builder, range(LANES)
        rows = [self.load(x, builder.mul(x_step, x_step.type(i))) for i in lanes]
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

    def lanes(self, a: Any, b: Any, numbers: list[int]) -> Any:
        """A vector of lanes of ``a`` and ``b``."""
        return self.builder.shuffle_vector(a, b, ir.VectorType(ir.IntType(32), LANES)(numbers))


@inner
def pack(weight: int, step: int, rows: int, depth: int, packed: int) -> None:
    """Packs ``depth`` numbers of each of some rows of a weight, ``step`` numbers apart, as a panel
    ``(depth, rows)``."""
    squares = depth // LANES * LANES
    x, out = floats(weight), floats(packed)
    for c in range(0, rows, LANES):
        for k in range(0, squares, LANES):
            of, to = floats(weight + 4 * (c * step + k)), floats(packed + 4 * (k * rows + c))
            _transpose(of, step, to, rows)
        for k in range(squares, depth):
            for i in range(c, c + LANES):
                out[k * rows + i] = x[i * step + k]
