"""Vectors of floats in LLVM code, for loops that have to keep their numbers in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import llvm
from sdconv.fast.cpu.numba.sixteen_bits import FLOAT32, narrowed, widened

# floats in a vector register
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
# floats in a cache line
LINE = 16
# added to a small number, its last bits are the nearest integer
_ROUND = 1.5 * 2**23
_LOG2_E = 1.44269502162933349609375
# 2^r for -1/2 <= r <= 1/2, within 2e-9
_POWER = (
    *(0.00015345812, 0.00133999309, 0.00961848907, 0.05550328642),
    *(0.24022646248, 0.69314718246, 1.0),
)


class VectorCode:
    """Writes LLVM code with vectors of LANES numbers: of float32, or of float64 if ``double``."""

    def __init__(self, builder: Any, *, double: bool = False) -> None:
        self.builder = builder
        self.vector = ir.VectorType(ir.DoubleType() if double else ir.FloatType(), LANES)
        name = f"llvm.fma.v{LANES}f{64 if double else 32}"
        self.fma = self.function(name, self.vector, [self.vector] * 3)

    def function(self, name: str, returns: Any, takes: list[Any]) -> Any:
        """One of LLVM's own functions, declared once in a module."""
        module = self.builder.module
        kind = ir.FunctionType(returns, takes)
        return module.globals.get(name) or ir.Function(module, kind, name)

    def at(self, base: Any, *offsets: Any) -> Any:
        """The address that is the sum of ``offsets`` numbers after ``base``."""
        for offset in offsets:
            offset = ir.IntType(64)(offset) if isinstance(offset, int) else offset
            base = self.builder.gep(base, [offset])
        return base

    def prefetch(self, address: Any, *, write: bool = False, cache: int = 1) -> None:
        """Asks for the cache line of a pointer, to be in a core's first or second cache when it is
        used. A pointer that leads nowhere does no harm."""
        byte, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        takes = [byte, *[integer] * 3]
        function = self.function("llvm.prefetch.p0i8", ir.VoidType(), takes)
        hints = (integer(int(write)), integer(4 - cache), integer(1))
        self.builder.call(function, [self.builder.bitcast(address, byte), *hints])

    def load(self, base: Any, *offsets: Any, dtype: int = FLOAT32) -> Any:
        """The vector at an address, in float32 if it is of another ``dtype``."""
        address = self.at(base, *offsets)
        if dtype == FLOAT32:
            return self.builder.load(self.vector_at(address), align=4)
        return widened(self.builder, self.builder.load(self._halves_at(address), align=2), dtype)

    def store(self, vector: Any, base: Any, *offsets: Any, dtype: int = FLOAT32) -> Any:
        """Writes a vector to an address, as numbers of a ``dtype``; returns it as rounded."""
        address = self.at(base, *offsets)
        if dtype == FLOAT32:
            self.builder.store(vector, self.vector_at(address), align=4)
            return vector
        halves = narrowed(self.builder, vector, dtype)
        self.builder.store(halves, self._halves_at(address), align=2)
        return widened(self.builder, halves, dtype)

    def _halves_at(self, address: Any) -> Any:
        return self.builder.bitcast(address, ir.VectorType(ir.IntType(16), LANES).as_pointer())

    def vector_at(self, address: Any) -> Any:
        """The address of a float as the address of a vector."""
        return self.builder.bitcast(address, self.vector.as_pointer())

    def constant(self, value: float) -> Any:
        """A vector with a number in every lane."""
        return self.vector([value] * LANES)

    def broadcast(self, address: Any) -> Any:
        """A vector with the number at an address in every lane."""
        return self.splat(self.builder.load(address, align=4))

    def splat(self, number: Any) -> Any:
        """A vector with a number in every lane."""
        undefined, index = self.vector(ir.Undefined), ir.IntType(32)
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

    def linear(self, *terms: tuple[float, Any]) -> Any:
        """A sum of vectors times numbers, each rounded once with the sum so far, from the first."""
        total = None
        for factor, vector in terms:
            if total is not None and abs(factor) == 1.0:
                add = self.builder.fadd if factor > 0 else self.builder.fsub
                total = add(total, vector)
            elif total is not None:
                total = self.builder.call(self.fma, [self.constant(factor), vector, total])
            else:
                scaled = self.builder.fmul(self.constant(factor), vector)
                total = vector if factor == 1.0 else scaled
        return total

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of ``a`` and ``b``; ``b`` where it is NaN, as in the processor's maximum."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def smaller(self, a: Any, b: Any) -> Any:
        """The smaller of ``a`` and ``b``; ``b`` where it is NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def power(self, x: Any, factor: float = 1.0) -> Any:
        """2^(factor x) within 1.2e-7, for exponents up to 126; those below -126 may count as -126,
        or as NaN where they are infinite. NaN stays NaN."""
        builder, scale = self.builder, self.constant(factor)
        if LANES != 16:
            least = self.constant(-126.0 / factor)
            x = self.larger(least, x) if factor > 0 else self.smaller(least, x)
        shifted = builder.call(self.fma, [scale, x, self.constant(_ROUND)])
        n = builder.fsub(shifted, self.constant(_ROUND))
        r = builder.call(self.fma, [scale, x, builder.fneg(n)])
        p = self.constant(_POWER[0])
        for coefficient in _POWER[1:]:
            p = builder.call(self.fma, [p, r, self.constant(coefficient)])
        if LANES == 16:
            takes = [*[self.vector] * 3, ir.IntType(16), ir.IntType(32)]
            function = self.function("llvm.x86.avx512.mask.scalef.ps.512", self.vector, takes)
            everywhere, as_set = takes[3](-1), takes[4](4)
            return builder.call(function, [p, n, p, everywhere, as_set])
        bits = ir.VectorType(ir.IntType(32), LANES)
        exponent = builder.shl(builder.bitcast(shifted, bits), bits([23] * LANES))
        exponent = builder.add(exponent, bits([127 << 23] * LANES))
        return builder.fmul(p, builder.bitcast(exponent, self.vector))

    def silu(self, y: Any) -> Any:
        """``y / (1 + exp(-y))`` within a few units in the last place; not finite where ``y`` is
        infinite."""
        power = self.power(self.larger(self.constant(-87.0), y), -_LOG2_E)
        return self.divide(y, self.builder.fadd(self.constant(1.0), power))

    def divide(self, y: Any, by: Any) -> Any:
        """``y / by``."""
        return self.builder.fdiv(y, by)


@llvm
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line of an address, to be in a core's second cache when it is read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        VectorCode(builder).prefetch(address, cache=2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen
