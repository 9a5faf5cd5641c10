"""The difference of two checkpoints, as a table and as a drawing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdconv.analysis.diff import BlockDifference, Comparison, TensorDifference, block_of
from sdconv.checkpoint.io.write import write_whole
from sdconv.report.pieces import facts_of, plain, some, table_of
from sdconv.report.plots import plot_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def difference_report(comparison: Comparison, *, every: bool) -> RenderableType:
    """What ``sdconv diff`` prints: each block or each tensor, and what only one of them has."""
    table = table_of("block", ">tensors", ">changed", ">relative", ">max |a-b|", "dtypes")
    for block in comparison.blocks:
        if every:
            for tensor in block.tensors:
                _add(table, BlockDifference(name=tensor.name, tensors=(tensor,)))
        else:
            _add(table, block)
    _add(table, comparison.whole)
    facts: dict[str, object] = {"A": comparison.first, "B": comparison.second}
    for what, names in (
        ("only in A", comparison.only_first),
        ("only in B", comparison.only_second),
    ):
        if names:
            facts[what] = _grouped(names)
    if comparison.misshapen:
        facts["shapes differ"] = some(
            f"{name} {a} and {b}" for name, (a, b) in comparison.misshapen.items()
        )
    if comparison.unread:
        facts["not read"] = some(f"{n} ({a}, {b})" for n, (a, b) in comparison.unread.items())
    verdict = (
        Text("equal: the same tensors, and every value the same", style="green")
        if comparison.equal
        else plain(_verdict(comparison), "bold red")
    )
    note = plain("relative: norm of B - A over norm of A", "dim")
    return Group(facts_of(facts), Text(), table, note, verdict)


def draw_difference(comparison: Comparison, path: Path) -> None:
    """Draw a bar for each block: the norm of the difference over the norm of the first's values.

    The scale is logarithmic if the longest bar is more than a hundred times the shortest.

    Args:
        comparison: of the two checkpoints.
        path: a ``.png``, ``.svg`` or ``.pdf``, written whole or not at all.

    Raises:
        InputError: another suffix. SdconvError: no matplotlib. CheckpointError: it cannot be
            written.
    """
    form = plot_format(path)
    from matplotlib.figure import Figure

    blocks = comparison.blocks
    height = 1.9 + 0.3 * max(len(blocks), 1)
    figure = Figure(figsize=(11, height), dpi=120, facecolor="white")
    axes = figure.add_axes((0.27, 0.75 / height, 0.56, 1 - 1.75 / height))
    _draw_bars(axes, blocks)
    left = 0.015
    figure.text(
        left,
        1 - 0.35 / height,
        f"How far the weights of B, {_short(comparison.second)}, "
        f"are from A's, {_short(comparison.first)}",
        fontsize=13,
        fontweight="bold",
        parse_math=False,
    )
    figure.text(
        left, 1 - 0.65 / height, _verdict(comparison), fontsize=10, color="0.3", parse_math=False
    )
    write_whole(path, lambda part: figure.savefig(part, format=form))


_COLOURS = {"unet": "#3f77b0", "vae": "#6aa84f"}
_OTHER = "#9a9a9a"
_LONGEST = 38  # characters that fit into the margin


def _draw_bars(axes: Axes, blocks: Sequence[BlockDifference]) -> None:
    lengths = [block.relative for block in blocks]
    drawn = [length for length in lengths if 0 < length < math.inf]
    longest, shortest = max(drawn, default=1.0), min(drawn, default=1.0)
    logarithmic = longest > 100 * shortest
    least = shortest / 3 if logarithmic else 0.0
    end = longest * (longest / least) ** 0.02 if logarithmic else longest * 1.02
    positions = range(len(blocks))
    axes.barh(
        positions,
        [end if math.isinf(one) else max(one if one == one else 0.0, least) for one in lengths],
        color=[_COLOURS.get(block.name.partition(".")[0], _OTHER) for block in blocks],
        height=0.72,
        left=0,
    )
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(least, end)
    labels = [_label(block.name) for block in blocks]
    axes.set_yticks(positions, labels, fontsize=9, parse_math=False)
    axes.set_ylim(len(blocks) - 0.4, -0.6)  # the first block on top
    for position, block in zip(positions, blocks, strict=True):
        axes.text(
            1.01,
            position,
            f"{_number(block.relative)}  ({block.changed} of {len(block.tensors)} tensors)",
            transform=axes.get_yaxis_transform(),
            fontsize=8.5,
            va="center",
        )
    scale = ", logarithmic" if logarithmic else ""
    axes.set_xlabel(f"norm of the difference / norm of the weights{scale}", fontsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(axis="x", color="0.88", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _label(name: str) -> str:
    """A block's name in ASCII, which every font has, cut in the middle if it is too long for the
    margin."""
    name = _ascii(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}...{name[-_LONGEST // 2 :]}"


def _add(table: Table, block: BlockDifference) -> None:
    equal = Text("0", style="green") if not block.changed else None
    table.add_row(
        plain(block.name),
        str(len(block.tensors)),
        str(block.changed),
        equal or _number(block.relative),
        equal or f"{block.max_abs:.3g}",
        _dtypes(block.tensors),
        style="bold" if block.name == "all" else None,
    )


def _dtypes(tensors: Iterable[TensorDifference]) -> str:
    """``F32`` if both have it, else ``F32 > F16``."""
    pairs = Counter(tensor.dtypes for tensor in tensors)
    return ", ".join(a if a == b else f"{a} > {b}" for (a, b), _ in pairs.most_common())


def _number(relative: float) -> str:
    return "from 0" if math.isinf(relative) else f"{relative:.3g}"


def _grouped(names: Iterable[str]) -> str:
    blocks = Counter(map(block_of, names))
    return some(f"{block} ({number})" for block, number in blocks.items())


def _verdict(comparison: Comparison) -> str:
    whole = comparison.whole
    words = [f"{whole.changed} of {len(whole.tensors)} common tensors differ"]
    counts = (
        ("only in A", comparison.only_first),
        ("only in B", comparison.only_second),
        ("of another shape", comparison.misshapen),
        ("not read", comparison.unread),
    )
    words += [f"{len(names)} {what}" for what, names in counts if names]
    if any(a != b for a, b in (tensor.dtypes for tensor in whole.tensors)):
        words.append(f"stored as {_dtypes(whole.tensors)}")
    return "; ".join(words)


def _short(label: str) -> str:
    return _ascii(Path(label).name or label)


def _ascii(words: str) -> str:
    return plain(words).plain.encode("ascii", "backslashreplace").decode("ascii")
