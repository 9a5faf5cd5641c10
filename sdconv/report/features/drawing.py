"""The network drawn as a U: which box goes where on a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from math import log2

from sdconv.features.points import Point

WHOLE = ("resnet", "attention", "downsample", "upsample")
"""Kinds of modules that are one box together with everything inside them."""

ALONE = ("conv", "norm", "activation")
"""Kinds of modules that are a box where they are not inside such a module."""


class Branch(StrEnum):
    """The part of the U that a box belongs to; ``detached`` boxes are not on the feature maps' path
    through the network."""

    down = "down"
    mid = "mid"
    up = "up"
    detached = "detached"


@dataclass(frozen=True, kw_only=True)
class Box:
    """One box of the drawing.

    Args:
        name: of its module.
        kind: one of ``sdconv.features.hook_points.KINDS``.
        branch: the part of the U.
        level: how many times the feature map has been halved; used on the down and the up path
            only.
    """

    name: str
    kind: str
    branch: Branch
    level: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Boxes on a grid of ``columns`` by ``rows``, each of size 1 by 1.

    Attributes:
        boxes: in the order in which they compute.
        positions: name of a box -> column (may be fractional) and row of its upper left corner.
        skips: names of the two boxes, and how far above its row the line runs; 1 is nearest.
    """

    boxes: tuple[Box, ...]
    positions: Mapping[str, tuple[float, int]]
    skips: tuple[tuple[str, str, int], ...]
    columns: float
    rows: int

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Pairs of boxes where the output of the first is the input of the second."""
        passed = [box.name for box in self.boxes if box.branch is not Branch.detached]
        return tuple(pairwise(passed))


INDENT = 0.6
"""Indentation of each row relative to the row above it, in boxes."""

GAP = 2.0
"""Least distance between the down and the up path, in boxes."""


def block_outputs(points: Iterable[Point]) -> list[str]:
    """Names of the outputs of the drawing's boxes, in order."""
    return [point.name for point in _box_points(list(points))]


def drawing_of(points: Iterable[Point], captured: Iterable[str] = ()) -> Drawing:
    """The drawing of a network.

    Args:
        points: of the network, with their downscale factors.
        captured: names of points that need a box, even a detached one.
    """
    points = list(points)
    boxes = _on_branches(_box_points(points))
    names = [box.name for box in boxes]
    kinds = {point.name: point.kind for point in points}
    detached = dict.fromkeys(name for name in captured if box_of(name, names) is None)
    boxes = [
        Box(name=name, kind=kinds[name], branch=Branch.detached, level=0) for name in detached
    ] + boxes
    skips = [
        (point.skip, point.name.partition(":")[0])
        for point in points
        if point.kind == "skip" and point.skip in names
    ]
    return lay_out(boxes, [(source, target) for source, target in skips if source])


def lay_out(boxes: Sequence[Box], skips: Sequence[tuple[str, str]] = ()) -> Drawing:
    """Place boxes: the down path on the left, the up path on the right, one row for each level, the
    boxes between the two paths below them.

    Args:
        boxes: in the order in which they compute.
        skips: names of the boxes at both ends of each skip connection, innermost first.
    """
    levels = sorted({box.level for box in boxes if box.branch in (Branch.down, Branch.up)})
    rows = [
        tuple(
            [box.name for box in boxes if box.branch is branch and box.level == level]
            for branch in (Branch.down, Branch.up)
        )
        for level in levels
    ]
    detached = [box.name for box in boxes if box.branch is Branch.detached]
    mid = [box.name for box in boxes if box.branch is Branch.mid]
    below = len(detached) + len(mid) + (0.5 if detached and mid else 0)
    widths = [
        len(left) + len(right) + 2 * row * INDENT + (GAP if left and right else 0)
        for row, (left, right) in enumerate(rows)
    ]
    columns = max(*widths, below, 1.0) if widths else max(below, 1.0)
    positions: dict[str, tuple[float, int]] = {}
    for row, (left, right) in enumerate(rows):
        start, end = row * INDENT, columns - row * INDENT - len(right)
        positions |= {name: (start + at, row) for at, name in enumerate(left)}
        positions |= {name: (end + at, row) for at, name in enumerate(right)}
    start = (columns - below) / 2
    positions |= {name: (start + at, len(rows)) for at, name in enumerate(detached)}
    start = (columns + below) / 2 - len(mid)
    positions |= {name: (start + at, len(rows)) for at, name in enumerate(mid)}
    return Drawing(
        boxes=tuple(boxes),
        positions=positions,
        skips=_nested(skips, positions),
        columns=columns,
        rows=len(rows) + bool(below),
    )


def box_of(point: str, boxes: Sequence[str]) -> str | None:
    """The box that contains a point; for the output of a group of boxes, the group's last box."""
    module = point.partition(":")[0]
    around = [box for box in boxes if module == box or module.startswith(box + ".")]
    inside = [box for box in boxes if box.startswith(module + ".")]
    if ":" in point:
        inside = inside[:1]  # the input of a group
    return max(around, key=len) if around else inside[-1] if inside else None


def _box_points(points: Sequence[Point]) -> list[Point]:
    """The points that are the output of a box."""
    outputs = [point for point in points if ":" not in point.name]
    whole = {point.name for point in outputs if point.kind in WHOLE}
    outer = {name for name in whole if not _inside(name, whole)}
    # a time embedding has no feature maps
    closed = outer | {point.name for point in outputs if point.kind == "time"}
    return [
        point
        for point in outputs
        if point.name in outer or (point.kind in ALONE and not _inside(point.name, closed))
    ]


def _inside(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts)))


def _on_branches(points: Sequence[Point]) -> list[Box]:
    """Boxes with branch and level: the down path ends with the last box of the down blocks, the up
    path begins with the first box of the up blocks."""
    names = [point.name for point in points]
    ends = [at for at, name in enumerate(names) if _within(name, "down_blocks", "encoder.layers")]
    starts = [at for at, name in enumerate(names) if _within(name, "up_blocks", "decoder.layers")]
    last, first = max(ends, default=-1), min(starts, default=len(names))
    # a decoder's downscale is relative to the latents: below 1
    levels = list(_levels(points))
    decoder = [at for at, name in enumerate(names) if _within(name, "decoder", "post_quant_conv")]
    others = [levels[at] for at in range(len(names)) if at not in decoder]
    lowest = max(others, default=-min([levels[at] for at in decoder], default=0))
    return [
        Box(
            name=point.name,
            kind=point.kind,
            branch=Branch.down if at <= last else Branch.up if at >= first else Branch.mid,
            level=levels[at] + (lowest if at in decoder else 0),
        )
        for at, point in enumerate(points)
    ]


def _within(name: str, *parts: str) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _levels(points: Sequence[Point]) -> Iterator[int]:
    level = 0
    for point in points:
        if point.downscale is not None:
            level = round(log2(point.downscale[0]))
        yield level


def _nested(
    skips: Sequence[tuple[str, str]], positions: Mapping[str, tuple[float, int]]
) -> tuple[tuple[str, str, int], ...]:
    """Skips with their height: the inner ones nearest to their row, so that no lines cross."""
    over: Counter[int] = Counter()
    lines = []
    for source, target in skips:
        row = positions[target][1]
        over[row] += 1
        lines.append((source, target, over[row]))
    return tuple(lines)
