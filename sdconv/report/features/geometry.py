"""Coordinates of the drawing: boxes, lines and labels on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdconv.report.features.drawing import Branch, Drawing

SIDE = 0.8
"""Side of a box; its cell is 1 by 1."""

GAP_BETWEEN_ROWS = 0.42
PER_LINE = 0.13
"""Height for each line that passes over a row."""

KIND_WORDS: Mapping[str, str] = {
    "conv": "convolution",
    "resnet": "ResNet block",
    "attention": "attention",
    "downsample": "downsampling",
    "upsample": "upsampling",
    "norm": "normalisation",
    "activation": "activation",
}
"""The legend's words for the kinds that it explains."""


def geometry(drawing: Drawing, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The coordinates that the page draws, in units of a cell.

    Args:
        drawing: the boxes on their grid.
        sizes: rows and columns of the outputs of boxes, as far as they are known.
    """
    # lines that pass over a row need room above it
    over = [0] * drawing.rows
    for _, target, depth in drawing.skips:
        row = drawing.positions[target][1]
        over[row] = max(over[row], depth)
    tops, height = [], 0.0
    for row in range(drawing.rows):
        height += over[row] * PER_LINE + (GAP_BETWEEN_ROWS if row else 0.05)
        tops.append(height)
        height += SIDE
    corners = {name: (column, tops[row]) for name, (column, row) in drawing.positions.items()}
    return {
        "columns": round(drawing.columns, 3),
        "height": round(height + 0.12, 3),
        "side": SIDE,
        "corners": corners,
        "lines": [*_edges(drawing, corners), *_skips(drawing, corners)],
        "levels": _levels(drawing, tops, sizes),
    }


def _edges(drawing: Drawing, corners: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Lines from each box to the next one."""
    lines = []
    for source, target in drawing.edges:
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
    """Lines above the row; outer ones are higher, so that no two cross."""
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
    """Labels with the rows and columns of each level, where the row has most room."""
    found = []
    for row, top in enumerate(tops):
        boxes = [box for box in drawing.boxes if drawing.positions[box.name][1] == row]
        # the last one decides: the first box of a level may still have another size
        known = [sizes[box.name] for box in boxes if box.name in sizes]
        if not known or boxes[-1].branch in (Branch.mid, Branch.detached):
            continue
        columns = sorted(drawing.positions[box.name][0] for box in boxes)
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
