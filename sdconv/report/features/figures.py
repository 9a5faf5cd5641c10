"""Captured maps as a figure, and as what a notebook shows of them."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sdconv.errors import InputError, SdconvError
from sdconv.features.maps import Maps
from sdconv.features.patterns import Patterns, chosen
from sdconv.report.features.pictures import (
    Pixels,
    in_colour,
    in_grey,
    principal,
    shrunk,
    statistics,
)
from sdconv.report.features.views import Values, as_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 12
"""Maps in a notebook before "and n more"."""

_SIDE = 256  # of a picture in a figure, in values at most
_ROW = 1.9  # inches


def figure_of(maps: Maps, patterns: Patterns, *, call: int, channels: int) -> Figure:
    """``Maps.plot``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SdconvError(
            "drawing needs matplotlib, which is not installed",
            where="maps.plot",
            hint="pip install 'sdconv[plot]'",
        ) from error
    if channels < 0:
        raise InputError("no number of channels", where="channels", expected="0 or more")
    found = chosen(tuple(maps), patterns)
    names = [name for name in maps if any(name in some for some in found.values())]
    values = {name: as_maps(_of_call(maps, name, call)) for name in names}
    columns = 4 + min(channels, max(map(len, values.values())))
    figure = Figure(figsize=(_ROW * columns, (_ROW + 0.35) * len(names)), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    for axes, (name, one) in zip(grid, values.items(), strict=True):
        _row(list(axes), name, one)
    return figure


def table_of(maps: Maps) -> str:
    """``Maps._repr_html_``: a table of the first few, of each the last call."""
    head = "".join(
        f"<th style='text-align:left'>{words}</th>"
        for words in ("map", "shape", "components", "mean", "deviation")
    )
    rows = [f"<tr>{head}</tr>"]
    for name in list(maps)[:SHOWN]:
        series = maps.series(name)
        tensor = series[-1].tensor
        shape = " \u00d7 ".join(map(str, tensor.shape))
        calls = f"{len(series)} calls of " if len(series) > 1 else ""
        cells = [f"<code>{escape(name)}</code>", f"{calls}{shape}"]
        if tensor.ndim in (3, 4) and tensor.numel():
            small = shrunk(as_maps(tensor), 64)
            planes = in_grey(np.stack([small.mean(0), small.std(0)]))[0]
            cells += map(_inline, (in_colour(principal(small)[0]), *planes))
        rows.append("<tr>{}</tr>".format("".join(f"<td>{cell}</td>" for cell in cells)))
    more = len(maps) - SHOWN
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    return f"<table>{''.join(rows)}</table>{rest}"


def _of_call(maps: Maps, name: str, call: int) -> object:
    series = maps.series(name)
    if not -len(series) <= call < len(series):
        raise InputError(
            "there is no such call",
            where=name,
            expected=f"{-len(series)} to {len(series) - 1}",
            got=call,
        )
    return series[call].tensor


def _row(axes: list[Axes], name: str, maps: Values) -> None:
    """Components, mean, deviation, the channels with the largest variance, histogram."""
    told = statistics(maps)
    maps = shrunk(maps, _SIDE)
    components, _, share = principal(maps)
    axes[0].imshow(in_colour(components), interpolation="nearest")
    axes[0].set_title(f"{name}\ncomponents, {share:.0%} of the variance", fontsize=7, loc="left")
    pictures = [(maps.mean(0), "\nmean"), (maps.std(0), "\nstandard deviation")]
    largest = np.argsort(-told.variance, kind="stable")[: len(axes) - 4]
    pictures += [(maps[channel], f"\nchannel {channel}") for channel in largest]
    for place, (picture, words) in zip(axes[1:], pictures, strict=False):
        place.imshow(picture, interpolation="nearest")
        place.set_title(words, fontsize=7, loc="left")
    for place in axes[:-1]:
        place.set_axis_off()
    high = told.high if told.high > told.low else told.low + 1
    edges = np.linspace(told.low, high, len(told.counts) + 1)
    axes[-1].stairs(np.log10(1 + told.counts), edges, fill=True)
    axes[-1].set_title("\nvalues, log counts", fontsize=7, loc="left")
    axes[-1].set_yticks([])
    axes[-1].tick_params(labelsize=6)


def _inline(pixels: Pixels) -> str:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = b64encode(file.getvalue()).decode("ascii")
    style = "width:64px;image-rendering:pixelated"
    return f"<img alt='' style='{style}' src='data:image/png;base64,{data}'>"
