"""Whether an operator of torch's is needed, or its function can be called as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_eager(*given: Tensor | nn.Conv2d | None) -> bool:
    """Whether plain tensors are computed with here and now: nothing is being traced, nothing looks
    on, and no gradient will be asked for. Otherwise torch has to see operators of its own."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    tensors: list[Tensor] = []
    for one in given:
        if isinstance(one, nn.Conv2d):
            tensors += one.parameters(recurse=False)
        elif one is not None:
            tensors.append(one)
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
