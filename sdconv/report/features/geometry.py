"""The drawing in numbers: where boxes, lines and words stand on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdconv.report.features.drawing import Arm, Drawing

SIDE = 0.8
"""Of a box; its cell is 1 by 1."""

GAP_BETWEEN_ROWS = 0.42
PER_LINE = 0.13
"""Of height for each line that passes over a row."""

KIND_WORDS: Mapping[str, str] = {
    "conv": "convolution",
    "resnet": "ResNet block",
    "attention": "attention",
    "downsample": "downsampling",
    "upsample": "upsampling",
    "norm": "normalisation",
    "activation": "activation",
}
"""What the legend calls the kinds that it explains."""


def geometry(drawing: Drawing, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What the page draws, in units of a cell.

    Args:
        drawing: which box is where.
        sizes: rows and columns of what comes out of a block, as far as they are known.
    """
    # lines that pass over a row need room above it
    over = [0] * drawing.rows
    for _, target, depth in drawing.skips:
        row = drawing.places[target][1]
        over[row] = max(over[row], depth)
    tops, height = [], 0.0
    for row in range(drawing.rows):
        height += over[row] * PER_LINE + (GAP_BETWEEN_ROWS if row else 0.05)
        tops.append(height)
        height += SIDE
    corners = {name: (column, tops[row]) for name, (column, row) in drawing.places.items()}
    return {
        "columns": round(drawing.columns, 3),
        "height": round(height + 0.12, 3),
        "side": SIDE,
        "corners": corners,
        "lines": [*_steps(drawing, corners), *_skips(drawing, corners)],
        "levels": _levels(drawing, tops, sizes),
    }


def _steps(drawing: Drawing, corners: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """From each block to the next one."""
    lines = []
    for source, target in drawing.steps:
        (x1, y1), (x2, y2) = corners[source], corners[target]
        middle = y1 + SIDE / 2
        if y1 == y2:
            path = f"M{x1 + SIDE:.3f} {middle:.3f}H{x2:.3f}"
        elif y2 > y1:  # down: out below, in from the left or from above
            x = x1 + SIDE / 2
            path = f"M{x:.3f} {y1 + SIDE:.3f}V{(y1 + SIDE + y2) / 2:.3f}"
            path += f"H{x2 + SIDE / 2:.3f}V{y2:.3f}"
        else:
            x = x1 + SIDE / 2
            path = f"M{x:.3f} {y1:.3f}V{(y1 + y2 + SIDE) / 2:.3f}"
            path += f"H{x2 + SIDE / 2:.3f}V{y2 + SIDE:.3f}"
        lines.append({"d": path, "skip": False, "ends": [source, target]})
    return lines


def _skips(drawing: Drawing, corners: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Across, over the row; outer ones higher, so that no two of them cross."""
    lines = []
    for source, target, depth in drawing.skips:
        (x1, y1), (x2, y2) = corners[source], corners[target]
        y = min(y1, y2) - depth * PER_LINE
        path = f"M{x1 + SIDE / 2:.3f} {y1:.3f}V{y:.3f}H{x2 + SIDE / 2:.3f}V{y2:.3f}"
        lines.append({"d": path, "skip": True, "ends": [source, target]})
    return lines


def _levels(
    drawing: Drawing, tops: list[float], sizes: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Rows and columns of each level's maps, where the drawing leaves most room."""
    found = []
    for row, top in enumerate(tops):
        blocks = [block for block in drawing.path if drawing.places[block.name][1] == row]
        # the last: a level's first block may still be of another size
        known = [sizes[block.name] for block in blocks if block.name in sizes]
        if not known or blocks[-1].arm in (Arm.base, Arm.aside):
            continue
        columns = sorted(drawing.places[block.name][0] for block in blocks)
        edges = [-0.2, *(edge for c in columns for edge in (c, c + SIDE)), drawing.columns]
        rooms = list(zip(edges[::2], edges[1::2], strict=True))
        left, right = max(rooms, key=lambda room: room[1] - room[0])
        if right - left < 1.3:
            continue
        common = max(set(known), key=known.count)
        found.append(
            {
                "x": round((left + right) / 2, 3),
                "y": round(top + SIDE / 2, 3),
                "words": f"{common[0]} \u00d7 {common[1]}",
            }
        )
    return found
