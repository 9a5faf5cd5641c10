"""DeepCache (Ma et al. 2024, https://arxiv.org/abs/2312.00858): the deep levels of a U-Net, which
change little from step to step, are computed only in some steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from sdconv.errors import InputError
from sdconv.features.calls import Call
from sdconv.features.hook_points import hook_points
from sdconv.features.reuse import reuse
from sdconv.features.targets import unet_of


def deepcache(target: Any, interval: int, *, branch: int = 0) -> AbstractContextManager[None]:
    """Compute the whole U-Net in every ``interval``-th call, and only its shallow part in between,
    with the deep part's output of the last full call.

    The shallow part is everything outside one skip connection: the layers up to its beginning and
    from its end. A call whose timestep is not below that of the previous call starts a new run and
    is a full one; so a scheduler that calls twice at one timestep gains less, and one with
    increasing timesteps gains nothing. Both guidance halves must be in one batch, as in diffusers'
    pipelines.

    Args:
        target: a U-Net, or a pipeline that has one.
        interval: 1 computes everything.
        branch: number of the skip connection, from the outermost, 0, whose shallow part is only the
            first convolution and the last layer.

    Raises:
        InputError: the target has no U-Net with skips, ``interval`` is below 1, or ``branch`` does
            not exist.
    """
    prefix, network = unet_of(target)
    if not isinstance(interval, int) or interval < 1:
        raise InputError(
            "not an interval", where="interval", expected="an integer, 1 or more", got=interval
        )
    return reuse(
        target,
        [prefix + name for name in _deep_part(network, branch)],
        steps=_between_full_calls(interval),
    )


def _between_full_calls(interval: int) -> Callable[[Call], bool]:
    full: Call | None = None
    previous: Call | None = None

    def between(call: Call) -> bool:
        nonlocal full, previous
        same_run = previous is not None and _timestep(call) < _timestep(previous)
        if full is None or not same_run or call.index - full.index >= interval:
            full = call
        previous = call
        return call is not full

    return between


def _timestep(call: Call) -> float:
    """A call's timestep, the largest one if the batch has several."""
    timestep = call.timestep
    return max(timestep) if isinstance(timestep, tuple) else timestep or 0


def _deep_part(network: nn.Module, branch: int) -> list[str]:
    """The names of the modules between the two ends of a skip connection."""
    ends = [point for point in hook_points(network).values() if point.kind == "skip"]
    if not ends:
        raise InputError("this U-Net has no skips", where="target", got=type(network).__name__)
    if not isinstance(branch, int) or not 0 <= branch < len(ends):
        raise InputError(
            "this skip connection does not exist",
            where="branch",
            expected=f"0 to {len(ends) - 1}",
            got=branch,
        )
    # the outermost ends last
    end = ends[-1 - branch]
    first, last = _position(end.skip or ""), _position(end.of)
    inside = []
    for path, level, block in _levels(network):
        parts = [
            f"{path}_blocks.{level}.{name}.{number}"
            for name, group in block.named_children()
            if isinstance(group, nn.ModuleList)
            for number in range(len(group))
        ]
        deep = [
            name
            for name in parts
            if (_position(name) > first if path == "down" else _position(name) < last)
        ]
        inside += [f"{path}_blocks.{level}"] if deep == parts else deep
    if getattr(network, "mid_block", None) is not None:
        inside.append("mid_block")
    if not inside:
        raise InputError("there is nothing inside this skip connection", where="branch", got=branch)
    return inside


def _levels(network: nn.Module) -> list[tuple[str, int, nn.Module]]:
    return [
        (path, level, block)
        for path in ("down", "up")
        for level, block in enumerate(getattr(network, f"{path}_blocks"))
    ]


def _position(name: str) -> tuple[int, bool, int]:
    """The position of a module on the down or up path: level, whether it is a sampler, layer."""
    if "." not in name:
        return -1, False, 0  # the first convolution
    _, level, part, layer = name.split(".")
    return int(level), part.endswith("samplers"), int(layer)
