"""Walks a plan: strips through each step, from the first map to the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.streaming.arena import trim_heap
from sdconv.streaming.maps import Map, Store
from sdconv.streaming.moments import Moments
from sdconv.streaming.passes import Ground, Pass
from sdconv.streaming.planner import Plan
from sdconv.streaming.steps import Step

# called after each strip with its step and the multiplications done
Tick = Callable[[Step, int], object]


def run(
    plan: Plan, x: Tensor, out: Tensor, *, folder: Path | None, tick: Tick = lambda step, done: None
) -> None:
    """One picture through the plan's steps.

    Args:
        x: ``(C, H, W)``. out: ``(C', H', W')``, filled. folder: for what the plan spills.
        tick: called after each strip with its step and the multiplications done.
    """
    store = Store(plan.layout, x.device, folder)
    store.put(plan.steps[0].source, x.permute(1, 2, 0))
    store.put(plan.steps[-1].target, out.permute(1, 2, 0))
    moments: dict[Map, Moments] = {}
    for step, units in zip(plan.steps, plan.units, strict=True):
        measured = run_step(step, units, store, moments.get(step.source), x.device, tick)
        if measured is not None:
            moments[step.target] = measured
        trim_heap()


def run_step(
    step: Step, units: int, store: Store, moments: Moments | None, device: torch.device, tick: Tick
) -> Moments | None:
    """One step, ``units`` at a time; the moments of what it wrote, if they are wanted.

    Raises:
        NotFiniteError: what it wrote is not finite, by a layer that cannot go on with it. It has
            the step's name.
    """
    measured = Moments(step.target.channels, device) if step.measured else None
    try:
        under_way = begin(step, units, store, moments, measured, device)
        trim_heap()
        for start in range(0, step.units, units):
            stop = min(start + units, step.units)
            under_way.strip(start, stop)
            store.rest(step.source, *step.layer.window(start, stop))
            for key in {step.target, step.residual or step.target} - {step.source}:
                store.rest(key, *step.layer.outputs(start, stop))
            tick(step, step.multiplies * (stop - start) // step.units)
    except NotFiniteError as error:
        raise NotFiniteError(step.name) from error
    finally:
        scratch.release()
    return measured


def begin(
    step: Step,
    units: int,
    store: Store,
    moments: Moments | None,
    measured: Moments | None,
    device: torch.device,
) -> Pass:
    """The step over the maps in the store, before its first strip."""
    ground = Ground(
        source=store.tensor(step.source),
        target=store.tensor(step.target),
        residual=None if step.residual is None else store.tensor(step.residual),
        whole=tuple(store.tensor(key) for key in step.reads if key.whole),
        moments=moments,
        measured=measured,
        device=device,
    )
    return step.layer.begin(ground, units)
