"""Reads the U-Net's feature maps while an ordinary pipeline runs.

    python examples/look_inside.py [--steps 20] [--size 256] [--out maps.png]

One sees a sheet: a row for each level on the way up, a column for some of the steps, each map's
three principal components as red, green and blue.
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


def coloured(components: Tensor) -> Image.Image:
    """``(3, H, W)`` as a picture, each component from its lowest to its highest value."""
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

    shown = torch.linspace(0, args.steps - 1, min(COLUMNS, args.steps)).round().int().tolist()
    sheet = Image.new("RGB", (len(shown) * TILE, len(maps) * TILE))
    for row, (name, series) in enumerate(maps.items()):
        print(
            f"{name}: {len(series)} maps, timesteps {series.timesteps[0]:g} to "
            f"{series.timesteps[-1]:g}, {tuple(series[0].tensor.shape)}"
        )
        for column, step in enumerate(shown):
            sheet.paste(coloured(series[step].tensor[0]), (column * TILE, row * TILE))
    sheet.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
