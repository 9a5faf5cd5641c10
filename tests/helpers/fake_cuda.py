"""Stand-ins for CUDA's tensors, which carry shape, dtype and device but no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from helpers import seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdconv.config import Config


def placed(value: Any, dtype: torch.dtype, place: Callable[[Tensor, torch.dtype], Tensor]) -> Any:
    """An input put somewhere else, in this dtype if it is of floating-point numbers."""
    if isinstance(value, dict):
        return {name: placed(one, dtype, place) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    return place(value, dtype if value.is_floating_point() else value.dtype)


def fake_cuda(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, device="cuda", dtype=dtype)


LOW = [torch.float16, torch.bfloat16]


KINDS: Mapping[str, Config] = {
    kind: config
    for kind, config in {**seeded.WITH_PEER, **seeded.WITHOUT_PEER}.items()
    if kind in ("sd1", "sd3", "flux2", "taesd", "taef2", "taesana")
}


class OnCuda(TorchDispatchMode):
    """Refuses every operation on a CPU tensor with dimensions, but for a copy to another device.

    Stand-ins refuse most by themselves; a convolution takes a weight on any device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        computes = func.namespace != "prim" and func is not torch.ops.aten._to_copy.default
        if computes and any(tensor.device.type != "cuda" for tensor in given):
            raise RuntimeError(f"{func} on device {[tensor.device for tensor in given]}")
        return func(*args, **(kwargs or {}))


def to_stand_ins(network: nn.Module, dtype: torch.dtype) -> None:
    """Puts a CUDA tensor without values in every parameter's and buffer's place; within a
    ``FakeTensorMode``."""

    def stand_in(tensor: Tensor) -> Tensor:
        own = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, device="cuda", dtype=own)

    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = nn.Parameter(stand_in(parameter), requires_grad=False)
                module._parameters[name] = value
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = stand_in(buffer)
