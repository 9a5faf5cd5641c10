"""Which engine does the work round the matrix products: the compiled one where it can."""

from __future__ import annotations

import time
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from sdconv.errors import SdconvWarning
from sdconv.fast.cpu import torch_kernels as plain_engine
from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.torch_kernels import Affine
from sdconv.fast.cpu.winograd import Scheme


class Engine(Protocol):
    """The functions of :mod:`sdconv.fast.cpu.torch_kernels`."""

    def load(
        self,
        scheme: Scheme,
        rows: Tensor,
        row: int,
        above: Tensor | None,
        strip: Strip,
        affine: Affine | None,
        silu: bool,
        tiles: Tensor,
    ) -> None: ...
    def store(
        self,
        scheme: Scheme,
        products: Tensor,
        strip: Strip,
        bias: Tensor,
        residual: Tensor | None,
        out: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor]: ...
    def sums(self, rows: Tensor, groups: int) -> tuple[Tensor, Tensor]: ...
    def width(self, channels: int) -> int: ...
    def pack(self, right: Tensor) -> Tensor: ...
    def product(self, left: Tensor, packed: Tensor, out: Tensor) -> None: ...
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None: ...
    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None: ...
    def fingerprint(self, weight: Tensor) -> bytes: ...


def of(dtype: torch.dtype) -> Engine:
    """The engine for rows of that dtype."""
    return compiled()[0] if dtype is torch.float32 else plain()


def plain() -> Engine:
    """Torch's operations, in any dtype."""
    return cast(Engine, plain_engine)


@cache
def compiled() -> tuple[Engine, float]:
    """The compiled engine, and the seconds it took to compile or to read from Numba's cache; the
    plain one where Numba is not installed.

    Warns:
        SdconvWarning: Numba is installed and does not work here; the plain engine computes.
    """
    begin = time.perf_counter()
    if find_spec("numba") is None:
        return plain(), 0.0
    try:
        from sdconv.fast.cpu.numba import engine as compiled_engine
    except (ImportError, OSError, RuntimeError) as error:  # another NumPy; no folder for its cache
        words = f"the fast backend computes without Numba, slower: {error}"
        fix = "install the versions that sdconv[fast] asks for; NUMBA_CACHE_DIR names a cache"
        warnings.warn(SdconvWarning(f"{words}. To mend: {fix}"), stacklevel=2)
        return plain(), 0.0

    engine: ModuleType = compiled_engine
    return cast(Engine, engine), time.perf_counter() - begin
