"""Captures the U-Net's feature maps while a diffusers pipeline runs.

    python examples/look_inside.py [--steps 20] [--size 256] [--out maps.png]

You see a grid with a row for each level of the up path and a column for some of the steps. Each
tile shows the three principal components of a feature map as red, green and blue.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from tiny_pipeline import run, tiny_pipeline
from torch import Tensor

import sdconv

COLUMNS, TILE = 6, 128


def to_rgb(components: Tensor) -> Image.Image:
    """``(3, H, W)`` as an RGB image, each component scaled from its minimum to its maximum."""
    low, high = components.amin((1, 2), keepdim=True), components.amax((1, 2), keepdim=True)
    pixels = ((components - low) / (high - low).clamp(min=1e-6) * 255).byte()
    tile = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return tile.resize((TILE, TILE), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("maps.png"))
    args = parser.parse_args()

    pipe = tiny_pipeline()
    with sdconv.capture(pipe, "unet.up_blocks.?", reduce="pca:3") as maps:
        run(pipe, args.steps, args.size)

    steps = torch.linspace(0, args.steps - 1, min(COLUMNS, args.steps)).round().int().tolist()
    sheet = Image.new("RGB", (len(steps) * TILE, len(maps) * TILE))
    for row, (name, series) in enumerate(maps.items()):
        print(
            f"{name}: {len(series)} feature maps, timesteps {series.timesteps[0]:g} to "
            f"{series.timesteps[-1]:g}, {tuple(series[0].tensor.shape)}"
        )
        for column, step in enumerate(steps):
            sheet.paste(to_rgb(series[step].tensor[0]), (column * TILE, row * TILE))
    sheet.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
