"""The dtypes that networks are compared in, float32 twice: CUDA multiplies it by TF32 or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    name: str
    dtype: torch.dtype
    tf32: bool = False


BFLOAT16 = Precision("bfloat16", torch.bfloat16)
FLOAT16 = Precision("float16", torch.float16)
FLOAT32 = Precision("float32", torch.float32)
TF32 = Precision("float32 by TF32", torch.float32, True)


def precisions(device: str) -> tuple[Precision, ...]:
    """Those that a device has, the most used first."""
    return (BFLOAT16, FLOAT32, FLOAT16) + ((TF32,) if device == "cuda" else ())


@contextmanager
def float32_by_tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may multiply float32 by TF32 within the block, which rounds to 10 bits."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
