"""What the fast backend's compiled loops are written with: jobs, pointers, sums.

A kernel is called once by every thread of a team with the address of a job, a row of whole numbers
and addresses. Each call takes units of work by adding to the job's first number until none are left
(see `launch.py`). The inner loops run over channels, one stored stream each, which
is what LLVM vectorises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numba import cfunc, from_dtype, njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

# channels that one unit works through at a time
BLOCK = 64


def job(*names: str) -> np.dtype[Any]:
    """A job's numbers: those that every kernel has, then its own; 0 where an array is not there.

    The last one is never used. Its name stands for what all kernels are written with: Numba keeps
    what it compiled under the names of a job's numbers, but looks for changes in one file only.
    """
    every = ("next_unit", "next_thread", "units", "scratch", "scratch_size")
    return np.dtype([(name, np.int64) for name in (*every, *names, _written_with())])


@cache
def _written_with() -> str:
    here = Path(__file__)
    # the transforms' numbers are compiled into the kernels
    files = (here.parents[1] / "winograd.py", *sorted(here.parent.glob("*.py")))
    contents = b"".join(file.read_bytes() for file in files)
    return f"source_{hashlib.blake2b(contents, digest_size=8).hexdigest()}"


# fused multiply-add and reciprocals are allowed; NaN and infinity keep their meaning
_MATH = {"contract", "arcp", "nsz"}
_CPointer: Any = types.CPointer
carray: Any = vars(numba)["carray"]
f32 = np.float32


def inner(function: Function) -> Function:
    """A function that kernels call, compiled into them."""
    compile_it: Any = njit(fastmath=_MATH, error_model="numpy")
    return compile_it(function)  # type: ignore[no-any-return]


def kernel(job: np.dtype[Any]) -> Callable[[Callable[[Any], None]], Any]:
    """Compiles a function that takes the address of such a job."""
    signature = types.void(_CPointer(from_dtype(job)))
    compile_it: Any = cfunc(signature, cache=True, fastmath=_MATH, error_model="numpy")
    return compile_it  # type: ignore[no-any-return]


def spelled(function: Callable[..., Any]) -> Any:
    """A function that spells out its own LLVM code."""
    return intrinsic(function)


def _pointer_to(kind: Any) -> Any:
    def pointer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return _CPointer(kind)(types.int64), codegen

    return spelled(pointer)


floats = _pointer_to(types.float32)
doubles = _pointer_to(types.float64)
words = _pointer_to(types.uint32)
whole_numbers = _pointer_to(types.uint64)


@spelled
def take(typing_context: Any, job: Any, field: Any) -> Any:
    """Adds 1 to a job's number and gives what it was, whoever else does so at the same time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.get_value_type(_CPointer(types.int64))
        place = builder.gep(builder.bitcast(args[0], number), [args[1]])
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", place, one, "monotonic")

    return types.int64(job, types.int64), codegen


@spelled
def as_float(typing_context: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@inner
def exp(z: Any) -> Any:
    """Within 2 units in the last place, by Cody and Waite's reduction and the polynomial of Cephes'
    ``expf``; NaN is taken for -87."""
    z = z if z > f32(-87.0) else f32(-87.0)
    z = z if z < f32(87.0) else f32(87.0)
    k = np.floor(z * f32(1.4426950408889634) + f32(0.5))
    r = z - k * f32(0.693359375)
    r = r - k * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    e = p * r * r + r + f32(1.0)
    return e * as_float((np.int32(k) + np.int32(127)) << np.int32(23))


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
    """Zeros in float64."""
    for i in range(n):
        x[at + i] = 0.0


@inner
def count(sums: Any, squares: Any, x: Any, at: int, step: int, pixels: int, n: int) -> None:
    """Adds the values and their squares of n channels of so many pixels beside one another, in
    float64; of two pixels at once, since the sums come and go through memory."""
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
def gather(into: Any, unit: int, groups: int, size: int, c0: int, n: int, sums: Any) -> None:
    """Adds n channels' sums to those of their groups, in order, and clears them."""
    for c in range(n):
        place = (unit * groups + (c0 + c) // size) * 2
        into[place] += sums[c]
        into[place + 1] += sums[BLOCK + c]
        sums[c] = 0.0
        sums[BLOCK + c] = 0.0
