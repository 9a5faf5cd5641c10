"""Input checks of all networks, before any arithmetic: a floating-point tensor with the dtype and
device of the weights, large enough for the normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdconv.errors import InputError

# The attributes of accelerate's and diffusers' hooks, which may move or cast the input.
_HOOKS = ("_hf_hook", "_diffusers_hook")


def check_tensor(x: object, what: str, where: str, expected: str) -> Tensor:
    """Returns ``x`` if it is a tensor.

    Args:
        x: the input.
        what: its name, for the error.
        where: the network's name.
        expected: the shape, in words.

    Raises:
        InputError: it is not.
    """
    if isinstance(x, Tensor):
        return x
    kind = type(x)
    array = kind.__module__ == "numpy" and kind.__name__ == "ndarray"
    raise InputError(
        f"{what} must be a tensor",
        where=where,
        expected=f"a torch.Tensor of shape {expected}",
        got="None" if x is None else f"{kind.__module__}.{kind.__qualname__}",
        hint="torch.from_numpy(array)" if array else None,
    )


def check_like(x: Tensor, part: nn.Module, what: str, where: str) -> None:
    """Refuses a tensor that the first layer of ``part`` cannot compute with.

    Under autocast, other floating-point dtypes pass. While a graph is traced, and where hooks may
    move or cast the input, the check is left to torch.

    Raises:
        InputError: it is not floating-point, or its device or dtype is not that of the weights.
    """
    if torch.compiler.is_compiling():
        return
    weight = next((p for p in part.parameters() if p.is_floating_point()), None)
    if weight is None or (x.dtype == weight.dtype and x.device == weight.device):
        return
    if not x.is_floating_point():
        raise InputError(
            f"{what} must be floating-point",
            where=where,
            expected=str(weight.dtype),
            got=str(x.dtype),
            hint="scale them as the network expects, and convert them with .to(network.dtype)",
        )
    check_device(x, weight.device, part, what, where)
    if x.dtype != weight.dtype and not (_may_change(part) or _casts(x, weight)):
        raise InputError(
            f"{what} must have the dtype of the weights",
            where=where,
            expected=str(weight.dtype),
            got=str(x.dtype),
            hint="convert them with .to(network.dtype), or use torch.autocast",
        )


def check_device(x: Tensor, device: torch.device, part: nn.Module, what: str, where: str) -> None:
    """Refuses a tensor that is not on ``device``, unless hooks in ``part`` may move it there.

    Raises:
        InputError: it is on another device.
    """
    if torch.compiler.is_compiling():
        return
    if x.device != device and not _may_change(part):
        raise InputError(
            f"{what} must be on the device of the weights",
            where=where,
            expected=str(device),
            got=str(x.device),
            hint="move them with .to(network.device)",
        )


def check_room(batch: int, area: int, channels: int, groups: int, where: str) -> None:
    """Refuses an input so small that a group of GroupNorm has a single value, which torch refuses.

    Args:
        batch: number of samples.
        area: height times width of the smallest feature map.
        channels: the lowest number of channels that are normalised there.
        groups: number of groups.
        where: the network's name.

    Raises:
        InputError: a group has a single value.
    """
    if channels == groups and batch * area == 1:
        raise InputError(
            "too small for this network: each group of GroupNorm would have a single value",
            where=where,
            expected="more than one value in each group",
            got=f"a 1x1 feature map with {channels} channels in {groups} groups",
            hint="use a larger image or larger latents, or a larger batch",
        )


def _may_change(part: nn.Module) -> bool:
    """Whether hooks may change the input of a layer in ``part``."""
    return any(
        module._forward_pre_hooks or any(hasattr(module, name) for name in _HOOKS)
        for module in part.modules()
    )


def _casts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast converts ``x``; it never converts float64."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return on and torch.float64 not in (x.dtype, weight.dtype)
