"""Plans a run: what stays in memory, what is spilled, and how many rows a strip has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdconv.errors import InputError
from sdconv.sizes import format_bytes
from sdconv.streaming.buffers import FeatureBuffer, MemoryLayout, lay_out
from sdconv.streaming.steps import StreamStep

# Bytes that torch's kernels allocate in addition to tensors: generated code, stacks, buffers.
KERNEL_OVERHEAD = 24 << 20


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """How a batch goes through a network, one image after the other.

    Attributes:
        steps: in running order.
        units: of a strip, for each step.
        layout: of the buffers between input and result.
        batch: number of images.
    """

    steps: tuple[StreamStep, ...]
    units: tuple[int, ...]
    layout: MemoryLayout
    batch: int

    @property
    def peak(self) -> int:
        """Most bytes of memory in use at once, with the result, without weights and input."""
        written: list[FeatureBuffer] = []
        most = 0
        for step, units in zip(self.steps, self.units, strict=True):
            written.append(step.target)
            most = max(most, self.layout.memory_in_use(written) + step.workspace(units))
        return most + KERNEL_OVERHEAD + self.batch * self.steps[-1].target.bytes

    @property
    def spilled(self) -> int:
        """Bytes outside memory."""
        return self.layout.spilled

    @property
    def strips(self) -> int:
        """The number of strips in all steps, for one image."""
        pairs = zip(self.steps, self.units, strict=True)
        return sum(-(-step.units // units) for step, units in pairs)

    @property
    def multiplies(self) -> int:
        """Multiply-accumulates for all images."""
        return self.batch * sum(step.multiplies for step in self.steps)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The result's shape, ``(B, C, H, W)``."""
        last = self.steps[-1].target
        return self.batch, last.channels, last.height, last.width


def make_plan(
    steps: Sequence[StreamStep],
    *,
    batch: int,
    limit: int | None,
    can_spill: bool,
    separate_spill: bool = False,
) -> StreamPlan:
    """Plans to keep as much in memory as the limit allows, with strips as high as the rest allows.

    Args:
        steps: for one image.
        batch: number of images, which run one after the other.
        limit: bytes of memory, without weights and input; None for no limit.
        can_spill: whether buffers may lie outside memory.
        separate_spill: see `sdconv.streaming.arena.has_separate_spill`.

    Raises:
        InputError: the limit cannot be met; the error states the lowest limits that can.
    """
    steps = tuple(steps)
    result = batch * steps[-1].target.bytes
    ample = [_units_within(step, step.ample_workspace) for step in steps]
    for units in (ample, [1] * len(steps)):
        room = None if limit is None else limit - result - _largest_workspace(steps, units)
        layout = lay_out(_intermediates(steps), room, separate_spill=separate_spill)
        fits = layout.keeps_resident if can_spill else not layout.spilled
        if fits and (room is None or room >= 0):
            break
    else:
        raise InputError(
            "the memory limit cannot be met",
            where="memory_limit",
            expected=sufficient_limits(steps, batch=batch, can_spill=can_spill),
            got=format_bytes(limit or 0),
        )
    if limit is not None:
        room = limit - result - KERNEL_OVERHEAD - layout.memory
        pairs = zip(steps, ample, strict=True)
        units = [min(most, _units_within(step, room)) for step, most in pairs]
    units = [_even_units(step.units, most) for step, most in zip(steps, units, strict=True)]
    return StreamPlan(steps, tuple(units), layout, batch)


def lifetimes(steps: Sequence[StreamStep]) -> dict[FeatureBuffer, range]:
    """The step numbers during which each buffer is alive, in the order of first use."""
    spans: dict[FeatureBuffer, range] = {}
    for number, step in enumerate(steps):
        for buffer in (*step.inputs, step.target):
            first = spans[buffer].start if buffer in spans else number
            spans[buffer] = range(first, number + 1)
    return spans


def _intermediates(steps: Sequence[StreamStep]) -> dict[FeatureBuffer, range]:
    """The lifetimes of all buffers except the input and the result, which the caller provides."""
    ends = (steps[0].source, steps[-1].target)
    return {buffer: span for buffer, span in lifetimes(steps).items() if buffer not in ends}


def _largest_workspace(steps: Sequence[StreamStep], units: Sequence[int]) -> int:
    """The largest workspace of any step, with the kernels' overhead."""
    return KERNEL_OVERHEAD + max(step.workspace(n) for step, n in zip(steps, units, strict=True))


def _units_within(step: StreamStep, room: int) -> int:
    """The most units, at least one, whose workspace is at most ``room`` bytes."""
    one = step.workspace(1)
    return max(1, min(step.units, 1 + (room - one) // (step.workspace(2) - one)))


def _even_units(units: int, most: int) -> int:
    """Units of a strip if ``units`` are cut evenly into strips of at most ``most``: kernels are
    generated for each size."""
    strips = -(-units // most)
    return -(-units // strips) if strips else 1  # a rank's band may be empty


def least_memory(steps: Sequence[StreamStep], *, batch: int, spill: bool) -> int:
    """The lowest limit that can be met, in bytes."""
    kept = {
        buffer: span
        for buffer, span in _intermediates(steps).items()
        if buffer.resident or not spill
    }
    buffers = lay_out(kept, None, separate_spill=False).size
    result = batch * steps[-1].target.bytes
    return buffers + _largest_workspace(steps, [1] * len(steps)) + result


def sufficient_limits(steps: Sequence[StreamStep], *, batch: int, can_spill: bool) -> str:
    """The limits that can be met, in words."""
    with_spill = format_bytes(least_memory(steps, batch=batch, spill=True))
    if can_spill:
        return f"at least {with_spill}"
    without = format_bytes(least_memory(steps, batch=batch, spill=False))
    return f"at least {without}, or {with_spill} with spill=folder"
