"""How far apart two tensors are."""

from __future__ import annotations

from torch import Tensor


def error(a: Tensor, b: Tensor) -> float:
    """``max|a - b| / max|b|``, in float64."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())
