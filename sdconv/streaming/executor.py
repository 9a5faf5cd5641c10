"""Walks a plan: strips through each step, from the first map to the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdconv.streaming.maps import Map, Store, trim_heap, zeros
from sdconv.streaming.moments import Moments
from sdconv.streaming.planner import Plan, lifetimes
from sdconv.streaming.steps import Step

# called after each strip with its step and the multiplications done
Tick = Callable[[Step, int], object]


class Window:
    """The rows of a map that a strip needs, prepared, with zeros outside the map.

    Each row is prepared once: those that two strips share are carried from one to the next, which
    also lets a step write over the map that it reads.

    Args:
        step: whose source it is. rows: at most, of a strip. source: the map, ``(H, W, C)``.
        moments: of the source. device: where strips are computed.
    """

    def __init__(
        self,
        step: Step,
        rows: int,
        source: Tensor,
        moments: Moments | None,
        device: torch.device,
    ) -> None:
        self._step, self._source, self._moments = step, source, moments
        self._height, self._width, channels = source.shape
        columns = self._width + step.layer.right
        self._buffer = zeros((rows, columns, channels), source.dtype, device)
        self._first = self._last = -rows

    def slide(self, first: int, last: int) -> Tensor:
        """Rows ``first`` up to ``last``, no earlier than those before."""
        kept = max(0, self._last - first)
        if kept:
            start = first - self._first
            self._buffer[:kept] = self._buffer[start : start + kept].clone()
        strip = self._buffer[: last - first]
        top, bottom = max(first + kept, 0), min(last, self._height)
        if top < bottom:
            strip[kept : top - first] = 0
            rows = self._source[top:bottom].to(self._buffer.device)
            out = strip[top - first : bottom - first, : self._width]
            self._step.prepare(rows, out, self._moments)
        strip[max(bottom - first, kept) :] = 0
        self._first, self._last = first, last
        return strip


def run(
    plan: Plan, x: Tensor, out: Tensor, *, folder: Path | None, tick: Tick = lambda step, done: None
) -> None:
    """One picture through the plan's steps.

    Args:
        x: ``(C, H, W)``. out: ``(C', H', W')``, filled. folder: for what the plan spills.
        tick: called after each strip with its step and the multiplications done.
    """
    store = Store(plan.places, x.device, folder)
    store.put(plan.steps[0].source, x.permute(1, 2, 0))
    store.put(plan.steps[-1].target, out.permute(1, 2, 0))
    moments: dict[Map, Moments] = {}
    spans = lifetimes(plan.steps)
    for number, (step, units) in enumerate(zip(plan.steps, plan.units, strict=True)):
        measured = run_step(step, units, store, moments.get(step.source), x.device, tick)
        if measured is not None:
            moments[step.target] = measured
        for key, span in spans.items():
            if span.stop == number + 1:
                store.drop(key)
        trim_heap()


def run_step(
    step: Step, units: int, store: Store, moments: Moments | None, device: torch.device, tick: Tick
) -> Moments | None:
    """One step, ``units`` at a time; the moments of what it wrote, if they are wanted."""
    first, last = step.layer.window(0, units)
    window = Window(step, last - first, store.tensor(step.source), moments, device)
    target = store.tensor(step.target)
    residual = None if step.residual is None else store.tensor(step.residual)
    whole = [store.tensor(key) for key in step.reads if key.whole]
    measured = Moments(step.target.channels, device) if step.measured else None
    for start in range(0, step.units, units):
        stop = min(start + units, step.units)
        first, last = step.layer.window(start, stop)
        top, bottom = step.layer.outputs(start, stop)
        added = None if residual is None else residual[top:bottom].to(device)
        made = step.compute(window.slide(first, last), added, whole)
        target[top:bottom] = made
        if measured is not None:
            measured.add(made)
        del made  # before the next one is made
        store.rest(step.source, first, last)
        for key in {step.target, step.residual or step.target} - {step.source}:
            store.rest(key, top, bottom)
        tick(step, step.multiplies * (stop - start) // step.units)
    return measured
