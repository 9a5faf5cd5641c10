"""Copies a network to the meta device, where a forward pass computes shapes and dtypes only."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class NotCopied:
    """Base class of replacements for a module's ``forward`` that ``meta_copy`` leaves out."""


def meta_copy(network: nn.Module) -> nn.Module:
    """A copy of a network on torch's meta device, without its hooks.

    No tensor is copied. Hooks and ``forward`` replacements of accelerate, which move weights
    between devices, are left out, and so are replacements that are ``NotCopied``.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for name, value in vars(module).items():
            # hooks may hold anything, even other copies of the weights
            if name == "_hf_hook" or isinstance(value, NotCopied):
                memo[id(value)] = None
            elif "hooks" in name and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):
                memo[id(value)] = value.to("meta")
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.to("meta")
    copy = deepcopy(network, memo)
    for module in copy.modules():
        if "_old_forward" in vars(module):
            vars(module).pop("forward", None)
            del module._old_forward
        elif vars(module).get("forward", copy) is None:
            del module.forward
    return copy


def to_meta(arguments: Any) -> Any:
    """Arguments with their tensors moved to the meta device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), arguments)
