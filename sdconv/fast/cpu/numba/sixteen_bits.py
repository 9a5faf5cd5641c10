"""Numbers of 16 bits, bfloat16 and float16: feature maps are stored in them and computed with in
float32.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

from sdconv.fast.cpu.numba.dsl import copy, f32, floats, inner, llvm, uint16s
from sdconv.fast.cpu.processor import ProcessorError, compiles_for_this_processor

# what the numbers of a feature map are, in jobs and in code
FLOAT32, BFLOAT16, FLOAT16 = range(3)
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_FEATURES = binding.get_host_cpu_features()
if _FEATURES.get("sse2") and not _FEATURES.get("f16c"):
    raise ProcessorError("the processor has no F16C, instructions for float16")
_HAS_BFLOAT16 = bool(_FEATURES.get("avx512bf16")) and compiles_for_this_processor()
binding.initialize_native_asmparser()


def _like(value: Any, number: Any) -> Any:
    """The type of a number, or of a vector of as many as ``value`` has."""
    kind = value.type
    return ir.VectorType(number, kind.count) if isinstance(kind, ir.VectorType) else number


def _constant(kind: Any, number: int) -> Any:
    return kind([number] * kind.count if isinstance(kind, ir.VectorType) else number)


def widened(builder: Any, halves: Any, dtype: int) -> Any:
    """One 16-bit number or a vector of them, given as integers, in float32."""
    wide, single = _like(halves, ir.IntType(32)), _like(halves, ir.FloatType())
    if dtype == FLOAT16:
        return builder.fpext(builder.bitcast(halves, _like(halves, ir.HalfType())), single)
    return builder.bitcast(builder.shl(builder.zext(halves, wide), _constant(wide, 16)), single)


def narrowed(builder: Any, value: Any, dtype: int) -> Any:
    """One float32 or a vector of them as 16-bit numbers, rounded to nearest even, as integers."""
    narrow, wide = _like(value, ir.IntType(16)), _like(value, ir.IntType(32))
    if dtype == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, _like(value, ir.HalfType())), narrow)
    if _HAS_BFLOAT16 and getattr(value.type, "count", 1) == 16:
        # llvmlite has no bfloat16, which LLVM's function returns
        function = ir.FunctionType(narrow, [value.type])
        code = "vcvtneps2bf16 $1, $0"
        return builder.asm(function, code, "=v,v", [value], side_effect=False)
    bits, places = builder.bitcast(value, wide), _constant(wide, 16)
    odd = builder.and_(builder.lshr(bits, places), _constant(wide, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(wide, 0x7FFF))), places)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _constant(wide, 0x7FC0), rounded), narrow)


def _scalar(convert: Any, signature: Any, dtype: int) -> Any:
    """Makes a function for kernels that converts one number."""

    def one(typing_context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return convert(builder, args[0], dtype)

        return signature, codegen

    return llvm(one)


_TO_FLOAT32, _FROM_FLOAT32 = types.float32(types.uint16), types.uint16(types.float32)
# in kernels: from one number, given as an integer, and to one
widen_bfloat16 = _scalar(widened, _TO_FLOAT32, BFLOAT16)
widen_float16 = _scalar(widened, _TO_FLOAT32, FLOAT16)
narrow_bfloat16 = _scalar(narrowed, _FROM_FLOAT32, BFLOAT16)
narrow_float16 = _scalar(narrowed, _FROM_FLOAT32, FLOAT16)


@inner
def size_of(dtype: int) -> int:
    """Bytes of a number."""
    return 4 if dtype == FLOAT32 else 2


@inner
def read(out: Any, to: int, address: int, n: int, dtype: int) -> None:
    """Reads ``n`` numbers of a ``dtype`` into float32."""
    if dtype == FLOAT32:
        copy(out, to, floats(address), 0, n)
        return
    halves = uint16s(address)
    if dtype == BFLOAT16:
        for c in range(n):
            out[to + c] = widen_bfloat16(halves[c])
    else:
        for c in range(n):
            out[to + c] = widen_float16(halves[c])


@inner
def write(address: int, x: Any, at: int, n: int, dtype: int) -> None:
    """Writes ``n`` numbers as a ``dtype``; ``x`` has them as rounded afterwards."""
    if dtype == FLOAT32:
        copy(floats(address), 0, x, at, n)
        return
    halves = uint16s(address)
    if dtype == BFLOAT16:
        for c in range(n):
            halves[c] = narrow_bfloat16(f32(x[at + c]))
            x[at + c] = widen_bfloat16(halves[c])
    else:
        for c in range(n):
            halves[c] = narrow_float16(f32(x[at + c]))
            x[at + c] = widen_float16(halves[c])
