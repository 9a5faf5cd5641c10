"""What a processor computes natively in 16 bits, which decides whether direct summation is faster
there than Winograd's method in float32.

Rates of torch's kernel were measured on a Xeon of the fifth generation (AMX in bfloat16) and on
EPYCs of the third and the fourth (without native instructions, and ``avx512_bf16``); that of AMX in
float16 is an estimate.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

# By dtype, features and how many times as many products as in float32 they compute, fastest first.
_RATES: dict[torch.dtype, tuple[tuple[str, float], ...]] = {
    torch.bfloat16: (("amx_bf16", 3.0), ("avx512_bf16", 2.0)),
    torch.float16: (("amx_fp16", 3.0),),
}
# Without native instructions: torch's kernels take at least 5 times as long as in float32.
_NOT_NATIVE = 0.2
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
    otherwise = _NOT_NATIVE if dtype in _RATES else 1.0
    return next((rate for name, rate in _RATES.get(dtype, ()) if name in found), otherwise)


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
