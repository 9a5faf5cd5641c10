"""The plots of benchmarks, drawn from rows of their files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.bench.parts import PARTS
from scripts.bench.sides import FAST

Row = Mapping[str, Any]
# the sides of `sizes`: column, label, colour
_SIDES = (("channels_last", "diffusers, channels_last", "#888888"), (FAST, FAST, "#3f51b5"))
_COLOURS = ("#3f51b5", "#7e8fd8", "#e07b39", "#5b9a68", "#c9a227", "#bbbbbb")


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of a line through the logarithms: 1 for growth in proportion to the pixels."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


def plot_sizes(rows: Sequence[Row], path: Path) -> None:
    """Seconds and peak memory of a decode over the image's side: the rows of `cpu sizes`."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, ScalarFormatter

    *rows, slopes = rows
    sides = [int(row["size"].partition("x")[0]) for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, unit, words in zip(axes, ("s", "MB"), ("seconds", "peak memory, MB"), strict=True):
        for name, label, colour in _SIDES:
            column = f"{name}, {unit}"
            growth = f"{label}: pixels to the {slopes[column]}"
            values = [row[column] for row in rows]
            axis.loglog(sides, values, "o-", color=colour, label=growth)
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.set_xlabel("side of the image")
        axis.set_title(words, loc="left", fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def plot_parts(rows: Sequence[Row], path: Path) -> None:
    """Where the seconds go, for each work and side: the rows of `cpu parts`."""
    from matplotlib import pyplot

    works = list(dict.fromkeys(row["work"] for row in rows))
    figure, axes = pyplot.subplots(
        len(works), 1, figsize=(9, 0.6 + 1.5 * len(works)), layout="constrained", squeeze=False
    )
    for axis, work in zip(axes[:, 0], works, strict=True):
        own = [row for row in rows if row["work"] == work]
        sides = list(dict.fromkeys(row["side"] for row in own))
        seconds = {(row["side"], row["part"]): row["seconds"] for row in own}
        longest = max(sum(seconds[side, part] for part in PARTS) for side in sides)
        start = dict.fromkeys(sides, 0.0)
        for part, colour in zip(PARTS, _COLOURS, strict=True):
            widths = [seconds[side, part] for side in sides]
            axis.barh(sides, widths, left=list(start.values()), color=colour, label=part)
            for side, width in zip(sides, widths, strict=True):
                if width > 0.05 * longest:
                    middle = start[side] + width / 2
                    ink = "white" if part == PARTS[0] else "black"
                    centre = {"ha": "center", "va": "center", "fontsize": 8}
                    axis.text(middle, side, f"{width:.2g}", color=ink, **centre)
                start[side] += width
        axis.invert_yaxis()
        axis.set_title(f"{work}, seconds", loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
