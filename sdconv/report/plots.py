"""Drawings of what the commands found. They need matplotlib, which is an extra."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import InputError, SdconvError
from sdconv.sizes import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sdconv.analysis.anatomy import Anatomy, Block

PLOT_FORMATS: Mapping[str, str] = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
"""Suffix -> matplotlib's name of the format, for those that can be drawn."""


@dataclass(frozen=True)
class _Labels:
    """The labels of a row: title, input and output."""

    title: str
    source: str
    result: str


_LABELS = {
    "encode": _Labels("Encoder", "image", "latents"),
    "decode": _Labels("Decoder", "latents", "image"),
    "denoise": _Labels("U-Net", "latents", "prediction"),
}


@dataclass(frozen=True)
class _Kind:
    """How one kind of block is drawn and explained."""

    colour: str
    meaning: str


_CONVOLUTION = _Kind("#9cc3e6", "one convolution")
_RESIDUAL = _Kind("#3f77b0", "residual block: convolutions and a shortcut")
_DOWNSAMPLING = _Kind("#e08e45", "downsampling: halves rows and columns")
_UPSAMPLING = _Kind("#6aa84f", "upsampling: doubles rows and columns")
_ATTENTION = _Kind("#b4558d", "attention: every position reads all others")
_DATA = _Kind("#d9d9d9", "input and output")
_KINDS = (_CONVOLUTION, _RESIDUAL, _ATTENTION, _DOWNSAMPLING, _UPSAMPLING, _DATA)

_EXPLAINED = (
    "Above the boxes: rows x columns of the feature map. Receptive field: the pixels (latents in "
    "decoders and U-Nets) across that one\nvalue depends on through convolutions; * global, "
    "through attention. The sides of the boxes are square roots of rows and channels."
)

# y positions in the axes of the boxes; the tallest box is 1 high and centred on 0
_ROWS = (("channels", -0.62), ("kernel", -0.74), ("stride", -0.86), ("rec. field", -0.98))
_TOP, _BOTTOM = 0.66, -1.05


def plot_format(path: Path) -> str:
    """matplotlib's name of the format that a path's suffix asks for.

    Raises:
        InputError: it is none of ``PLOT_FORMATS``. SdconvError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PLOT_FORMATS:
        raise InputError(
            "not a name for a drawing",
            where=path,
            expected="a name that ends in " + ", ".join(PLOT_FORMATS),
            got=path.suffix or "no suffix",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SdconvError(
            "drawing needs matplotlib, which is not installed",
            where="--plot",
            hint="pip install 'sdconv[plot]'",
        ) from error
    return PLOT_FORMATS[path.suffix.lower()]


def draw_anatomy(anatomy: Anatomy, path: Path) -> None:
    """Draw encoder and decoder, or a U-Net, as rows of boxes, with each box's share of the
    MACs below it.

    A box's left side is as high as its input feature map, its right side as its output, and its
    width stands for the channels; all by their square root, so that small ones remain visible.

    Args:
        anatomy: of the network to draw.
        path: a ``.png``, ``.svg`` or ``.pdf``, written whole or not at all.

    Raises:
        InputError: another suffix. SdconvError: no matplotlib. CheckpointError: it cannot be
            written.
    """
    form = plot_format(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    boxes = {name: shown for name in _LABELS if (shown := _shown(anatomy.blocks_of(name)))}
    slots = max(map(len, boxes.values())) + 2
    width, height = max(11.0, 1.2 + 0.68 * slots), 1.9 + 4.7 * len(boxes)
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    rows_of_boxes = figure.add_gridspec(
        len(boxes),
        1,
        left=0.9 / width,
        right=1 - 0.2 / width,
        top=1 - 0.95 / height,
        bottom=1.45 / height,
        hspace=0.2,
    )
    most = max(block.macs for blocks in boxes.values() for block in blocks)
    peak = most / anatomy.macs
    for number, (name, blocks) in enumerate(boxes.items()):
        cells = rows_of_boxes[number].subgridspec(2, 1, height_ratios=[3.2, 1], hspace=0.04)
        _draw_boxes(figure.add_subplot(cells[0]), anatomy, _LABELS[name], blocks, slots)
        _draw_shares(figure.add_subplot(cells[1]), anatomy, blocks, slots, peak)
    rows, columns = anatomy.size
    left = 0.2 / width
    figure.text(
        left,
        1 - 0.4 / height,
        f"{anatomy.class_name} on an image of {rows}x{columns}: "
        f"{count(anatomy.parameters)} parameters, {count(anatomy.macs)} MACs",
        fontsize=15,
        fontweight="bold",
    )
    there = {_DATA, *(_kind(block) for blocks in boxes.values() for block in blocks)}
    kinds = [kind for kind in _KINDS if kind in there]
    figure.legend(
        handles=[Patch(fc=kind.colour, ec="black", lw=0.6, label=kind.meaning) for kind in kinds],
        loc="upper left",
        bbox_to_anchor=(left - 0.1 / width, 1.22 / height),
        ncols=3,
        fontsize=9.5,
        frameon=False,
        borderpad=0,
    )
    figure.text(left, 0.15 / height, f"{_EXPLAINED}\n{_totals(anatomy)}", fontsize=9.5, va="bottom")
    write_whole(path, lambda part: figure.savefig(part, format=form))


def _shown(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that get a box: those other than a lone normalisation or activation."""
    return [
        block
        for block in blocks
        if block.convolutions or _has_attention(block) or block.in_size != block.out_size
    ]


def _has_attention(block: Block) -> bool:
    return any(one.role == "attention" for one in block.operations)


def _kind(block: Block) -> _Kind:
    if block.out_size[0] != block.in_size[0]:
        return _DOWNSAMPLING if block.out_size[0] < block.in_size[0] else _UPSAMPLING
    if _has_attention(block):
        return _ATTENTION
    return _RESIDUAL if len(block.convolutions) > 1 else _CONVOLUTION


def _draw_boxes(
    axes: Axes, anatomy: Anatomy, labels: _Labels, blocks: Sequence[Block], slots: int
) -> None:
    tallest = max(max(block.in_size[0], block.out_size[0]) for block in anatomy.blocks)
    widest = max(max(block.in_channels, block.out_channels) for block in anatomy.blocks)

    def box(slot: int, channels: int, before: int, after: int, kind: _Kind) -> None:
        wide = 0.1 + 0.32 * (channels / widest) ** 0.5
        left, right = ((rows / tallest) ** 0.5 / 2 for rows in (before, after))
        axes.fill(
            [slot - wide, slot - wide, slot + wide, slot + wide],
            [-left, left, right, -right],
            facecolor=kind.colour,
            edgecolor="black",
            linewidth=0.8,
            zorder=2,
        )

    _draw_bands(axes, blocks)
    first, last = blocks[0], blocks[-1]
    box(0, first.in_channels, first.in_size[0], first.in_size[0], _DATA)
    _write(axes, 0, str(first.in_channels), labels.source)
    for slot, block in enumerate(blocks, 1):
        channels = max(block.in_channels, block.out_channels)
        box(slot, channels, block.in_size[0], block.out_size[0], _kind(block))
        _write(axes, slot, *_words(block))
    end = len(blocks) + 1
    box(end, last.out_channels, last.out_size[0], last.out_size[0], _DATA)
    if last.path == "encode" and last.out_channels == 2 * anatomy.latent_channels:
        _write(axes, end, str(last.out_channels), "means and", "variances")
    else:
        _write(axes, end, str(last.out_channels), labels.result)
    for label, y in _ROWS:
        axes.text(-0.62, y, label, fontsize=8.5, color="0.35", ha="right", va="center")
    title = f"{labels.title}: {labels.source} to {labels.result}"
    axes.set_title(title, loc="left", x=0.0, fontsize=12, fontweight="bold", pad=6)
    _plain_axes(axes, slots)
    axes.set_ylim(_BOTTOM, _TOP)
    axes.set_yticks([])


def _draw_bands(axes: Axes, blocks: Sequence[Block]) -> None:
    """Shade the boxes whose feature maps have one size, and write the size above them."""
    changes = [
        (slot, block.in_size)
        for slot, block in enumerate(blocks, 1)
        if block.in_size != block.out_size
    ]
    edges = [-0.5, *(float(slot) for slot, _ in changes), len(blocks) + 1.5]
    sizes = [*(size for _, size in changes), blocks[-1].out_size]
    for number, (size, (left, right)) in enumerate(zip(sizes, pairwise(edges), strict=True)):
        axes.axvspan(left, right, color="0.95" if number % 2 else "0.985", zorder=0)
        axes.text(
            (left + right) / 2, 0.59, f"{size[0]}x{size[1]}", fontsize=10, ha="center", va="center"
        )


def _words(block: Block) -> tuple[str, ...]:
    """Channels, kernel, stride and receptive field, as written under a box."""
    before, after, convolutions = block.in_channels, block.out_channels, block.convolutions
    kernels = Counter(f"{c.kernel[0]}x{c.kernel[1]}" for c in convolutions if c.kernel)
    # the kernel that most have: a block's 1x1 convolution is its shortcut
    (kernel, times) = max(kernels.items(), default=("-", 1))
    stride = max((c.stride[0] for c in convolutions if c.stride), default=None)
    field = block.last.receptive_field
    return (
        str(before) if before == after else f"{before}→{after}",
        {1: "", 2: "two ", 3: "three "}.get(times, f"{times} of ") + kernel,
        "-" if stride is None else str(stride),
        "-" if field is None else f"{field[0]}{'*' if block.last.global_receptive_field else ''}",
    )


def _write(axes: Axes, slot: int, *words: str) -> None:
    """Write the first of ``_ROWS`` under a box."""
    for (_, y), word in zip(_ROWS, words, strict=False):
        axes.text(slot, y, word, fontsize=8.5, ha="center", va="center")


def _draw_shares(
    axes: Axes, anatomy: Anatomy, blocks: Sequence[Block], slots: int, peak: float
) -> None:
    """Draw each box's share of all MACs as a bar below it."""
    for slot, block in enumerate(blocks, 1):
        share = block.macs / anatomy.macs
        axes.bar(slot, share, width=0.7, color=_kind(block).colour, edgecolor="black", lw=0.6)
        axes.text(slot, share + 0.03 * peak, _percent(share), fontsize=8, ha="center", va="bottom")
    axes.text(-0.62, 0.0, "share of\nMACs", fontsize=8.5, color="0.35", ha="right", va="bottom")
    _plain_axes(axes, slots)
    axes.set_ylim(0, 1.25 * peak)
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color("0.6")


def _plain_axes(axes: Axes, slots: int) -> None:
    axes.set_xlim(-0.5, slots - 0.5)
    axes.set_xticks([])
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def _totals(anatomy: Anatomy) -> str:
    totals = anatomy.totals
    macs = ", ".join(f"{t.role} {_percent(t.macs / anatomy.macs)}" for t in totals if t.macs)
    parameters = ", ".join(
        f"{t.role} {_percent(t.parameter_share)}" for t in totals if t.parameters
    )
    return f"MACs: {macs}.  Parameters: {parameters}."
