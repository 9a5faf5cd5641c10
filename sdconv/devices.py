"""Devices that tensors can be placed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdconv.errors import InputError

_INITIALISATIONS = {
    *(nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.constant_),
    *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
}


def usable_device(device: str | torch.device) -> torch.device:
    """The torch device of that name, if a tensor can be placed on it.

    Raises:
        InputError: there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            "no such device here",
            where="device",
            expected="cpu, or cuda where torch finds a GPU",
            got=f"{device!r}: {str(error).splitlines()[0]}",
            hint="leave the device out",
        ) from error
    return found


class _NotInitialised(TorchFunctionMode):
    """Leaves out the initialisation of weights on the meta device, which takes longer than all
    else there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISATIONS:
            weight = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if weight.is_meta:
                return weight
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Within it, new modules are on torch's meta device."""
    with torch.device("meta"), _NotInitialised():
        yield
