"""Generates images from noise with the tiny U-Net, the tiny VAE and DDIM.

    python -m scripts.train.denoise    # writes weights/tiny-unet-samples.png

The same seed gives the same images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sdconv
from scripts.train.measure_tiny_unet import MODEL, VAE, context
from scripts.train.measure_tiny_vae import WEIGHTS, to_pixels
from sdconv.integrations.schedule import Schedule
from sdconv.models.unet import UNet2DConditionModel


@torch.no_grad()
def denoised(unet: UNet2DConditionModel, noise: Tensor, steps: int) -> Tensor:
    """Latents ``(B, 4, H, W)`` from noise of the same shape, deterministically."""
    schedule = Schedule(steps)
    latents, tokens = noise, context(unet, len(noise))
    for timestep in schedule.timesteps:
        predicted = unet(latents, timestep, tokens).sample
        latents = schedule.step(predicted, timestep, latents)
    return latents


def grid(images: list[np.ndarray], columns: int) -> Image.Image:
    """Images of one size, row by row; empty cells of the last row are black."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(pixels), (column * width, row * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument(
        "--side", type=int, default=128, help="side of an image in pixels, a multiple of 8"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS / "tiny-unet-samples.png")
    args = parser.parse_args()
    unet = sdconv.load(args.model, dtype=torch.float32)
    vae = sdconv.load(args.vae, dtype=torch.float32)
    shape = (args.count, 4, args.side // 8, args.side // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    latents = denoised(unet, noise, args.steps) / vae.config.scaling_factor
    with torch.no_grad():
        images = [to_pixels(vae.decode(one).sample) for one in latents.split(1)]
    grid(images, args.columns).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
