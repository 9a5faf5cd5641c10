"""Predicts how long a plan will take, by timing one strip of each kind of step on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from sdconv.models.tiny import AutoencoderTiny
from sdconv.streaming.buffers import AllocatedBuffers, lay_out
from sdconv.streaming.executor import make_runner
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.layers import WholeConv
from sdconv.streaming.planner import StreamPlan, lifetimes
from sdconv.streaming.rows import RowPlan, plan_rows, run_rows
from sdconv.streaming.steps import AttentionStep, Direction, StreamStep

Module = TypeVar("Module", bound=nn.Module)

# Keys that a timed strip of attention attends to; the time for all keys is extrapolated.
TIMED_TOKENS = 8192


@torch.no_grad()
def predict_seconds(
    plan: StreamPlan,
    *,
    device: torch.device,
    on_step: Callable[[str, int, int], None] | None = None,
) -> float:
    """Predicts the seconds that a plan's run takes.

    Steps of one kind (layer, channels, width, height of a strip) are timed once, on a feature map
    one strip high, and scaled by their multiply-accumulates. Everything is timed in memory: a disk
    that writes more slowly than the network computes is not accounted for.

    Args:
        plan: for a network with weights or on the meta device.
        device: to run on.
        on_step: called after each step with "", the number of steps so far, and of all.
    """
    costs: dict[object, tuple[float, float]] = {}
    total = 0.0
    for number, (step, units) in enumerate(zip(plan.steps, plan.units, strict=True), 1):
        kind = _kind(step, units)
        if kind not in costs:
            costs[kind] = _time_step(step, units, device)
        setup, per_multiply = costs[kind]
        total += setup + per_multiply * step.multiplies
        if on_step is not None:
            on_step("", number, len(plan.steps))
    return plan.batch * total


@torch.no_grad()
def predict_row_seconds(
    network: AutoencoderTiny,
    direction: Direction,
    plan: RowPlan,
    width: int,
    device: torch.device,
    on_rows: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> float:
    """Predicts the seconds that a tiny autoencoder's plan takes, from two strips of it.

    Args:
        network: with weights or on the meta device.
        direction: which half.
        plan: of that half.
        width: columns of the input.
        device: to run on.
        on_rows: called with "", the rows timed so far and all of them, as they are computed.
    """
    timed = _with_weights(network, device)
    few = plan_rows(timed, direction, 1, 2 * plan.rows, width, limit=None)
    few = replace(few, rows=plan.rows)
    channels = network.config.in_channels, network.config.latent_channels
    shape = 1, channels[direction == "decode"], 2 * plan.rows, width
    x = torch.randn(shape, dtype=timed.dtype, device=device)
    out = x.new_empty(few.shape)
    done, total = 0, 2 * few.shape[2]

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        on_rows("", done, total)

    seconds = 0.0
    for _ in range(2):  # the first run generates the kernels
        start = time.perf_counter()
        run_rows(few, x, out, advance)
        seconds = time.perf_counter() - start
    return seconds * plan.multiplies / few.multiplies


def _kind(step: StreamStep, units: int) -> object:
    """A key for steps with the same cost per row: all that the cost depends on but the height."""
    layer = step.layer
    shortcut = None if layer.shortcut is None else layer.shortcut.weight.shape
    facts = (layer.norm is None, layer.silu, step.collects_stats, step.residual is None, shortcut)
    whole = step.source.height if isinstance(layer, WholeConv) else None
    sizes = layer.module.weight.shape, step.source.width, units, whole
    return type(layer), layer.modes, sizes, facts


def _time_step(step: StreamStep, units: int, device: torch.device) -> tuple[float, float]:
    """Times one strip: seconds before the first strip, and for each multiply-accumulate."""
    small = _one_strip(step, units, device)
    spans = lifetimes([small])
    buffers = AllocatedBuffers(lay_out(spans, None, separate_spill=False), device, None)
    for buffer in spans:
        buffers.tensor(buffer).normal_()
    channels = small.source.channels
    stats = RunningGroupStats(channels, device)
    stats.update(torch.randn(4, 8, channels, dtype=small.source.dtype, device=device))
    # the first run generates the kernels for this shape
    times = [_time_strip(small, buffers, stats, device) for _ in range(2)]
    setup, strip = times[-1]
    return setup, strip / small.multiplies


def _time_strip(
    step: StreamStep, buffers: AllocatedBuffers, stats: RunningGroupStats, device: torch.device
) -> tuple[float, float]:
    """Runs a step as one strip: seconds before the strip, and of the strip itself."""
    target_stats = RunningGroupStats(step.target.channels, device) if step.collects_stats else None
    start = time.perf_counter()
    runner = make_runner(step, step.units, buffers, stats, target_stats, device)
    ready = time.perf_counter()
    runner.run_strip(0, step.units)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return ready - start, time.perf_counter() - ready


def _one_strip(step: StreamStep, units: int, device: torch.device) -> StreamStep:
    """The same step over feature maps that are one strip high, with weights."""
    full = step.source.height
    height = max(2, full * units // step.units)  # strided downsampling needs two rows
    source = replace(step.source, height=height)
    rows, width = step.layer.output_size(height, step.source.width)
    in_place = step.target is step.source
    modules: dict[str, Any] = {
        field.name: _with_weights(module, device)
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
    if isinstance(small, AttentionStep):
        few = max(1, min(full, TIMED_TOKENS // source.width))
        keys, values = replace(small.keys, height=few), replace(small.values, height=few)
        small = replace(small, keys=keys, values=values)
    return small


def _with_weights(module: Module, device: torch.device) -> Module:
    """The module, or a copy with random weights if it is on the meta device."""
    if next(module.parameters()).device.type != "meta":
        return module
    made = copy.deepcopy(module).to_empty(device=device)
    for parameter in made.parameters():
        parameter.normal_(std=0.1)
    return made
