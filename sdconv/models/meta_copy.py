"""A network's double without values: it says how large everything becomes, and costs nothing."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.features.reuse import Remembering


def double(network: nn.Module) -> nn.Module:
    """A copy of a network on torch's meta device, without the hooks that are on it.

    No tensor is copied. What accelerate puts in front of modules to move their weights is left out,
    and so is what ``reuse`` puts there.
    """
    known: dict[int, Any] = {}
    for module in network.modules():
        for name, value in vars(module).items():
            # hooks may hold anything, even other copies of the weights
            if name == "_hf_hook" or isinstance(value, Remembering):
                known[id(value)] = None
            elif "hooks" in name and isinstance(value, dict):
                known[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):
                known[id(value)] = value.to("meta")
    for parameter in network.parameters():
        known[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        known[id(buffer)] = buffer.to("meta")
    copy = deepcopy(network, known)
    for module in copy.modules():
        if "_old_forward" in vars(module):
            vars(module).pop("forward", None)
            del module._old_forward
        elif vars(module).get("forward", copy) is None:
            del module.forward
    return copy


def without_values(given: Any) -> Any:
    """Arguments with their tensors on the meta device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), given)
