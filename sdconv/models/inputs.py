"""What every network asks of a tensor before any arithmetic: that it is one, of floating point, in
the weights' dtype, on their device, and large enough for the normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdconv.errors import InputError

# accelerate's and diffusers' hooks, which move or cast as they see fit
_HOOKS = ("_hf_hook", "_diffusers_hook")


def check_tensor(x: object, what: str, where: str, expected: str) -> Tensor:
    """``x`` if it is a tensor.

    Args:
        what: its name. where: the network. expected: its shape, in words.

    Raises:
        InputError: it is something else.
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

    Under autocast another floating-point dtype passes. Where hooks may move or cast what comes in,
    and while a graph is traced, torch itself is left to judge.

    Raises:
        InputError: another device or dtype than the weights', or no floating point.
    """
    if torch.compiler.is_compiling():
        return
    weight = next((p for p in part.parameters() if p.is_floating_point()), None)
    if weight is None or (x.dtype == weight.dtype and x.device == weight.device):
        return
    if not x.is_floating_point():
        raise InputError(
            f"{what} must be of floating point",
            where=where,
            expected=str(weight.dtype),
            got=str(x.dtype),
            hint="scale them as the network expects, and turn them into its dtype",
        )
    check_device(x, weight.device, part, what, where)
    if x.dtype != weight.dtype and not (_may_change(part) or _casts(x, weight)):
        raise InputError(
            f"{what} of another dtype than the weights",
            where=where,
            expected=str(weight.dtype),
            got=str(x.dtype),
            hint="turn them into it: .to(network.dtype), or work under torch.autocast",
        )


def check_device(x: Tensor, device: torch.device, part: nn.Module, what: str, where: str) -> None:
    """Refuses a tensor that is not on ``device``, unless hooks in ``part`` may move it there.

    Raises:
        InputError: it is elsewhere.
    """
    if torch.compiler.is_compiling():
        return
    if x.device != device and not _may_change(part):
        raise InputError(
            f"{what} on another device than the weights",
            where=where,
            expected=str(device),
            got=str(x.device),
            hint="bring them together: .to(network.device)",
        )


def check_room(batch: int, area: int, channels: int, groups: int, where: str) -> None:
    """Refuses a map that gives a normalisation group a single value, which torch does not take.

    Args:
        batch: samples at once. area: rows times columns of the smallest map. channels: the fewest
            that are normalised there. groups: into which they are split.

    Raises:
        InputError: it does.
    """
    if channels == groups and batch * area == 1:
        raise InputError(
            "too small for this network: its normalisation would see one value in each group",
            where=where,
            expected="more than one value in each group",
            got=f"a map of 1 x 1 with {channels} channels in {groups} groups",
            hint="take a larger picture or larger latents, or several at once",
        )


def _may_change(part: nn.Module) -> bool:
    """Whether hooks in it may change what its layers get."""
    return any(
        module._forward_pre_hooks or any(hasattr(module, name) for name in _HOOKS)
        for module in part.modules()
    )


def _casts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast is on where ``x`` is; it leaves float64 alone."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return on and torch.float64 not in (x.dtype, weight.dtype)
