"""Runs a plan: strip by strip through each step, from the input to the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.streaming.arena import trim_heap
from sdconv.streaming.buffers import AllocatedBuffers, FeatureBuffer
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.layers import StepContext, StepRunner
from sdconv.streaming.planner import StreamPlan
from sdconv.streaming.steps import StreamStep

# called after each strip with its step and the multiply-accumulates done for it
OnStrip = Callable[[StreamStep, int], object]


def run(
    plan: StreamPlan,
    x: Tensor,
    out: Tensor,
    *,
    folder: Path | None,
    on_strip: OnStrip = lambda step, done: None,
) -> None:
    """Runs a batch through the plan's steps, one image after the other.

    Args:
        x: ``(B, C, H, W)``.
        out: of the plan's shape; filled.
        folder: for what the plan spills; None for the host's memory.
        on_strip: called after each strip with its step and the multiply-accumulates done for it.
    """
    for image, result in zip(x, out, strict=True):
        _run_image(plan, image, result, folder, on_strip)


def _run_image(
    plan: StreamPlan, x: Tensor, out: Tensor, folder: Path | None, on_strip: OnStrip
) -> None:
    buffers = AllocatedBuffers(plan.layout, x.device, folder)
    buffers.put(plan.steps[0].source, x.permute(1, 2, 0))
    buffers.put(plan.steps[-1].target, out.permute(1, 2, 0))
    stats: dict[FeatureBuffer, RunningGroupStats] = {}
    for step, units in zip(plan.steps, plan.units, strict=True):
        collected = _run_step(step, units, buffers, stats.get(step.source), x.device, on_strip)
        if collected is not None:
            stats[step.target] = collected
        trim_heap(x.device)


def _run_step(
    step: StreamStep,
    units: int,
    buffers: AllocatedBuffers,
    source_stats: RunningGroupStats | None,
    device: torch.device,
    on_strip: OnStrip,
) -> RunningGroupStats | None:
    """Runs one step in strips of ``units``; returns the target's statistics if it collects them.

    Raises:
        NotFiniteError: with the step's name, if the layer's method cannot handle NaN or infinity
            and its output has some.
    """
    target_stats = RunningGroupStats(step.target.channels, device) if step.collects_stats else None
    try:
        runner = make_runner(step, units, buffers, source_stats, target_stats, device)
        trim_heap(device)
        for start in range(0, step.units, units):
            stop = min(start + units, step.units)
            runner.run_strip(start, stop)
            buffers.release_rows(step.source, *step.layer.input_rows(start, stop))
            for buffer in {step.target, step.residual or step.target} - {step.source}:
                buffers.release_rows(buffer, *step.layer.output_rows(start, stop))
            on_strip(step, step.multiplies * (stop - start) // step.units)
    except NotFiniteError as error:
        raise NotFiniteError(step.name) from error
    finally:
        scratch.release()
    return target_stats


def make_runner(
    step: StreamStep,
    units: int,
    buffers: AllocatedBuffers,
    source_stats: RunningGroupStats | None,
    target_stats: RunningGroupStats | None,
    device: torch.device,
) -> StepRunner:
    """Makes the runner of a step over the tensors of its buffers."""
    context = StepContext(
        source=buffers.tensor(step.source),
        target=buffers.tensor(step.target),
        residual=None if step.residual is None else buffers.tensor(step.residual),
        resident=tuple(buffers.tensor(buffer) for buffer in step.inputs if buffer.resident),
        source_stats=source_stats,
        target_stats=target_stats,
        device=device,
        in_place=step.source is step.target,
    )
    return step.layer.make_runner(context, units)


@contextmanager
def progress_bar(label: str, total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error, if that is a terminal; yields a function to call with each
    amount of work done."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, advance=done)
