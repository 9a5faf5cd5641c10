"""Cuts a VAE's feature maps into one band of rows for each rank: which rows a rank computes, which
it needs from others, and the steps over its own rows alone.

Edges lie at the same place of the image in every feature map. Where a layer computes several rows
together (the tiles of Winograd's method), they are rounded to whole ones there, so that each row is
computed once, by the arithmetic of a run without ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sdconv.errors import InputError
from sdconv.streaming.buffers import FeatureBuffer
from sdconv.streaming.layers import WholeConv
from sdconv.streaming.steps import AttentionStep, StreamStep


@dataclass(frozen=True)
class Message:
    """Rows of one feature map that a rank needs and another has, or has itself at another place.

    Attributes:
        sender, receiver: the ranks.
        rows: their numbers in the feature map.
        place: the number under which the receiver reads the first one: its own number, or one
            beyond an edge, where a convolution that does not pad with zeros reads it again.
    """

    sender: int
    receiver: int
    rows: range
    place: int

    @property
    def places(self) -> range:
        """The numbers under which the receiver reads the rows."""
        return range(self.place, self.place + len(self.rows))


class Bands:
    """The bands of a network's feature maps.

    Args:
        steps: of one image, over whole feature maps.
        ranks: how many there are.

    Raises:
        InputError: there are more ranks than rows in the lowest feature map, or a convolution that
            cannot be cut into strips.
    """

    def __init__(self, steps: Sequence[StreamStep], ranks: int) -> None:
        self.steps, self.ranks = tuple(steps), ranks
        heights = {steps[0].source.height, *(step.target.height for step in steps)}
        self._lowest = min(heights)
        if ranks > self._lowest:
            raise InputError(
                "more ranks than rows in the smallest feature map",
                where="ranks",
                expected=f"at most {self._lowest}",
                got=ranks,
                hint="use fewer ranks, or a larger image",
            )
        for step in steps:
            if isinstance(step.layer, WholeConv):
                raise InputError(
                    "a convolution of another size, or with a forward of its own, is not computed "
                    "over ranks",
                    where=step.name,
                    hint="call disable_parallel()",
                )
        self._edges = {height: self._edges_in(height) for height in heights}
        self._whole = {steps[0].source, steps[-1].target}

    def _edges_in(self, height: int) -> tuple[int, ...]:
        """The first row of each band, and the number of rows."""
        together = max(
            (_rows_of_unit(step) for step in self.steps if step.target.height == height), default=1
        )
        scale = 2 ** ((height // self._lowest).bit_length() - 1)
        edges = [0]
        for rank in range(1, self.ranks):
            row = scale * (rank * self._lowest // self.ranks)
            edges.append(min(height, round(row / together) * together))
        return (*edges, height)

    def is_whole(self, buffer: FeatureBuffer) -> bool:
        """Whether every rank has a whole feature map: the input, the result, keys and values."""
        return buffer in self._whole or buffer.resident

    def own(self, height: int, rank: int) -> range:
        """The rows that a rank computes of a feature map with ``height`` rows."""
        return range(*self._edges[height][rank : rank + 2])

    def units(self, step: StreamStep, rank: int) -> range:
        """The units that a rank computes in a step over whole feature maps."""
        rows, together = self.own(step.target.height, rank), _rows_of_unit(step)
        return range(rows.start // together, -(-rows.stop // together)) if rows else range(0)

    def needed(self, step: StreamStep, rank: int) -> range:
        """The rows of the source that a rank needs for a step; numbers beyond the edges stand for
        rows that are read again."""
        units, height = self.units(step, rank), step.source.height
        if not units:
            return range(0)
        first, last = step.layer.input_rows(units.start, units.stop)
        beyond = step.layer.rows_beyond(height)
        top, bottom = min(beyond, default=0), max(beyond, default=height - 1)
        return range(max(first, top), min(last, bottom + 1))

    def messages(self, step: StreamStep) -> tuple[Message, ...]:
        """The rows of the source that change hands before a step, in the same order for all."""
        if self.is_whole(step.source):
            return ()
        return tuple(
            message for rank in range(self.ranks) for message in self._messages_to(step, rank)
        )

    def _messages_to(self, step: StreamStep, receiver: int) -> Iterator[Message]:
        height, needed = step.source.height, self.needed(step, receiver)
        own, beyond = self.own(height, receiver), step.layer.rows_beyond(height)
        if own:
            above = range(needed.start, min(own.start, needed.stop))
            missing = [*above, *range(max(own.stop, needed.start), needed.stop)]
        else:
            missing = list(needed)
        last: Message | None = None
        for place in missing:
            row = beyond.get(place, place)
            sender = self._owner(height, row)
            if last and (last.sender, last.rows.stop, last.places.stop) == (sender, row, place):
                last = replace(last, rows=range(last.rows.start, row + 1))
                continue
            if last:
                yield last
            last = Message(sender, receiver, range(row, row + 1), place)
        if last:
            yield last

    def _owner(self, height: int, row: int) -> int:
        return next(rank for rank in range(self.ranks) if row in self.own(height, rank))


def band_steps(bands: Bands, rank: int) -> tuple[StreamStep, ...]:
    """The steps of ``rank``, over buffers for its own rows and those that it needs."""
    kept: dict[FeatureBuffer, range] = {}
    for step in bands.steps:
        for buffer in (*step.inputs, step.target):
            rows = bands.own(buffer.height, rank)
            if buffer is step.source:
                rows = _hull(rows, bands.needed(step, rank))
            kept[buffer] = _hull(kept.get(buffer, range(0)), rows)
    parts = {
        buffer: buffer if bands.is_whole(buffer) else _part(buffer, rows)
        for buffer, rows in kept.items()
    }
    return tuple(_with_buffers(step, parts, bands.units(step, rank)) for step in bands.steps)


def _part(buffer: FeatureBuffer, rows: range) -> FeatureBuffer:
    # at least one row, which an empty band never reads
    return replace(buffer, height=max(1, len(rows)), first_row=rows.start)


def _with_buffers(
    step: StreamStep, parts: dict[FeatureBuffer, FeatureBuffer], units: range
) -> StreamStep:
    changed = replace(
        step,
        source=parts[step.source],
        target=parts[step.target],
        residual=None if step.residual is None else parts[step.residual],
        band=units,
    )
    if isinstance(changed, AttentionStep):
        return replace(changed, keys=parts[changed.keys], values=parts[changed.values])
    return changed


def _rows_of_unit(step: StreamStep) -> int:
    first, last = step.layer.output_rows(0, 1)
    return last - first


def _hull(one: range, other: range) -> range:
    """The shortest range that contains both."""
    if not (one and other):
        return one or other
    return range(min(one.start, other.start), max(one.stop, other.stop))


def strips_of(units: range, most: int) -> list[range]:
    """``units`` in strips of ``most``, the last of which may be shorter."""
    edges = [*range(units.start, units.stop, most), units.stop]
    return [range(first, last) for first, last in pairwise(edges)]
