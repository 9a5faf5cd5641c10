"""Building blocks of the Numba kernels: jobs, pointers, atomic counters, sums.

Every thread of a team calls a kernel once with the address of the same job: a record of 64-bit
integers, each a size or an address. Each call claims units of work by incrementing the job's
first field until none are left (see `launch`). The inner loops run over channels and write one
stream each, which LLVM vectorises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import cfunc, from_dtype, njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

# channels that a kernel works on at a time
BLOCK = 64


def job(*names: str) -> np.dtype[Any]:
    """The dtype of a kernel's job: the fields that every kernel has, then its own. An absent array
    has the address 0.

    The last field is unused. Its name is a hash of the sources that kernels are compiled from:
    Numba caches compiled code by the names of a job's fields, but checks one file for changes.
    """
    every = ("next_unit", "next_thread", "units", "scratch", "scratch_size")
    return np.dtype([(name, np.int64) for name in (*every, *names, _source_hash())])


@cache
def _source_hash() -> str:
    here = Path(__file__)
    # the matrices of the Winograd transforms and the sizes of blocks are compiled into the kernels
    outside = (here.parents[1] / name for name in ("tiling.py", "winograd.py"))
    files = (*outside, *sorted(here.parent.glob("*.py")))
    contents = b"".join(file.read_bytes() for file in files)
    return f"source_{hashlib.blake2b(contents, digest_size=8).hexdigest()}"


# fused multiply-add and reciprocals are allowed; NaN and infinity keep their meaning
_MATH = {"contract", "arcp", "nsz"}
_CPointer: Any = types.CPointer
carray: Any = vars(numba)["carray"]
f32 = np.float32


def inner(function: Function) -> Function:
    """Compiles a function that kernels call, to be inlined into them."""
    compiled = njit(fastmath=_MATH, error_model="numpy")(function)
    return cast(Function, compiled)


def kernel(job: np.dtype[Any]) -> Callable[[Callable[[Any], None]], Any]:
    """Compiles a function that takes the address of a job with these fields."""
    signature = types.void(_CPointer(from_dtype(job)))
    compiler: Any = cfunc(signature, cache=True, fastmath=_MATH, error_model="numpy")
    return cast(Callable[[Callable[[Any], None]], Any], compiler)


def llvm(function: Callable[..., Any]) -> Any:
    """Makes a function callable in kernels whose LLVM code it generates."""
    return intrinsic(function)


def _pointer_to(kind: Any) -> Any:
    def pointer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return _CPointer(kind)(types.int64), codegen

    return llvm(pointer)


floats = _pointer_to(types.float32)
doubles = _pointer_to(types.float64)
uint16s = _pointer_to(types.uint16)
uint32s = _pointer_to(types.uint32)
uint64s = _pointer_to(types.uint64)
int64s = _pointer_to(types.int64)


@llvm
def call(typing_context: Any, kernel: Any, job: Any) -> Any:
    """Calls a kernel with a job, both by their addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        function, given = (
            builder.inttoptr(arg, to) for arg, to in zip(args, (kind, pointer), strict=True)
        )
        builder.call(function, [given])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@llvm
def atomic_next(typing_context: Any, job: Any, field: Any) -> Any:
    """Increments a job's field atomically and returns its previous value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = context.get_value_type(_CPointer(types.int64))
        address = builder.gep(builder.bitcast(args[0], integers), [args[1]])
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", address, one, "monotonic")

    return types.int64(job, types.int64), codegen


@inner
def copy(out: Any, to: int, x: Any, at: int, n: int) -> None:
    for c in range(n):
        out[to + c] = x[at + c]


@inner
def zero(out: Any, to: int, n: int) -> None:
    for c in range(n):
        out[to + c] = f32(0)


@inner
def clear(x: Any, at: int, n: int) -> None:
    """Fills float64 with zeros."""
    for i in range(n):
        x[at + i] = 0.0


@inner
def accumulate(sums: Any, squares: Any, x: Any, at: int, step: int, pixels: int, n: int) -> None:
    """Adds the values of n channels of adjacent pixels, and their squares, in float64; two pixels
    at once, since the sums are read from memory and written back."""
    for pixel in range(0, pixels - 1, 2):
        a = at + pixel * step
        b = a + step
        for c in range(n):
            sums[c] += np.float64(x[a + c]) + np.float64(x[b + c])
        for c in range(n):
            squares[c] += np.float64(x[a + c]) * np.float64(x[a + c]) + np.float64(
                x[b + c]
            ) * np.float64(x[b + c])
    if pixels % 2:
        a = at + (pixels - 1) * step
        for c in range(n):
            sums[c] += np.float64(x[a + c])
        for c in range(n):
            squares[c] += np.float64(x[a + c]) * np.float64(x[a + c])


@inner
def flush_groups(into: Any, unit: int, groups: int, size: int, c0: int, n: int, sums: Any) -> None:
    """Adds the sums of n channels to those of their groups, in order, and clears them."""
    for c in range(n):
        group = (unit * groups + (c0 + c) // size) * 2
        into[group] += sums[c]
        into[group + 1] += sums[BLOCK + c]
        sums[c] = 0.0
        sums[BLOCK + c] = 0.0
