"""The memory layout of convolution weights on CUDA.

cuDNN wants channels-last weights for channels-last feature maps, and torch converts others in each
call. A network whose own backend is the fast one has them converted once: the parameters stay the
same objects with the same values, and no copy is kept that could be stale.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor, nn

_DEVICES = ("cuda",)

# Those that were converted here, to be converted back.
_converted: WeakSet[nn.Module] = WeakSet()


def arrange_weights(network: nn.Module, fast: bool) -> None:
    """Converts the weights of all convolutions on CUDA to channels-last order, in place; with
    ``fast`` False, those that this has converted back to the contiguous order.

    A weight that shares its memory with another tensor, or is not a plain parameter, stays as it
    is.
    """
    for conv in network.modules():
        weight = conv._parameters.get("weight") if isinstance(conv, nn.Conv2d) else None
        if weight is None:
            continue
        if fast and _can_convert(weight):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            _converted.add(conv)
        elif not fast and conv in _converted:
            _converted.discard(conv)
            weight.data = weight.data.contiguous()


def _can_convert(weight: Tensor) -> bool:
    return (
        weight.device.type in _DEVICES
        and type(weight) is nn.Parameter
        and not weight.is_inference()
        and not weight.is_contiguous(memory_format=torch.channels_last)
        and weight.untyped_storage().nbytes() == weight.nbytes
    )
