"""Pictures of convolutions on a few numbers, before any network."""

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
    label,
    panel,
    set_extent,
    show,
)
from sdconv.convolution.geometry import ReceptiveField, output_size
from sdconv.convolution.reference import conv2d_reference, convolve, same_padding

KERNELS = {
    "blur": torch.full((5, 5), 1 / 25),
    "vertical edges": torch.tensor([[-1.0, 0, 1]] * 3),
    "horizontal edges": torch.tensor([[-1.0, 0, 1]] * 3).T,
}


def two_lists() -> Figure:
    """The sum of `convolve`, term by term, with the second list reversed under the first."""
    a, b = [1, 2, 3], [0, 1, 10]
    sheet = figure(9, 4.6)
    reach = len(b) - 1
    label(sheet, 0.35, 0.05, "the first list, and below it the second, reversed", ha="left")
    for n, total in enumerate(convolve(a, b)):
        top = 0.4 + n * 0.84
        axes = panel(sheet, 1.5, top, 3.0, 0.82)
        for m, value in enumerate(a):
            cell(axes, reach + m, 0, INPUT, str(value), 10)
        for k, value in enumerate(b):
            cell(axes, reach + n - k, 1, "#f3c9a6", str(value), 10)
        set_extent(axes, len(a) + 2 * reach, 2)
        label(sheet, 0.7, top + 0.27, f"n = {n}", va="center")
        overlap = [m for m in range(len(a)) if 0 <= n - m < len(b)]
        terms = " + ".join(f"{a[m]}·{b[n - m]}" for m in overlap)
        label(sheet, 4.9, top + 0.27, f"{terms}  =  {total}", ha="left", va="center", fontsize=12)
    return sheet


def kernels(photo: Tensor) -> Figure:
    """A crop of the photo ``(3, H, W)`` convolved with three small kernels."""
    grey = photo.mean(0)[4:116, 54:166]
    sheet = figure(9, 3.95)
    side = 2.0
    show(panel(sheet, 0.1, 0.4, side), grey)
    label(sheet, 0.1 + side / 2, 0.1, "a crop of the photo, in grey")
    for column, (name, kernel) in enumerate(KERNELS.items(), 1):
        left = 0.1 + column * 2.26
        output = conv2d_reference(grey[None, None], kernel[None, None])[0, 0]
        spread = None if name == "blur" else 1.6
        show(panel(sheet, left, 0.4, side), output, spread)
        label(sheet, left + side / 2, 0.1, name)
        size = len(kernel)
        axes = panel(sheet, left + 0.4, 2.6, 1.2)
        text = [
            ["" if name == "blur" else f"{int(value)}" for value in row] for row in kernel.tolist()
        ]
        cells(axes, text, "#f3c9a6")
        set_extent(axes, size, size)
    label(sheet, 0.1 + side / 2, 2.75, "the kernels:\n\nevery weight of the\nblur is 1/25")
    return sheet


def neuron(photo: Tensor, weight: Tensor, bias: Tensor, channel: int) -> Figure:
    """One output of the VAE's first layer: three input channels, the three slices of a kernel, and
    one number.

    Args:
        photo: ``(3, H, W)``.
        weight, bias: the layer's, ``(C, 3, 3, 3)`` and ``(C,)``.
        channel: the output channel.
    """
    top, left, side = 28, 20, 28  # a star of the flag, in pixels
    row, column = 10, 17  # of the window in that crop
    crop = photo[:, top : top + side, left : left + side]
    features = conv2d_reference(photo[None], weight, bias, padding="same")[0, channel]
    output = features[top : top + side, left : left + side]
    sheet = figure(9, 4.3)
    spread = float(weight[channel].abs().max())
    for index, name in enumerate(("red", "green", "blue")):
        at = 0.2 + index * 1.75
        axes = panel(sheet, at, 0.4, 1.55)
        axes.imshow(crop[index], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        box(axes, column - 0.5, row - 0.5, 3, 3, KERNEL)
        label(sheet, at + 0.775, 0.1, f"{name}, x[·,·,{index}]")
        axes = panel(sheet, at + 0.3, 2.6, 0.95)
        axes.imshow(weight[channel, index], cmap="RdBu_r", vmin=-spread, vmax=spread)
        box(axes, -0.5, -0.5, 3, 3, KERNEL, clip_on=False)
        label(sheet, at + 0.775, 3.6, f"w[·,·,{index},k]")
        arrow(sheet, (at + 0.775, 2.0), (at + 0.775, 2.55))
    axes = panel(sheet, 7.15, 0.4, 1.55)
    show(axes, output)
    box(axes, column + 0.5, row + 0.5, 1, 1, KERNEL)
    label(sheet, 7.92, 0.1, "feature map, z[·,·,k]")
    label(sheet, 5.55, 3.0, "sum of 27\nproducts,\nplus b[k]", ha="left", va="center")
    arrow(sheet, (6.75, 2.8), (7.9, 2.05))
    label(
        sheet,
        0.2,
        3.97,
        "Slices of the kernel: red is positive, blue negative, white zero.",
        ha="left",
        fontsize=10,
        color=FAINT,
    )
    return sheet


def stride() -> Figure:
    """A 3x3 kernel over 7x7 numbers, with stride 1 and with stride 2."""
    size, kernel = 7, 3
    sheet = figure(9, 3.1)
    for half, stride in enumerate((1, 2)):
        left, outputs = half * 4.6, output_size(size, kernel, stride)
        axes = panel(sheet, left + 0.1, 0.4, 2.3)
        cells(axes, [[""] * size] * size, INPUT)
        for i in range(outputs):
            for j in range(outputs):
                axes.plot(j * stride + 1.5, i * stride + 1.5, ".", color=KERNEL, markersize=7)
        box(axes, 0.05, 0.05, kernel - 0.1, kernel - 0.1, KERNEL)
        box(axes, stride + 0.05, 0.05, kernel - 0.1, kernel - 0.1, KERNEL, linestyle=":")
        set_extent(axes, size, size)
        high = 2.3 * outputs / size
        axes = panel(sheet, left + 2.8, 0.4 + (2.3 - high) / 2, high)
        cells(axes, [[""] * outputs] * outputs, OUTPUT)
        set_extent(axes, outputs, outputs)
        arrow(sheet, (left + 2.42, 1.55), (left + 2.8, 1.55))
        label(sheet, left + 1.25, 0.08, f"stride {stride}: {size} x {size} in")
        label(sheet, left + 2.8 + high / 2, 0.08, f"{outputs} x {outputs} out")
    label(
        sheet,
        0.1,
        2.82,
        "Dots: positions of the kernel's centre. Solid and dotted: its first two positions.",
        ha="left",
        fontsize=10,
        color=FAINT,
    )
    return sheet


def padding() -> Figure:
    """A row of eight numbers with its padding, and the positions of a kernel of three."""
    size, kernel = 8, 3
    rows = (
        ("valid\nstride 1", 1, (0, 0), ""),
        ("same\nstride 1", 1, same_padding(size, kernel, 1), "torch's padding=1"),
        ("valid\nstride 2", 2, (0, 0), "the last number is not used"),
        ("TensorFlow's same\nstride 2", 2, same_padding(size, kernel, 2), "the VAE's downsampling"),
        ("padding 1\nstride 2", 2, (1, 1), "the U-Net's downsampling"),
    )
    high = 1.22
    sheet = figure(9, 0.05 + high * len(rows))
    for number, (name, stride, (before, after), remark) in enumerate(rows):
        outputs = output_size(size, kernel, stride, (before, after))
        axes = panel(sheet, 2.1, 0.05 + number * high, 3.9, 1.12)
        for j in range(-before, size + after):
            inside = 0 <= j < size
            cell(axes, j + 1, 0, INPUT if inside else ZERO, "" if inside else "0", 11)
        for output in range(outputs):
            start = output * stride - before + 1
            centre = start + kernel / 2
            drop = 1.2 + 0.22 * (output % 3)
            axes.plot([start + 0.1, start + kernel - 0.1], [drop] * 2, color=KERNEL, linewidth=2)
            axes.plot([centre] * 2, [drop, 2.05], color=KERNEL, linewidth=0.8)
            cell(axes, centre - 0.5, 1.95, OUTPUT)
        set_extent(axes, size + 2, 3.0)
        label(sheet, 0.1, 0.18 + number * high, name, ha="left")
        label(sheet, 6.25, 0.18 + number * high, f"{size} in, {outputs} out\n{remark}", ha="left")
    return sheet


def receptive_chain() -> Figure:
    """Three convolutions over one row, and the receptive field of one number at the end."""
    layers = ((3, 1, "3 wide, stride 1"), (3, 2, "3 wide, stride 2"), (3, 1, "3 wide, stride 1"))
    fields, widths = [ReceptiveField()], [17]
    for kernel, stride, _ in layers:
        before = (kernel - 1) // 2
        fields.append(fields[-1].through(kernel, stride, (before, before)))
        widths.append(output_size(widths[-1], kernel, stride, (before, before)))
    sheet = figure(9, 3.6)
    axes = panel(sheet, 1.7, 0.1, 5.9, 3.4)
    axes.set_aspect("auto")
    axes.set_xlim(-0.6, widths[0] - 0.4)
    axes.set_ylim(-0.4, len(layers) + 0.4)
    field = {widths[-1] // 2}
    for level in range(len(layers), -1, -1):
        step = fields[level].period
        for position in range(widths[level]):
            colour = KERNEL if position in field else "#c9d8e8"
            axes.plot(position * step, level, "o", color=colour, markersize=11)
        text = "input" if level == 0 else layers[level - 1][2]
        axes.text(-1.0, level, text, ha="right", va="center")
        text = f"receptive\nfield {fields[level].size}" if level else ""
        axes.text(widths[0], level, text, ha="left", va="center")
        if level:
            kernel, stride, _ = layers[level - 1]
            below: set[int] = set()
            for position in field:
                start = position * stride - (kernel - 1) // 2
                for one in range(start, start + kernel):
                    ends = [one * fields[level - 1].period, position * step]
                    axes.plot(ends, [level - 1, level], color=KERNEL, linewidth=1, zorder=0)
                    below.add(one)
            field = below
    return sheet
