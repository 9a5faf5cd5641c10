"""DeepCache (Ma et al. 2024, https://arxiv.org/abs/2312.00858): the deep levels of a U-Net, which
change little from step to step, are computed in some steps only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from sdconv.errors import InputError
from sdconv.features.calls import Call
from sdconv.features.places import places
from sdconv.features.recipes.unets import unet_of
from sdconv.features.reuse import reuse


def deepcache(target: Any, interval: int, *, branch: int = 0) -> AbstractContextManager[None]:
    """Computes all of a U-Net in every ``interval``-th call, and only its shallow part in those
    between, which take the deep part's map from the last full call.

    The shallow part is what lies outside of one skip connection: up to the place where it begins,
    and from the place where it ends. A call begins a new run, and is a full one, unless its
    timestep is below that of the call before; so a scheduler that calls twice at one timestep gains
    less, and one that goes up gains nothing. Guidance has to be in one batch, as in diffusers'
    pipelines, not in calls of its own.

    Args:
        target: a U-Net, or a pipeline that has one.
        interval: 1 is the plain run.
        branch: which skip connection, from the outermost, 0, whose shallow part is no more than the
            first convolution and the last layer.

    Raises:
        InputError: the target has no U-Net with skips; an ``interval`` below 1; no such ``branch``.
    """
    prefix, network = unet_of(target)
    if not isinstance(interval, int) or interval < 1:
        raise InputError("no interval", where="interval", expected="1 or more", got=interval)
    return reuse(
        target,
        [prefix + name for name in _inside(network, branch)],
        steps=_between_full_calls(interval),
    )


def _between_full_calls(interval: int) -> Callable[[Call], bool]:
    full: Call | None = None
    before: Call | None = None

    def between(call: Call) -> bool:
        nonlocal full, before
        goes_on = before is not None and _noise(call) < _noise(before)
        if full is None or not goes_on or call.index - full.index >= interval:
            full = call
        before = call
        return call is not full

    return between


def _noise(call: Call) -> float:
    """A call's timestep, the largest one of a batch that has several."""
    timestep = call.timestep
    return max(timestep) if isinstance(timestep, tuple) else timestep or 0


def _inside(network: nn.Module, branch: int) -> list[str]:
    """The names of the parts of a U-Net that lie between the two ends of a skip connection."""
    ends = [place for place in places(network).values() if place.kind == "skip"]
    if not ends:
        raise InputError("this U-Net has no skips", where="target", got=type(network).__name__)
    if not isinstance(branch, int) or not 0 <= branch < len(ends):
        raise InputError(
            "there is no such skip connection",
            where="branch",
            expected=f"0 to {len(ends) - 1}",
            got=branch,
        )
    # the last to end is the outermost
    end = ends[-1 - branch]
    first, last = _position(end.skip or ""), _position(end.of)
    inside = []
    for way, level, block in _levels(network):
        parts = [
            f"{way}_blocks.{level}.{name}.{number}"
            for name, group in block.named_children()
            if isinstance(group, nn.ModuleList)
            for number in range(len(group))
        ]
        deep = [
            name
            for name in parts
            if (_position(name) > first if way == "down" else _position(name) < last)
        ]
        inside += [f"{way}_blocks.{level}"] if deep == parts else deep
    if getattr(network, "mid_block", None) is not None:
        inside.append("mid_block")
    if not inside:
        raise InputError("nothing lies inside this skip connection", where="branch", got=branch)
    return inside


def _levels(network: nn.Module) -> list[tuple[str, int, nn.Module]]:
    return [
        (way, level, block)
        for way in ("down", "up")
        for level, block in enumerate(getattr(network, f"{way}_blocks"))
    ]


def _position(name: str) -> tuple[int, bool, int]:
    """Where a part stands on its way: level, whether behind the layers, layer."""
    if "." not in name:
        return -1, False, 0  # the first convolution
    _, level, part, layer = name.split(".")
    return int(level), part.endswith("samplers"), int(layer)
