"""The plot of `cpu sizes`, and the slopes in it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from scripts.bench.sides import FAST


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of a line through the logarithms: 1 for growth in proportion to the pixels."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


def plot(rows: list[tuple[int, dict[str, Any]]], slopes: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, unit, words in zip(axes, ("s", "MB"), ("seconds", "peak memory, MB"), strict=True):
        for name, label, colour in (
            ("channels_last", "diffusers, channels_last", "#888888"),
            (FAST, FAST, "#3f51b5"),
        ):
            column = f"{name}, {unit}"
            axis.loglog(
                [side for side, _ in rows],
                [row[column] for _, row in rows],
                "o-",
                color=colour,
                label=f"{label}: pixels to the {slopes[column]}",
            )
        axis.set_xticks([side for side, _ in rows], [str(side) for side, _ in rows])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.set_xlabel("side of the image")
        axis.set_title(words, loc="left", fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
