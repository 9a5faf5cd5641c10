"""How long a plan will take: one strip of each kind of step, timed here and now."""

from __future__ import annotations

import copy
import time
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from sdconv.streaming.executor import begin
from sdconv.streaming.maps import Store, lay_out
from sdconv.streaming.moments import Moments
from sdconv.streaming.planner import Plan, lifetimes
from sdconv.streaming.steps import Attend, Step

Module = TypeVar("Module", bound=nn.Module)

# tokens that a timed strip's queries look at; the whole is reckoned from these
TOKENS = 8192


@torch.no_grad()
def seconds(plan: Plan, *, device: torch.device) -> float:
    """Predicted seconds of a plan's run.

    Steps of one kind (layer, channels, width, strip) are timed once, on a map one strip high, and
    counted by their multiplications. All of it in memory: a disk that writes slower than the
    network computes is not seen.

    Args:
        plan: of a network with weights or on the meta device. device: to run on.
    """
    costs: dict[object, tuple[float, float]] = {}
    total = 0.0
    for step, units in zip(plan.steps, plan.units, strict=True):
        kind = _kind(step, units)
        if kind not in costs:
            costs[kind] = _costs(step, units, device)
        once, rate = costs[kind]
        total += once + rate * step.multiplies
    return plan.pictures * total


def _kind(step: Step, units: int) -> object:
    layer = step.layer
    shortcut = None if layer.shortcut is None else layer.shortcut.weight.shape
    facts = (layer.norm is None, layer.activated, step.measured, step.residual is None, shortcut)
    return type(layer), layer.module.weight.shape, step.source.width, units, facts


def _costs(step: Step, units: int, device: torch.device) -> tuple[float, float]:
    """Seconds before the first strip, and for each multiplication."""
    small = _one_strip(step, units, device)
    maps = lifetimes([small])
    layout = lay_out(maps, None, parted=False)
    store = Store(layout, device, None)
    for key in maps:
        store.tensor(key).normal_()
    moments = Moments(small.source.channels, device)
    moments.add(torch.randn(4, 8, small.source.channels, dtype=small.source.dtype, device=device))
    # the first time kernels are made for this shape
    times = [_timed(small, store, moments, device) for _ in range(2)]
    once, strip = times[-1]
    return once, strip / small.multiplies


def _timed(step: Step, store: Store, moments: Moments, device: torch.device) -> tuple[float, float]:
    """Seconds before the first strip, and of a strip as high as the map."""
    measured = Moments(step.target.channels, device) if step.measured else None
    start = time.perf_counter()
    under_way = begin(step, step.units, store, moments, measured, device)
    begun = time.perf_counter()
    under_way.strip(0, step.units)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return begun - start, time.perf_counter() - begun


def _one_strip(step: Step, units: int, device: torch.device) -> Step:
    """The same step over maps that are one strip high, with weights."""
    full = step.source.height
    height = max(2, full * units // step.units)  # a halving makes nothing of one row
    source = replace(step.source, height=height)
    rows, width = step.layer.output_size(height, step.source.width)
    in_place = step.target is step.source
    modules: dict[str, Any] = {
        field.name: _real(module, device)
        for field in fields(step.layer)
        if isinstance(module := getattr(step.layer, field.name), nn.Module)
    }
    small = replace(
        step,
        source=source,
        target=source if in_place else replace(step.target, height=rows, width=width),
        layer=replace(step.layer, **modules),
        residual=None if step.residual is None else replace(step.residual, height=rows),
    )
    if isinstance(small, Attend):
        few = max(1, min(full, TOKENS // source.width))
        keys, values = replace(small.keys, height=few), replace(small.values, height=few)
        small = replace(small, keys=keys, values=values)
    return small


def _real(module: Module, device: torch.device) -> Module:
    """The module, or a copy with random weights where it has none."""
    if next(module.parameters()).device.type != "meta":
        return module
    made = copy.deepcopy(module).to_empty(device=device)
    for parameter in made.parameters():
        parameter.normal_(std=0.1)
    return made
