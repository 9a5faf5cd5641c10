"""The network drawn as the U that it is: which box stands where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Arm(StrEnum):
    """On which side of the U a block stands; ``aside`` of it are those that no map passes."""

    down = "down"
    base = "base"
    up = "up"
    aside = "aside"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One box.

    Args:
        name: the module's.
        kind: of ``sdconv.features.places.KINDS``.
        arm: its side.
        level: how many times the map was halved before it came out; not used below the arms.
    """

    name: str
    kind: str
    arm: Arm
    level: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Boxes on a grid of ``columns`` by ``rows``, each one by one.

    ``path``: the blocks in the order in which they compute. ``places``: a block's name -> column
    (may be between two) and row of its left upper corner. ``skips``: pairs of names, and how far
    over its row the line passes, 1 being nearest.
    """

    path: tuple[Block, ...]
    places: Mapping[str, tuple[float, int]]
    skips: tuple[tuple[str, str, int], ...]
    columns: float
    rows: int

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Blocks of which one's output is the next one's input."""
        passed = [block.name for block in self.path if block.arm is not Arm.aside]
        return tuple(pairwise(passed))


INDENT = 0.6
"""Of each row against the one above it, in boxes."""

GAP = 2.0
"""Between the arms, at least."""


def drawn(path: Sequence[Block], skips: Sequence[tuple[str, str]] = ()) -> Drawing:
    """Where each block stands: the way down on the left, the way up on the right, one row for each
    level, what is between them below.

    Args:
        path: in the order in which they compute.
        skips: names of blocks of which the first hands its output across to the second, in the
            order in which they are taken: the last that was kept first.
    """
    levels = sorted({block.level for block in path if block.arm in (Arm.down, Arm.up)})
    rows = [
        tuple([b.name for b in path if b.arm is arm and b.level == level] for arm in _ARMS)
        for level in levels
    ]
    aside = [block.name for block in path if block.arm is Arm.aside]
    base = [block.name for block in path if block.arm is Arm.base]
    below = len(aside) + len(base) + (0.5 if aside and base else 0)
    widths = [
        len(left) + len(right) + 2 * row * INDENT + (GAP if left and right else 0)
        for row, (left, right) in enumerate(rows)
    ]
    columns = max(*widths, below, 1.0) if widths else max(below, 1.0)
    places: dict[str, tuple[float, int]] = {}
    for row, (left, right) in enumerate(rows):
        start, end = row * INDENT, columns - row * INDENT - len(right)
        places |= {name: (start + at, row) for at, name in enumerate(left)}
        places |= {name: (end + at, row) for at, name in enumerate(right)}
    start = (columns - below) / 2
    places |= {name: (start + at, len(rows)) for at, name in enumerate(aside)}
    start = (columns + below) / 2 - len(base)
    places |= {name: (start + at, len(rows)) for at, name in enumerate(base)}
    return Drawing(
        path=tuple(path),
        places=places,
        skips=_nested(skips, places),
        columns=columns,
        rows=len(rows) + bool(below),
    )


_ARMS = (Arm.down, Arm.up)


def _nested(
    skips: Sequence[tuple[str, str]], places: Mapping[str, tuple[float, int]]
) -> tuple[tuple[str, str, int], ...]:
    """The inner ones nearest to their row, so that no two lines cross."""
    over: Counter[int] = Counter()
    lines = []
    for source, target in skips:
        row = places[target][1]
        over[row] += 1
        lines.append((source, target, over[row]))
    return tuple(lines)
