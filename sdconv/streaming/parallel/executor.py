"""Runs a plan over one rank's bands, and exchanges rows and statistics with the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.streaming.arena import trim_heap
from sdconv.streaming.buffers import AllocatedBuffers, FeatureBuffer
from sdconv.streaming.executor import OnStrip
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.layers import StepContext
from sdconv.streaming.parallel.bands import Bands, strips_of
from sdconv.streaming.parallel.group import Moments, RankGroup
from sdconv.streaming.planner import StreamPlan
from sdconv.streaming.steps import AttentionStep, StreamStep

Wait = Callable[[], None]


def strip_counts(plan: StreamPlan) -> tuple[int, ...]:
    """The number of strips in each step of one rank's plan."""
    pairs = zip(plan.steps, plan.units, strict=True)
    return tuple(len(strips_of(step.band or range(0), units)) for step, units in pairs)


@dataclass(frozen=True, eq=False)
class BandRun:
    """One rank's share of a batch.

    Attributes:
        bands: of the feature maps.
        strips: the number of strips of each rank, in each step.
        group: the ranks.
    """

    bands: Bands
    strips: Sequence[Sequence[int]]
    group: RankGroup

    def run(
        self, plan: StreamPlan, x: Tensor, out: Tensor, *, folder: Path | None, on_strip: OnStrip
    ) -> None:
        """Runs a batch, as `sdconv.streaming.executor.run` does without ranks.

        Args:
            plan: of this rank's steps.
            x: ``(B, C, H, W)``, whole on every rank.
            out: of the plan's shape; filled, on every rank.
            folder: for what the plan spills; None for the host's memory.
            on_strip: called after each of this rank's strips.

        Raises:
            NotFiniteError: on every rank.
            SdconvError: another rank ended, or did not answer in time.
        """
        for image, result in zip(x, out, strict=True):
            buffers = AllocatedBuffers(plan.layout, x.device, folder)
            buffers.put(plan.steps[0].source, image.permute(1, 2, 0))
            buffers.put(plan.steps[-1].target, result.permute(1, 2, 0))
            self._run_image(plan, buffers, on_strip)
            self._spread(result.permute(1, 2, 0))()

    def _run_image(self, plan: StreamPlan, buffers: AllocatedBuffers, on_strip: OnStrip) -> None:
        stats: dict[FeatureBuffer, RunningGroupStats] = {}
        spreading: list[Wait] = []
        triples = zip(plan.steps, self.bands.steps, plan.units, self.strips, strict=True)
        for step, whole, units, strips in triples:
            if isinstance(step, AttentionStep):
                while spreading:
                    spreading.pop(0)()
            run = _StepRun(step, whole, units, self.bands, self.group, buffers, on_strip)
            collected = run(stats.get(step.source), strips)
            if collected is not None:
                stats[step.target] = collected
            if step.target.resident:  # the keys travel while the values are computed
                spreading.append(self._spread(buffers.tensor(step.target)))
            trim_heap(self.group.device)

    def _spread(self, whole: Tensor) -> Wait:
        ranks = range(self.bands.ranks)
        return self.group.spread(whole, [self.bands.own(len(whole), rank) for rank in ranks])


@dataclass(frozen=True, eq=False)
class _StepRun:
    """One rank's share of one step.

    Attributes:
        step: over the rank's rows.
        whole: the same step over whole feature maps.
        units: of a strip.
    """

    step: StreamStep
    whole: StreamStep
    units: int
    bands: Bands
    group: RankGroup
    buffers: AllocatedBuffers
    on_strip: OnStrip

    def __call__(
        self, source_stats: RunningGroupStats | None, strips: Sequence[int]
    ) -> RunningGroupStats | None:
        """Computes the rank's rows; returns the statistics of the whole target if they are needed.

        Args:
            source_stats: of the whole source, if the layer normalises it.
            strips: the number of strips of each rank.

        Raises:
            NotFiniteError: with the step's name, on every rank.
        """
        step = self.step
        source = self.buffers.tensor(step.source)
        wait = self.group.exchange(source, step.source.first_row, self.bands.messages(self.whole))
        channels = step.target.channels if step.collects_stats else 0
        stats = _StripStats(channels, self.group.device)
        failed = False
        try:
            if step.units:
                self._run_strips(source_stats, stats if channels else None, wait)
        except NotFiniteError:
            failed = True
        finally:
            scratch.release()
        wait()
        if not (channels or step.layer.checks_finite):
            return None
        try:
            return self.group.gather_moments(stats.strips, strips, channels, failed=failed)
        except NotFiniteError as error:
            raise NotFiniteError(step.name) from error

    def _run_strips(
        self, source_stats: RunningGroupStats | None, stats: _StripStats | None, wait: Wait
    ) -> None:
        """Runs the strips: those that need no other rank's rows first, while such rows travel, and
        on to the bottom; then those above them."""
        step = self.step
        strips = strips_of(step.band or range(0), self.units)
        inner = [self._is_inner(strip) for strip in strips]
        begin = inner.index(True) if any(inner) else 0
        context = self._context(source_stats, stats)
        runner = step.layer.make_runner(context, self.units)
        trim_heap(context.device)

        def run_strips(first: int, last: int) -> None:
            for strip, is_inner in zip(strips[first:last], inner[first:last], strict=True):
                if not is_inner:
                    wait()
                runner.run_strip(strip.start, strip.stop)
                self._release_rows(strip)
                self.on_strip(step, step.multiplies * len(strip) // step.units)

        if begin == 0:
            run_strips(0, len(strips))
            return
        if context.in_place:
            overwritten = self._rows_below(strips[begin - 1], context)
            before = overwritten.clone()
        run_strips(begin, len(strips))
        if context.in_place:  # the strips above need these rows as they were
            after = overwritten.clone()
            overwritten.copy_(before)
        runner.restart()
        run_strips(0, begin)
        if context.in_place:
            overwritten.copy_(after)
        if stats is not None:
            stats.rotate(len(strips) - begin)

    def _context(
        self, source_stats: RunningGroupStats | None, target_stats: RunningGroupStats | None
    ) -> StepContext:
        """The rows of the source that the rank needs, and its own of the target and residual."""
        step, is_whole = self.step, self.bands.is_whole(self.whole.source)
        needed = self.bands.needed(self.whole, self.group.rank)
        source = range(step.source.height) if is_whole else needed
        target = self.bands.own(self.whole.target.height, self.group.rank)

        def rows_of(buffer: FeatureBuffer, rows: range) -> Tensor:
            first = buffer.first_row
            return self.buffers.tensor(buffer)[rows.start - first : rows.stop - first]

        return StepContext(
            source=rows_of(step.source, source),
            target=rows_of(step.target, target),
            residual=None if step.residual is None else rows_of(step.residual, target),
            resident=tuple(self.buffers.tensor(one) for one in step.inputs if one.resident),
            source_stats=source_stats,
            target_stats=target_stats,
            device=self.group.device,
            in_place=step.source is step.target,
            source_row=source.start,
            target_row=target.start,
            whole_height=self.whole.target.height,
            has_halo=not is_whole,
        )

    def _is_inner(self, strip: range) -> bool:
        """Whether a strip needs no other rank's rows."""
        if self.bands.is_whole(self.whole.source):
            return True
        needed = self.bands.needed(self.whole, self.group.rank)
        own = self.bands.own(self.whole.source.height, self.group.rank)
        first, last = self.whole.layer.input_rows(strip.start, strip.stop)
        return own.start <= max(first, needed.start) and min(last, needed.stop) <= own.stop

    def _rows_below(self, strip: range, context: StepContext) -> Tensor:
        """The rows that a strip reads below those that it writes, in a step in place."""
        layer, ends = self.step.layer, (strip.start, strip.stop)
        first, last = layer.output_rows(*ends)[1], layer.input_rows(*ends)[1]
        return context.source[first - context.source_row : last - context.source_row]

    def _release_rows(self, strip: range) -> None:
        """Lets the system write the strip's pages to the file that they are in."""
        step, ends = self.step, (strip.start, strip.stop)
        written = step.layer.output_rows(*ends)
        rows = {step.residual or step.target: written, step.target: written}
        rows[step.source] = step.layer.input_rows(*ends)
        for buffer, (first, last) in rows.items():
            self.buffers.release_rows(buffer, first - buffer.first_row, last - buffer.first_row)


class _StripStats(RunningGroupStats):
    """Keeps the statistics of the strips apart."""

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__(channels, device)
        self.strips: list[Moments] = []

    def combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        self.strips.append((count, mean, squares))

    def rotate(self, first: int) -> None:
        """Puts the strips before number ``first`` behind the others."""
        self.strips = self.strips[first:] + self.strips[:first]
