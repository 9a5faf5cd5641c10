"""Drawing functions and colours shared by the documentation's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image
from torch import Tensor

INPUT, KERNEL, OUTPUT, ZERO = "#dbe9f6", "#d9722b", "#b7dca3", "#e4e4e4"
INK, FAINT = "#222222", "#777777"
_DPI, _QUALITY = 130, 88


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; a page's text is 9 inches wide."""
    matplotlib.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white")


def save(sheet: Figure, path: Path) -> None:
    """Writes a figure as WebP: a tenth of PNG's bytes for photos, and sharp enough for text."""
    canvas = FigureCanvasAgg(sheet)
    canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    Image.fromarray(pixels).save(path, quality=_QUALITY, method=6)


def panel(
    sheet: Figure, left: float, top: float, width: float, height: float | None = None
) -> Axes:
    """Axes without frame and ticks at a position in inches from the figure's top left, square
    without ``height``; both axes have the same scale."""
    wide, high = sheet.get_size_inches()
    height = width if height is None else height
    axes = sheet.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))
    axes.set_axis_off()
    axes.set_aspect("equal")
    return axes


def label(
    sheet: Figure, left: float, top: float, text: str, *, ha: str = "center", **style: object
) -> None:
    """Text on the figure, its upper edge at a position in inches from the top left."""
    wide, high = sheet.get_size_inches()
    options = {"va": "top", "ha": ha, "color": INK, **style}
    sheet.text(left / wide, 1 - top / high, text, **options)


def show(axes: Axes, values: Tensor, spread: float | None = None) -> None:
    """Shows one channel ``(H, W)`` in grey, from its 1st to its 99th percentile, or with ``spread``
    from ``-spread`` to ``spread``; an image ``(3, H, W)`` in [-1, 1] in its colours."""
    values = values.detach().float()
    if values.ndim == 3:
        axes.imshow(((values.clamp(-1, 1) + 1) / 2).permute(1, 2, 0), interpolation="nearest")
    else:
        low, high = (float(values.quantile(q)) for q in (0.01, 0.99))
        if spread is not None:
            low, high = -spread, spread
        axes.imshow(values, cmap="gray", vmin=low, vmax=high, interpolation="nearest")


def box(
    axes: Axes, column: float, row: float, wide: float, high: float, colour: str, **style: object
) -> None:
    """The outline of a rectangle."""
    options = {"fill": False, "edgecolor": colour, "linewidth": 2.2, "zorder": 4, **style}
    axes.add_patch(Rectangle((column, row), wide, high, **options))


def cell(
    axes: Axes, column: float, row: float, colour: str, text: str = "", size: float = 11
) -> None:
    """A square of one unit with text in it."""
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
    axes.text(
        column + 0.5, row + 0.5, text, ha="center", va="center_baseline", fontsize=size, color=INK
    )


def cells(
    axes: Axes, rows: Sequence[Sequence[str]], colour: str, *, left: float = 0, top: float = 0
) -> None:
    """Rows of squares with text in them."""
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            cell(axes, left + j, top + i, colour, text)


def set_extent(axes: Axes, width: float, height: float) -> None:
    """Sets the visible range, with (0, 0) at the top left."""
    axes.set_xlim(-0.1, width + 0.1)
    axes.set_ylim(height + 0.1, -0.1)


def arrow(
    sheet: Figure, start: tuple[float, float], end: tuple[float, float], **style: object
) -> None:
    """An arrow between two positions in inches from the top left."""
    wide, high = sheet.get_size_inches()
    a, b = ((x / wide, 1 - y / high) for x, y in (start, end))
    options = {
        "arrowstyle": "-|>",
        "mutation_scale": 14,
        "color": FAINT,
        "linewidth": 1.4,
        **style,
    }
    sheet.add_artist(
        ConnectionPatch(a, b, coordsA=sheet.transFigure, coordsB=sheet.transFigure, **options)
    )


def distinct_channels(features: Tensor, number: int) -> list[int]:
    """Channels of ``(C, H, W)`` that differ: the one that varies most, then one by one the channel
    least correlated with those chosen; channels that hardly vary are left out."""
    flat = features.flatten(1)
    deviations, order = flat.std(1).sort(descending=True)
    varying = order[: max(number, int((deviations > deviations[0] / 20).sum()))]
    correlations = torch.corrcoef(flat[varying]).abs()
    chosen = [0]
    while len(chosen) < number:
        nearest = correlations[chosen].amax(0)
        nearest[chosen] = 2
        chosen.append(int(nearest.argmin()))
    return [int(varying[index]) for index in chosen]
