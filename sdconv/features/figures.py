"""Captured feature maps as a matplotlib figure, and as the table that a notebook shows."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.features.rendering import (
    Pixels,
    Values,
    as_maps,
    colour_scale,
    downscaled,
    drawable,
    principal_components,
    statistics,
    to_grey,
    to_rgb,
    unit_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Size = tuple[int, int] | None
"""Rows and columns of the network's input, or of a level above; None if they are not known."""

_SIDE = 256  # rows and columns of an image in a figure, at most
_ROW = 1.9  # inches


def figure_of(found: Mapping[str, tuple[Tensor, Size]], channels: int) -> Figure:
    """The figure of ``Maps.plot``.

    Args:
        found: feature maps by name, each with the size by which tokens are laid out.
        channels: the number of channels to show of each.

    Raises:
        InputError: a negative number of channels, or a value that is not a feature map.
        SdconvError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SdconvError(
            "drawing needs matplotlib, which is not installed",
            where="maps.plot",
            hint="pip install 'sdconv[plot]'",
        ) from error
    if channels < 0:
        raise InputError("not a number of channels", where="channels", expected="0 or more")
    values = {name: as_maps(drawable(name, tensor), size) for name, (tensor, size) in found.items()}
    columns = 4 + min(channels, max(map(len, values.values())))
    figure = Figure(figsize=(_ROW * columns, (_ROW + 0.6) * len(values)), layout="constrained")
    grid = figure.subplots(len(values), columns, squeeze=False)
    for axes, (name, maps) in zip(grid, values.items(), strict=True):
        _draw_row(list(axes), name, maps)
    # IPython shows other figures only once pyplot has been imported
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def html_table(rows: Sequence[tuple[str, int, Tensor, Size]], more: int) -> str:
    """The HTML table that a notebook shows of ``Maps``.

    Args:
        rows: name, number of calls, last feature map, and the size by which tokens are laid out.
        more: the number of names that are not shown.
    """
    head = "".join(
        f"<th style='text-align:left'>{words}</th>"
        for words in ("layer", "shape", "principal components", "mean", "standard deviation")
    )
    lines = [f"<tr>{head}</tr>"]
    for name, count, tensor, size in rows:
        shape = " \u00d7 ".join(map(str, tensor.shape))
        calls = f"{count} calls of " if count > 1 else ""
        cells = [f"<code>{escape(name)}</code>", f"{calls}{shape}"]
        if tensor.ndim in (3, 4) and tensor.numel():
            small = downscaled(as_maps(drawable(name, tensor), size), 64)
            planes = to_grey(np.stack([small.mean(0), small.std(0)]))[0]
            cells += map(_inline, (to_rgb(principal_components(small)[0]), *planes))
        lines.append("<tr>{}</tr>".format("".join(f"<td>{cell}</td>" for cell in cells)))
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    return f"<table>{''.join(lines)}</table>{rest}"


def _draw_row(axes: list[Axes], name: str, maps: Values) -> None:
    """Components, mean, standard deviation, the channels with the largest variance, histogram."""
    found = statistics(maps)
    maps = downscaled(maps, _SIDE)
    components, _, share = principal_components(maps)
    axes[0].imshow(to_rgb(components), interpolation="nearest")
    title = f"{name}\nprincipal components, {share:.0%}"
    axes[0].set_title(title, fontsize=7, loc="left")
    images = [(maps.mean(0), "\nmean"), (maps.std(0), "\nstandard deviation")]
    largest = np.argsort(-found.variance, kind="stable")[: len(axes) - 4]
    images += [(maps[channel], f"\n{unit_of(name)} {channel}") for channel in largest]
    for one, (image, words) in zip(axes[1:], images, strict=False):
        _draw_scaled(one, image)
        one.set_title(words, fontsize=7, loc="left")
    for one in axes[:-1]:
        one.set_axis_off()
    high = found.high if found.high > found.low else found.low + 1
    edges = np.linspace(found.low, high, len(found.counts) + 1)
    axes[-1].stairs(np.log10(1 + found.counts), edges, fill=True)
    axes[-1].set_title("\nhistogram, log counts", fontsize=7, loc="left")
    axes[-1].set_yticks([])
    axes[-1].tick_params(labelsize=6)
    axes[-1].locator_params(axis="x", nbins=4)  # numbers of thousands fit next to each other


def _draw_scaled(axes: Axes, image: Values) -> None:
    """One image with a colour bar, whose pointed ends say where values are clipped."""
    scale = colour_scale(image)
    high = scale.high if scale.high > scale.low else scale.low + 1
    shown = axes.imshow(
        image,
        cmap="RdBu_r" if scale.diverging else "viridis",
        vmin=scale.low,
        vmax=high,
        interpolation="nearest",
    )
    bar = axes.figure.colorbar(
        shown, ax=axes, location="bottom", extend=scale.extend, aspect=22, pad=0.03
    )
    middle = (scale.low + high) / 2
    bar.set_ticks([scale.low, middle, high], labels=[f"{x:.3g}" for x in (scale.low, middle, high)])
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _inline(pixels: Pixels) -> str:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = b64encode(file.getvalue()).decode("ascii")
    style = "width:64px;image-rendering:pixelated"
    return f"<img alt='' style='{style}' src='data:image/png;base64,{data}'>"
