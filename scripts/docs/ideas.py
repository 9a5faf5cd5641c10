"""Pictures of the ideas: what a convolution does to a few numbers, before any network."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from scripts.docs.drawing import (
    FAINT,
    INPUT,
    KERNEL,
    OUTPUT,
    ZERO,
    arrow,
    box,
    cell,
    cells,
    figure,
    panel,
    show,
    span,
    words,
)
from sdconv.convolution.geometry import ReceptiveField, output_size
from sdconv.convolution.reference import conv2d_reference, convolve, same_padding

KERNELS = {
    "blur": torch.full((5, 5), 1 / 25),
    "upright edges": torch.tensor([[-1.0, 0, 1]] * 3),
    "level edges": torch.tensor([[-1.0, 0, 1]] * 3).T,
}


def two_lists() -> Figure:
    """The sum of `convolve`, term by term: the second list runs backwards under the first."""
    a, b = [1, 2, 3], [0, 1, 10]
    sheet = figure(9, 4.6)
    reach = len(b) - 1
    words(sheet, 0.35, 0.05, "the first list, and below it the second, turned round", ha="left")
    for n, total in enumerate(convolve(a, b)):
        top = 0.4 + n * 0.84
        axes = panel(sheet, 1.5, top, 3.0, 0.82)
        for m, value in enumerate(a):
            cell(axes, reach + m, 0, INPUT, str(value), 10)
        for k, value in enumerate(b):
            cell(axes, reach + n - k, 1, "#f3c9a6", str(value), 10)
        span(axes, len(a) + 2 * reach, 2)
        words(sheet, 0.7, top + 0.27, f"n = {n}", va="center")
        met = [m for m in range(len(a)) if 0 <= n - m < len(b)]
        terms = " + ".join(f"{a[m]}·{b[n - m]}" for m in met)
        words(sheet, 4.9, top + 0.27, f"{terms}  =  {total}", ha="left", va="center", fontsize=12)
    return sheet


def kernels(photo: Tensor) -> Figure:
    """Three small kernels over a part of the photo, ``(3, H, W)``."""
    grey = photo.mean(0)[4:116, 54:166]
    sheet = figure(9, 3.95)
    side = 2.0
    show(panel(sheet, 0.1, 0.4, side), grey)
    words(sheet, 0.1 + side / 2, 0.1, "part of the photo, in grey")
    for place, (name, kernel) in enumerate(KERNELS.items(), 1):
        left = 0.1 + place * 2.26
        found = conv2d_reference(grey[None, None], kernel[None, None])[0, 0]
        spread = None if name == "blur" else 1.6
        show(panel(sheet, left, 0.4, side), found, spread)
        words(sheet, left + side / 2, 0.1, name)
        size = len(kernel)
        axes = panel(sheet, left + 0.4, 2.6, 1.2)
        text = [
            ["" if name == "blur" else f"{int(value)}" for value in row] for row in kernel.tolist()
        ]
        cells(axes, text, "#f3c9a6")
        span(axes, size, size)
    words(sheet, 0.1 + side / 2, 2.75, "the kernels:\n\nin the first, every\nweight is 1/25")
    return sheet


def neuron(photo: Tensor, weight: Tensor, bias: Tensor, channel: int) -> Figure:
    """One neuron of the VAE's first layer: three channels under one window, three slices of one
    kernel, one number.

    Args:
        photo: ``(3, H, W)``. weight, bias: of the layer, ``(C, 3, 3, 3)`` and ``(C,)``.
        channel: the feature map that is drawn.
    """
    top, left, side = 28, 20, 28  # a star of the flag, in pixels
    row, column = 10, 17  # of the window in that
    crop = photo[:, top : top + side, left : left + side]
    maps = conv2d_reference(photo[None], weight, bias, padding="same")[0, channel]
    found = maps[top : top + side, left : left + side]
    sheet = figure(9, 4.3)
    spread = float(weight[channel].abs().max())
    for place, name in enumerate(("red", "green", "blue")):
        at = 0.2 + place * 1.75
        axes = panel(sheet, at, 0.4, 1.55)
        axes.imshow(crop[place], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        box(axes, column - 0.5, row - 0.5, 3, 3, KERNEL)
        words(sheet, at + 0.775, 0.1, f"{name}, x[·,·,{place}]")
        axes = panel(sheet, at + 0.3, 2.6, 0.95)
        axes.imshow(weight[channel, place], cmap="RdBu_r", vmin=-spread, vmax=spread)
        box(axes, -0.5, -0.5, 3, 3, KERNEL, clip_on=False)
        words(sheet, at + 0.775, 3.6, f"w[·,·,{place},k]")
        arrow(sheet, (at + 0.775, 2.0), (at + 0.775, 2.55))
    axes = panel(sheet, 7.15, 0.4, 1.55)
    show(axes, found)
    box(axes, column + 0.5, row + 0.5, 1, 1, KERNEL)
    words(sheet, 7.92, 0.1, "feature map, z[·,·,k]")
    words(sheet, 5.55, 3.0, "weigh and add\n27 products,\nadd b[k]", ha="left", va="center")
    arrow(sheet, (6.75, 2.8), (7.9, 2.05))
    words(
        sheet,
        0.2,
        3.97,
        "Slices of the kernel: red weighs positively, blue negatively, white is zero.",
        ha="left",
        fontsize=10,
        color=FAINT,
    )
    return sheet


def stride() -> Figure:
    """A 3x3 kernel over 7x7 numbers, with a step of one and of two."""
    size, kernel = 7, 3
    sheet = figure(9, 3.1)
    for half, step in enumerate((1, 2)):
        left, places = half * 4.6, output_size(size, kernel, step)
        axes = panel(sheet, left + 0.1, 0.4, 2.3)
        cells(axes, [[""] * size] * size, INPUT)
        for i in range(places):
            for j in range(places):
                axes.plot(j * step + 1.5, i * step + 1.5, ".", color=KERNEL, markersize=7)
        box(axes, 0.05, 0.05, kernel - 0.1, kernel - 0.1, KERNEL)
        box(axes, step + 0.05, 0.05, kernel - 0.1, kernel - 0.1, KERNEL, linestyle=":")
        span(axes, size, size)
        high = 2.3 * places / size
        axes = panel(sheet, left + 2.8, 0.4 + (2.3 - high) / 2, high)
        cells(axes, [[""] * places] * places, OUTPUT)
        span(axes, places, places)
        arrow(sheet, (left + 2.42, 1.55), (left + 2.8, 1.55))
        words(sheet, left + 1.25, 0.08, f"stride {step}: {size} x {size} in")
        words(sheet, left + 2.8 + high / 2, 0.08, f"{places} x {places} out")
    words(
        sheet,
        0.1,
        2.82,
        "Dots: where the middle of the kernel comes to stand. Solid and dotted: its first two"
        " places.",
        ha="left",
        fontsize=10,
        color=FAINT,
    )
    return sheet


def padding() -> Figure:
    """One row of eight numbers: which zeros are put beside it, and where the kernel stands."""
    size, kernel = 8, 3
    rows = (
        ("valid\nstride 1", 1, (0, 0), ""),
        ("same\nstride 1", 1, same_padding(size, kernel, 1), "as torch's padding=1"),
        ("valid\nstride 2", 2, (0, 0), "the last number is never seen"),
        ("TensorFlow's same\nstride 2", 2, same_padding(size, kernel, 2), "the VAE's halving"),
        ("padding 1\nstride 2", 2, (1, 1), "the U-Net's halving"),
    )
    high = 1.22
    sheet = figure(9, 0.05 + high * len(rows))
    for number, (name, step, (before, after), remark) in enumerate(rows):
        places = output_size(size, kernel, step, (before, after))
        axes = panel(sheet, 2.1, 0.05 + number * high, 3.9, 1.12)
        for j in range(-before, size + after):
            inside = 0 <= j < size
            cell(axes, j + 1, 0, INPUT if inside else ZERO, "" if inside else "0", 11)
        for place in range(places):
            start = place * step - before + 1
            middle = start + kernel / 2
            drop = 1.2 + 0.22 * (place % 3)
            axes.plot([start + 0.1, start + kernel - 0.1], [drop] * 2, color=KERNEL, linewidth=2)
            axes.plot([middle] * 2, [drop, 2.05], color=KERNEL, linewidth=0.8)
            cell(axes, middle - 0.5, 1.95, OUTPUT)
        span(axes, size + 2, 3.0)
        words(sheet, 0.1, 0.18 + number * high, name, ha="left")
        words(sheet, 6.25, 0.18 + number * high, f"{size} in, {places} out\n{remark}", ha="left")
    return sheet


def receptive_chain() -> Figure:
    """Three convolutions over one row: what a single number at the end has seen."""
    layers = ((3, 1, "3 wide, stride 1"), (3, 2, "3 wide, stride 2"), (3, 1, "3 wide, stride 1"))
    fields, widths = [ReceptiveField()], [17]
    for kernel, step, _ in layers:
        before = (kernel - 1) // 2
        fields.append(fields[-1].through(kernel, step, (before, before)))
        widths.append(output_size(widths[-1], kernel, step, (before, before)))
    sheet = figure(9, 3.6)
    axes = panel(sheet, 1.7, 0.1, 5.9, 3.4)
    axes.set_aspect("auto")
    axes.set_xlim(-0.6, widths[0] - 0.4)
    axes.set_ylim(-0.4, len(layers) + 0.4)
    seen = {widths[-1] // 2}
    for level in range(len(layers), -1, -1):
        step = fields[level].period
        for place in range(widths[level]):
            colour = KERNEL if place in seen else "#c9d8e8"
            axes.plot(place * step, level, "o", color=colour, markersize=11)
        text = "input" if level == 0 else layers[level - 1][2]
        axes.text(-1.0, level, text, ha="right", va="center")
        span_text = f"sees {fields[level].size}" if level else ""
        axes.text(widths[0], level, span_text, ha="left", va="center")
        if level:
            kernel, by, _ = layers[level - 1]
            below: set[int] = set()
            for place in seen:
                start = place * by - (kernel - 1) // 2
                for one in range(start, start + kernel):
                    ends = [one * fields[level - 1].period, place * step]
                    axes.plot(ends, [level - 1, level], color=KERNEL, linewidth=1, zorder=0)
                    below.add(one)
            seen = below
    return sheet
