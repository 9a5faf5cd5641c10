"""Random tensors, and the error between two tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def error(a: Tensor, b: Tensor) -> float:
    """``max|a - b| / max|b|``, in float64."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed float32 numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
