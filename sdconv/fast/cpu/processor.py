"""What a processor computes natively in 16 bits, which decides whether direct summation is faster
there than Winograd's method in float32, and whether torch's own functions are slow there.

Rates of torch's kernel were measured on a Xeon of the fifth generation (AMX in bfloat16) and on
EPYCs of the third and the fourth (without native instructions, and ``avx512_bf16``); that of AMX in
float16 is an estimate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# By dtype, features and how many times as many products as in float32 they compute, fastest first.
_RATES: dict[torch.dtype, tuple[tuple[str, float], ...]] = {
    torch.bfloat16: (("amx_bf16", 3.0), ("avx512_bf16", 2.0)),
    torch.float16: (("amx_fp16", 3.0),),
}
# Without native instructions; and in float32, where with few channels copies take as long as
# products.
_NOT_NATIVE, _IN_FLOAT32 = 0.2, 0.5
# torch's names for what it asks the processor.
_QUESTIONS = {
    "amx_bf16": "_is_amx_tile_supported",
    "amx_fp16": "_is_amx_fp16_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
}


@cache
def features() -> frozenset[str]:
    """Which of ``amx_bf16``, ``amx_fp16`` and ``avx512_bf16`` the processor has; those that this
    version of torch cannot tell are left out."""
    return frozenset(
        name
        for name, question in _QUESTIONS.items()
        if getattr(torch.cpu, question, lambda: False)()
    )


@cache
def direct_rate(dtype: torch.dtype, found: frozenset[str] | None = None) -> float:
    """How many times as fast as in float32 torch's direct convolution is in a dtype.

    Args:
        found: the processor's features; None for this processor's.
    """
    found = features() if found is None else found
    otherwise = 1.0
    if dtype in _RATES:
        otherwise = _IN_FLOAT32 if is_slow(dtype) else _NOT_NATIVE
    return next((rate for name, rate in _RATES.get(dtype, ()) if name in found), otherwise)


def has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether the processor has AMX for a dtype."""
    return _MATRIX_UNITS.get(dtype) in features()


_MATRIX_UNITS = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
# torch's functions that say whether oneDNN has kernels for a dtype on this processor
_KERNELS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
_MULTIPLY = frozenset(
    (
        *(functional.linear, functional.conv2d, functional.scaled_dot_product_attention),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
    )
)


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch multiplies in a 16-bit dtype without oneDNN's kernels on this processor, which
    takes many times as long as in float32."""
    return dtype in _KERNELS and not _has_kernels(dtype)


def _has_kernels(dtype: torch.dtype) -> bool:
    supported = getattr(torch.ops.mkldnn, _KERNELS[dtype], None)
    return supported is None or bool(supported())


@cache
def in_float32(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Makes torch's linear layers, convolutions, attention and matrix products on the CPU compute
    in float32, and round their results to ``dtype``, in which their operands are; nothing where
    `is_slow` says that this saves no time. Not for code that torch.compile traces."""
    return _InFloat32(dtype) if is_slow(dtype) else nullcontext()


class _InFloat32(TorchFunctionMode):
    """Widens the operands in a dtype of the functions ``_MULTIPLY``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _MULTIPLY or not self._widens(*args, *kwargs.values()):
            return function(*args, **kwargs)
        if "out" in kwargs or torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        named = {name: _widened(value) for name, value in kwargs.items()}
        return function(*map(_widened, args), **named).to(self._dtype)

    def _widens(self, *values: Any) -> bool:
        """Whether all operands are on the CPU in this dtype; a mask may be of booleans."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        dtypes = {one.dtype for one in tensors} - {torch.bool}
        plain = all(type(one) in (Tensor, nn.Parameter) and one.is_cpu for one in tensors)
        return dtypes == {self._dtype} and plain


def _widened(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.dtype is not torch.bool
    return value.float() if wide else value


class ProcessorError(RuntimeError):
    """The kernels need instructions that the processor does not have."""


def compiles_for_this_processor() -> bool:
    """Whether Numba compiles for this processor, not for one that the environment names."""
    return not any(os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"))


@cache
def has_amx_kernels() -> bool:
    """Whether the kernels of :mod:`sdconv.fast.cpu.amx` run here: the processor has AMX for
    bfloat16, the system lets this process use it, and Numba is there to compile them."""
    if "amx_bf16" not in features() or find_spec("numba") is None:
        return False
    if not compiles_for_this_processor():
        return False
    try:
        from llvmlite import binding  # type: ignore[import-untyped]
    except (ImportError, OSError):
        return False
    known = binding.get_host_cpu_features()
    has = all(known.get(name) for name in ("amx-bf16", "avx512f", "avx512bf16"))
    return bool(has and getattr(torch.cpu, "_init_amx", lambda: False)())
