"""Casts of weights that never turn a number into infinity unnoticed."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sdconv.errors import CheckpointError, InputError, SdconvWarning

# one-byte floats are for storage: nothing computes in them
STORAGE_ONLY = frozenset(
    getattr(torch, name)
    for name in dir(torch)
    if name.startswith("float8") or name == "float4_e2m1fn_x2"
)


# dtypes with a larger range, by dtype
_WIDER = {
    torch.float16: "bfloat16 or float32",
    torch.bfloat16: "float32 or float64",
    **dict.fromkeys(STORAGE_ONLY, "float16 or bfloat16"),
}


class Caster:
    """Casts floating-point tensors, and refuses or clamps values beyond the new dtype's range.

    Args:
        where: the weights' name, for messages.
        clamp: whether such values become the largest finite one; infinity stays infinity. None: no,
            and the caller cannot ask for it.
        count: whether to note the tensors whose values change, which takes a second pass.

    ``rounded``: the names of those tensors.
    """

    def __init__(self, where: object, *, clamp: bool | None = None, count: bool = False) -> None:
        self._where, self._clamp, self._count = where, clamp, count
        self.rounded: set[str] = set()
        self._clamped: dict[str, float] = {}
        self._limit = 0.0

    def cast(
        self, tensor: Tensor, dtype: torch.dtype, name: str, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The tensor in ``dtype`` on ``device``.

        Args:
            name: the tensor's, for messages.

        Raises:
            CheckpointError: a finite value would become infinite, and ``clamp`` is not set.
        """
        result = tensor.to(device, dtype)
        if self._count and dtype != tensor.dtype and name not in self.rounded:
            back = result.to(tensor.device, tensor.dtype)
            if not bool(((back == tensor) | (back.isnan() & tensor.isnan())).all()):
                self.rounded.add(name)
        if not (tensor.is_floating_point() and _is_narrower(dtype, tensor.dtype)):
            return result
        overflowed = beyond_range(tensor.to(device), result)
        if not overflowed.any():
            return result
        source = tensor.to(device)
        limit = torch.finfo(dtype).max
        worst = source[overflowed]
        value = float(worst[worst.abs().argmax()])
        if not self._clamp:
            short = str(dtype).removeprefix("torch.")
            becomes = "out of range" if dtype in STORAGE_ONLY else "infinite"
            option = (
                "" if self._clamp is None else ", or pass clamp=True for the largest finite value"
            )
            raise CheckpointError(
                f"{name} holds {value:g}, which is {becomes} in {short}",
                where=self._where,
                expected=f"values from {-limit:g} to {limit:g}",
                got=f"{int(overflowed.sum())} beyond that",
                hint=f"use {_WIDER.get(dtype, 'float64')}{'' if self._clamp is None else option}",
            )
        if name not in self._clamped or abs(value) > abs(self._clamped[name]):
            self._clamped[name] = value
        self._limit = limit
        return torch.where(overflowed, torch.full_like(result, limit).copysign(result), result)

    def warn(self, stacklevel: int = 3) -> None:
        """Says which tensors were clamped, if any were.

        Warns:
            SdconvWarning: some were.
        """
        if self._clamped:
            name, value = next(iter(self._clamped.items()))
            warnings.warn(
                f"{self._where}: {len(self._clamped)} tensors hold values beyond {self._limit:g} "
                f"and were clamped, first {name} (which holds {value:g})",
                SdconvWarning,
                stacklevel=stacklevel,
            )


def beyond_range(before: Tensor, after: Tensor) -> Tensor:
    """Where a finite value is beyond the range of the narrower dtype."""
    if after.dtype not in STORAGE_ONLY:
        return after.isinf() & ~before.isinf()
    # torch makes of them the largest value, infinity or NaN, according to the dtype
    facts = torch.finfo(after.dtype)
    half_a_step = facts.eps * 2.0 ** math.floor(math.log2(facts.max)) / 2
    wide = before.float() if before.dtype in STORAGE_ONLY else before
    return wide.isfinite() & (wide.abs() > facts.max + half_a_step)


def _is_narrower(dtype: torch.dtype, source: torch.dtype) -> bool:
    return torch.finfo(dtype).max < torch.finfo(source).max


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuses a dtype that networks do not compute in.

    Raises:
        InputError: it is one.
    """
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in STORAGE_ONLY
    ):
        raise InputError(
            "networks do not compute in this dtype",
            where="dtype",
            expected="torch.float32, float16, bfloat16 or float64",
            got=dtype,
        )
