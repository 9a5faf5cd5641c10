"""Measures ``weights/tiny-vae.safetensors`` on a portrait that it never saw in training.

    python -m scripts.train.measure_tiny_vae                  # PSNR at 256x256
    python -m scripts.train.measure_tiny_vae --write-photo    # writes weights/photo.jpg

The portrait is part of matplotlib's sample data, so this needs the ``train`` extra.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sdconv
from sdconv.models.vae import AutoencoderKL

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
MODEL = WEIGHTS / "tiny-vae.safetensors"
PHOTO = WEIGHTS / "photo.jpg"


def held_out() -> Image.Image:
    """The upper 512x512 pixels of the portrait of 512x600, resized to 256x256."""
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as portrait:
        image = portrait.convert("RGB")
    return image.resize((256, 256), Image.Resampling.LANCZOS, box=(0, 0, 512, 512))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """8-bit RGB to ``(1, 3, H, W)`` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """``(1, 3, H, W)``, clamped to [-1, 1], to 8-bit RGB ``(H, W, 3)``."""
    return ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """PSNR in dB of 8-bit images: ``-10 log10`` of the mean squared difference in [0, 1]."""
    error = np.mean((first / 255 - second / 255) ** 2)
    return math.inf if error == 0 else -10 * math.log10(error)


@torch.no_grad()
def decoded_psnr(vae: AutoencoderKL, image: Image.Image, latents: torch.Tensor) -> float:
    """PSNR between the image that latents decode to and another one."""
    return psnr(to_pixels(vae.decode(latents).sample), np.array(image))


@torch.no_grad()
def measure(vae: AutoencoderKL, image: Image.Image) -> dict[str, float]:
    """PSNR of the reconstruction from the mode of the latents, and from damaged latents."""
    latents = vae.encode(to_tensor(image)).latent_dist.mode()
    order = torch.randperm(latents[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = latents.flatten(2)[..., order].view_as(latents)
    return {
        "reconstruction": decoded_psnr(vae, image, latents),
        "latents shuffled in space": decoded_psnr(vae, image, shuffled),
        "latents all zero": decoded_psnr(vae, image, torch.zeros_like(latents)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--write-photo", action="store_true", help=f"write {PHOTO.name} instead")
    args = parser.parse_args()
    if args.write_photo:
        held_out().save(PHOTO, quality=95)
        return
    vae = sdconv.load(args.model, dtype=torch.float32)
    for name, decibels in measure(vae, held_out()).items():
        print(f"{name:30} {decibels:6.2f} dB")


if __name__ == "__main__":
    main()
