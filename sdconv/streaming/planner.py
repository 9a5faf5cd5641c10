"""What stays in memory, what is spilled, and how many rows a strip has: from the steps and a
limit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sdconv.errors import InputError
from sdconv.streaming.maps import Map, Place
from sdconv.streaming.sizes import in_words
from sdconv.streaming.steps import Step

# what torch's kernels keep beside the tensors (generated code, thread stacks, buffers)
KERNELS = 24 << 20


@dataclass(frozen=True, eq=False)
class Plan:
    """How one picture will go through a network.

    Attributes:
        steps: in order. units: of a strip, for each step. places: of every map.
        pictures: that go through, one after the other.
        peak: bytes of memory at most, weights and input apart, the result with it.
        spilled: bytes outside memory at most.
    """

    steps: tuple[Step, ...]
    units: tuple[int, ...]
    places: Mapping[Map, Place]
    pictures: int
    peak: int
    spilled: int

    @property
    def multiplies(self) -> int:
        """Multiplications of all pictures."""
        return self.pictures * sum(step.multiplies for step in self.steps)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the result, ``(B, C, H, W)``."""
        last = self.steps[-1].target
        return self.pictures, last.channels, last.height, last.width


def make_plan(steps: Sequence[Step], *, pictures: int, limit: int | None, can_spill: bool) -> Plan:
    """Puts maps into memory as long as they fit, in the order in which they are made, and cuts
    strips to what is left.

    Args:
        steps: for one picture. pictures: that go through, one after the other.
        limit: bytes of memory, weights and input apart; None for no limit.
        can_spill: whether maps may go outside it.

    Raises:
        InputError: the limit cannot be met; it says what the least is, with and without spilling.
    """
    steps = tuple(steps)
    result = pictures * steps[-1].target.bytes
    comfortable = [_fitting(step, step.comfort) for step in steps]
    for units in (comfortable, [1] * len(steps)):
        fixed = [result + KERNELS + step.workspace(n) for step, n in zip(steps, units, strict=True)]
        placed = _placed(steps, fixed, limit, can_spill)
        if placed is not None:
            break
    else:
        raise _refused(steps, pictures, limit or 0, can_spill)
    places, used = placed
    if limit is not None:
        spare = [limit - taken for taken in used]
        units = [
            min(most, _fitting(step, step.workspace(n) + left))
            for step, n, most, left in zip(steps, units, comfortable, spare, strict=True)
        ]
    units = [_even(step.units, n) for step, n in zip(steps, units, strict=True)]
    held = _held(steps, [key for key, place in places.items() if place is Place.MEMORY])
    spilled = _held(steps, [key for key, place in places.items() if place is Place.SPILL])
    peaks = [
        result + KERNELS + step.workspace(n) + maps
        for step, n, maps in zip(steps, units, held, strict=True)
    ]
    return Plan(steps, tuple(units), places, pictures, max(peaks), max(spilled))


def lifetimes(steps: Sequence[Step]) -> dict[Map, range]:
    """For every map the steps, by number, during which it is alive; in the order of birth."""
    spans: dict[Map, range] = {}
    for number, step in enumerate(steps):
        for key in (*step.reads, step.target):
            spans[key] = range(spans[key].start if key in spans else number, number + 1)
    return spans


def _placed(
    steps: Sequence[Step], fixed: Sequence[int], limit: int | None, can_spill: bool
) -> tuple[dict[Map, Place], list[int]] | None:
    """Where every map is, and the bytes in memory at each step; None if that cannot be.

    ``fixed``: bytes that each step takes beside its maps.
    """
    spans = lifetimes(steps)
    places = {steps[0].source: Place.CALLER, steps[-1].target: Place.CALLER}
    used = list(fixed)
    # first what has to be in memory
    for key in sorted(spans.keys() - places.keys(), key=lambda k: (not k.whole, spans[k].start)):
        there = [used[number] + key.bytes for number in spans[key]]
        if limit is None or max(there) <= limit:
            places[key] = Place.MEMORY
            used[spans[key].start : spans[key].stop] = there
        elif key.whole or not can_spill:
            return None
        else:
            places[key] = Place.SPILL
    return (places, used) if limit is None or max(used) <= limit else None


def _held(steps: Sequence[Step], keys: Collection[Map]) -> list[int]:
    """Bytes of these maps that are alive at each step."""
    spans = {key: span for key, span in lifetimes(steps).items() if key in keys}
    return [
        sum(key.bytes for key, span in spans.items() if number in span)
        for number in range(len(steps))
    ]


def _fitting(step: Step, room: int) -> int:
    """The most units, at least one, of which a strip takes no more than ``room`` bytes."""
    one = step.workspace(1)
    return max(1, min(step.units, 1 + (room - one) // (step.workspace(2) - one)))


def _even(whole: int, most: int) -> int:
    """Units of strips of nearly the same size: kernels are made for each size."""
    strips = -(-whole // most)
    return -(-whole // strips)


def least_memory(steps: Sequence[Step], *, pictures: int, spill: bool) -> int:
    """The smallest limit that can be met."""
    inner = lifetimes(steps).keys() - {steps[0].source, steps[-1].target}
    maps = _held(steps, [key for key in inner if key.whole or not spill])
    rows = [step.workspace(1) + held for step, held in zip(steps, maps, strict=True)]
    return max(rows) + KERNELS + pictures * steps[-1].target.bytes


def _refused(steps: Sequence[Step], pictures: int, limit: int, can_spill: bool) -> InputError:
    least = {
        spill: in_words(least_memory(steps, pictures=pictures, spill=spill))
        for spill in (True, False)
    }
    wanted = f"at least {least[True]}"
    if not can_spill:
        wanted = f"at least {least[False]}, or {least[True]} with spill=folder"
    return InputError(
        "the memory limit cannot be met",
        where="memory_limit",
        expected=wanted,
        got=in_words(limit),
    )
