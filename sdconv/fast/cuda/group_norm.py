"""GroupNorm and SiLU in one operation on channels-last feature maps, for CUDA.

Importing this module registers the operator ``sdconv::group_norm_silu``, which has a gradient and
which torch.compile and torch.export see as one node.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast import gradients


def norm_silu(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Applies GroupNorm and SiLU; on CUDA by Triton kernels, if Triton is installed.

    Args:
        x: ``(B, C, H, W)``.
        added: ``(B, C)``, added to every pixel before the normalisation; or None.
        weight, bias: ``(C,)``.
        groups: number of groups.
        eps: added to each group's variance.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x`` and channels-last order.
    """
    if x.device.type != "cuda" or not _has_triton():
        return by_torch(x, added, weight, bias, groups, eps)
    from sdconv.fast.cuda import group_norm_triton

    return group_norm_triton.norm_silu(x, added, weight, bias, groups, eps)


def by_torch(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """``norm_silu`` by torch's own operations."""
    if added is not None:
        x = x + added[:, :, None, None]
    out = functional.silu(functional.group_norm(x, groups, weight, bias, eps))
    # On CUDA, torch's GroupNorm returns the contiguous layout.
    return out.contiguous(memory_format=torch.channels_last)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@torch.library.custom_op("sdconv::group_norm_silu", mutates_args=())
def operator(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """``norm_silu`` as a torch operator."""
    return norm_silu(x, added, weight, bias, groups, eps)


@operator.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


operator.register_autograd(gradients.gradient_of(by_torch), setup_context=gradients.save_inputs)
