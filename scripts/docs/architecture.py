"""Draws the package's floors, for docs/architecture.md: a module imports only from floors below it.

    python -m scripts.docs.architecture            # docs/plots/architecture.svg
    python -m scripts.docs.architecture --out FILE.svg

`tests/docs/test_docs.py` compares the floors with those that `tests/test_imports.py` enforces.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

DRAWING = Path(__file__).resolve().parents[2] / "docs" / "plots" / "architecture.svg"

# top first: for each floor, its packages and modules and what each does, in lines that fit
FLOORS = (
    (("cli", ("parses arguments, calls, prints",)),),
    (("report", ("tables, plots, the page of feature maps",)),),
    (("dataset", ("latents and features of many images, as shards",)),),
    (("features", ("capture, edit, recipes, stores of feature maps",)),),
    (("analysis", ("anatomy, parity, inspection, diff, explain, timings",)),),
    (("loading", ("load: from a path to any network",)),),
    (("streaming", ("the VAE in strips of rows, within a memory limit",)),),
    (
        ("fast", ("the fast backend:", "cpu/, cpu/numba/, cuda/")),
        ("integrations", ("diffusers: patch, peers,", "transformers, schedule")),
        ("latents", ("scaling, FLUX.2's", "patches")),
    ),
    (
        ("models", ("the networks in plain torch:", "blocks, VAE, tiny, U-Net")),
        ("lora", ("reads, merges and", "unmerges LoRA")),
        ("images", ("files to tensors", "and back")),
    ),
    (("checkpoint", ("io/ bytes to tensors · keys/ names · identify/ shapes to configs",)),),
    (
        ("convolution", ("the reference", "and geometry")),
        ("config", ("configs and facts", "of the field")),
        ("backends", ("the switch and", "the registry")),
        ("devices", ("usable", "devices")),
        ("sizes", ("numbers", "as text")),
        ("hub", ("the only", "download")),
    ),
    (("errors", ("what is wrong, where, expected, got, hint",)),),
)

WIDTH, GUTTER, GAP = 780, 52, 8
# pixels of a floor by the lines of its captions
HEIGHTS = {1: 40, 2: 68}
PAPER, INK, FAINT, ARROW = "#ffffff", "#1d2433", "#4b5568", "#8a94a6"
# background and outline: what people use, the networks and their arithmetic, what they rest on
COLOURS = (("#e8eefc", "#a9bdf0"), ("#e5f4ea", "#9fd3b1"), ("#fdf0e0", "#eec48f"))
USED, NETWORKS = 6, 9


@dataclass(frozen=True)
class Box:
    """A package's rectangle, in pixels from the top left."""

    name: str
    lines: tuple[str, ...]
    left: float
    top: float
    width: float
    height: float
    colours: tuple[str, str]


def boxes() -> Iterator[Box]:
    """Every package of every floor."""
    top = 20.0
    for number, floor in enumerate(FLOORS):
        height = HEIGHTS[max(len(lines) for _, lines in floor)]
        widths = [max(len(name) * 1.25, *map(len, lines)) + 3 for name, lines in floor]
        room = WIDTH - GUTTER - 20 - GAP * (len(floor) - 1)
        left = float(GUTTER)
        for (name, lines), share in zip(floor, widths, strict=True):
            width = room * share / sum(widths)
            colours = COLOURS[(number >= USED) + (number >= NETWORKS)]
            yield Box(name, lines, left, top, width, height, colours)
            left += width + GAP
        top += height + GAP


def drawing() -> str:
    """The drawing, as SVG."""
    placed = list(boxes())
    bottom = max(box.top + box.height for box in placed)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 20:.0f}"'
        ' font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
        "<title>The floors of sdconv: each imports only from floors below it</title>",
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>',
        f'<path d="M28 24 V{bottom - 8:.0f} m-6 -10 l6 10 l6 -10" fill="none" stroke="{ARROW}"'
        ' stroke-width="2"/>',
        f'<text transform="translate(20 {bottom / 2 + 30:.0f}) rotate(-90)" font-size="14"'
        f' fill="{FAINT}">imports</text>',
    ]
    for box in placed:
        fill, outline = box.colours
        parts.append(
            f'<rect x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}"'
            f' height="{box.height}" rx="6" fill="{fill}" stroke="{outline}"/>'
        )
        one_line = len(box.lines) == 1
        baseline = box.top + (25 if one_line else 22)
        parts.append(_text(box.left + 12, baseline, box.name, 15, INK, 600))
        for row, line in enumerate(box.lines):
            x = box.left + (128 if one_line else 12)
            y = box.top + (25 if one_line else 41 + 17 * row)
            parts.append(_text(x, y, line, 13, FAINT, 400))
    return "\n".join((*parts, "</svg>", ""))


def _text(x: float, y: float, words: str, size: int, colour: str, weight: int) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}"'
        f' fill="{colour}">{escape(words)}</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DRAWING)
    args = parser.parse_args()
    args.out.write_text(drawing(), "utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
