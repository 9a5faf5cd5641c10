"""Encodes an image with a VAE and decodes it again.

    python examples/reconstruct.py [--image photo.jpg] [--model vae.safetensors] [--out FILE.png]

You see the image, its reconstruction and their difference side by side, and how many numbers the
image and its latents have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sdconv
from sdconv.images import psnr, read_image, side_by_side, to_image, to_tensor, write_image

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", type=Path, default=WEIGHTS / "photo.jpg")
    parser.add_argument("--model", type=Path, default=WEIGHTS / "tiny-vae.safetensors")
    parser.add_argument("--size", type=int, help="pixels of the longer side")
    parser.add_argument("--out", type=Path, default=Path("reconstruct.png"))
    args = parser.parse_args()

    vae = sdconv.load(args.model, component="vae", dtype=torch.float32)
    photo = read_image(args.image).fitted(vae.downscale, args.size)
    x = to_tensor(photo.image)
    with torch.inference_mode():
        latents = vae.encode(x).latent_dist.mode()
        reconstruction = vae.decode(latents).sample

    sheet, _ = side_by_side(photo.image, to_image(reconstruction[0]))
    write_image(sheet, args.out)
    print(f"{x.numel()} numbers in the image, {latents.numel()} in its latents")
    print(f"{psnr(reconstruction, x):.1f} dB; {args.out}")


if __name__ == "__main__":
    main()
