"""Fake CUDA tensors, with shape, dtype and device but no values: dry runs where there is no GPU.

They exist within torch's ``FakeTensorMode``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from helpers import seeded
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdconv.config import Config

aten = torch.ops.aten

HALF_DTYPES = (torch.float16, torch.bfloat16)

# one autoencoder of each architecture
AUTOENCODERS: Mapping[str, Config] = {
    kind: config
    for kind, config in {**seeded.WITH_PEER, **seeded.WITHOUT_PEER}.items()
    if kind in ("sd1", "sd3", "flux2", "taesd", "taef2", "taesana")
}


def map_tensors(
    value: Any, dtype: torch.dtype, function: Callable[[Tensor, torch.dtype], Tensor]
) -> Any:
    """An input with each tensor replaced by ``function(tensor, dtype)``; tensors of integers keep
    their own dtype."""
    if isinstance(value, dict):
        return {name: map_tensors(one, dtype, function) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    return function(value, dtype if value.is_floating_point() else value.dtype)


def fake_cuda(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A fake CUDA tensor of another tensor's shape."""
    return torch.empty(tensor.shape, device="cuda", dtype=dtype)


def to_fake_cuda(network: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every parameter and buffer by a fake CUDA tensor."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = map_tensors(parameter, dtype, fake_cuda)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = map_tensors(buffer, dtype, fake_cuda)


def record_outputs(
    network: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Module,)
) -> dict[str, list[Tensor]]:
    """By module of these classes, every tensor that it returns from now on; of a tuple, the
    first."""
    outputs: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    for name, module in network.named_modules():
        if name and isinstance(module, kinds):
            module.register_forward_hook(record(name))
    return outputs


def assert_on_cuda(outputs: Mapping[str, list[Tensor]], dtype: torch.dtype) -> None:
    """Every output is on CUDA and has the dtype."""
    wrong = [
        f"{name}: {output.device.type}, {output.dtype}"
        for name, tensors in outputs.items()
        for output in tensors
        if (output.device.type, output.dtype) != ("cuda", dtype)
    ]
    assert wrong == []


class RefuseCpu(TorchDispatchMode):
    """Refuses every operation on a CPU tensor with dimensions, except a copy to another device.

    Fake tensors refuse most of them already, but a convolution takes a weight on any device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        computes = func.namespace != "prim" and func is not aten._to_copy.default
        if computes and any(tensor.device.type != "cuda" for tensor in tensors):
            raise RuntimeError(f"{func} on device {[tensor.device for tensor in tensors]}")
        return func(*args, **(kwargs or {}))


class WithoutDriver(TorchFunctionMode):
    """Runs the tensor methods that ask for a CUDA driver, even of fake tensors, as operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _indexed(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            part = _indexed(x, index)
            return aten.copy_(part, value) if isinstance(value, Tensor) else part.fill_(value)
        if func is Tensor.copy_:
            return aten.copy_(*args)
        if func is Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.to and not kwargs:
            x, to = args
            what = "device" if isinstance(to, torch.device) else "dtype"
            return x if getattr(x, what) == to else aten._to_copy(x, **{what: to})
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, int):
            x = x.select(dim, one)
            continue
        if one is None:
            x = x.unsqueeze(dim)
        else:
            first, last, _ = one.indices(x.shape[dim])
            x = x.narrow(dim, first, last - first)
        dim += 1
    return x
