"""Pictures out of noise, with the tiny U-Net, the tiny VAE and diffusers' DDIM scheduler.

    python -m scripts.train.denoise    # what made weights/tiny-unet-samples.png

The same seed gives the same pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

import sdconv
from scripts.train.measure_tiny_unet import BETAS, MODEL, TIMESTEPS, VAE, context
from scripts.train.measure_tiny_vae import WEIGHTS, to_pixels
from sdconv.models.unet import UNet2DConditionModel


@torch.no_grad()
def denoised(unet: UNet2DConditionModel, noise: Tensor, steps: int) -> Tensor:
    """Latents ``(B, 4, H, W)`` from noise of the same shape; no randomness of its own."""
    first, last = BETAS
    scheduler = DDIMScheduler(
        TIMESTEPS,
        beta_start=first,
        beta_end=last,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    latents, tokens = noise * scheduler.init_noise_sigma, context(unet, len(noise))
    for timestep in scheduler.timesteps:
        predicted = unet(latents, timestep, tokens).sample
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def grid(pictures: list[np.ndarray], columns: int) -> Image.Image:
    """Pictures of one size, row by row; what is missing in the last row stays black."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, pixels in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(Image.fromarray(pixels), (column * width, row * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures out of noise.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--side", type=int, default=128, help="in pixels, a multiple of 8")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "tiny-unet-samples.png")
    args = parser.parse_args()
    unet = sdconv.load(args.model, dtype=torch.float32)
    vae = sdconv.load(args.vae, dtype=torch.float32)
    shape = (args.count, 4, args.side // 8, args.side // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    latents = denoised(unet, noise, args.steps) / vae.config.scaling_factor
    with torch.no_grad():
        pictures = [to_pixels(vae.decode(one).sample) for one in latents.split(1)]
    grid(pictures, args.columns).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
