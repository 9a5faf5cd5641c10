"""Draws every picture of the documentation, from the weights and the photo that ship.

    python -m scripts.docs.pictures            # into docs/pictures
    python -m scripts.docs.pictures --out DIR

Needs the ``plot`` extra.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure

import sdconv
from scripts.docs import ideas, networks
from scripts.docs.drawing import distinct_channels, save
from sdconv.images import read_image, to_tensor

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights"
PICTURES = ROOT / "docs" / "pictures"
SOURCES = PICTURES / "made-from.txt"


def sources() -> str:
    """The SHA-256 and name of each file that the pictures are made from."""
    names = ("photo.jpg", "tiny-unet.safetensors", "tiny-vae.safetensors")
    hashes = [hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() for name in names]
    return "".join(f"{number}  {name}\n" for number, name in zip(hashes, names, strict=True))


def pictures() -> Mapping[str, Callable[[], Figure]]:
    """The functions that draw the pictures, by name."""
    photo = to_tensor(read_image(WEIGHTS / "photo.jpg").image)[0]
    vae = sdconv.load(WEIGHTS / "tiny-vae.safetensors", dtype=torch.float32)
    unet = sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32)
    first = vae.encoder.conv_in
    features = first(photo[None])[0]
    return {
        "two-lists": ideas.two_lists,
        "kernels": lambda: ideas.kernels(photo),
        "neuron": lambda: ideas.neuron(
            photo, first.weight, first.bias, distinct_channels(features, 2)[1]
        ),
        "stride": ideas.stride,
        "padding": ideas.padding,
        "receptive-chain": ideas.receptive_chain,
        "receptive-fields": lambda: networks.receptive_fields(photo, vae),
        "feature-maps": lambda: networks.feature_maps(photo, features),
        "shifted": lambda: networks.shifted(photo, first),
        "vae": lambda: networks.encoder_and_decoder(photo, vae),
        "downsampling": lambda: networks.downsampling(photo, vae),
        "upsampling": lambda: networks.upsampling(photo, vae),
        "residual": lambda: networks.residual(photo, vae),
        "latents": lambda: networks.latents_and_back(photo, vae),
        "unet": lambda: networks.unet_levels(photo, vae, unet),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures().items():
        save(draw(), args.out / f"{name}.webp")
        print(args.out / f"{name}.webp")
    (args.out / SOURCES.name).write_text(sources())


if __name__ == "__main__":
    main()
