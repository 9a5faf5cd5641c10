"""Measures ``weights/tiny-unet.safetensors`` on a portrait that it never saw in training.

    python -m scripts.train.measure_tiny_unet

The mean squared error of the predicted noise, beside that of the best linear prediction: at each
timestep the noisy latent times the scalar that fits this very sample best. Needs the ``train``
extra for the curve.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import sdconv
from scripts.train.measure_tiny_vae import MODEL as VAE
from scripts.train.measure_tiny_vae import PHOTO, WEIGHTS, to_tensor
from sdconv.models.unet import UNet2DConditionModel
from sdconv.models.vae import AutoencoderKL

MODEL = WEIGHTS / "tiny-unet.safetensors"
CURVE = WEIGHTS / "tiny-unet-curve.png"

# Stable Diffusion 1's noise schedule: the roots of beta rise evenly between the roots of these
TIMESTEPS, BETAS = 1000, (0.00085, 0.012)
SIDE = 128  # of a crop, in pixels


@dataclass(frozen=True)
class Losses:
    """Mean squared errors of the predicted noise at each of ``timesteps``."""

    timesteps: Tensor
    network: Tensor
    linear: Tensor

    @property
    def ratio(self) -> float:
        """The network's mean over the timesteps, as a share of the linear prediction's."""
        return (self.network.mean() / self.linear.mean()).item()


def signal_shares() -> Tensor:
    """Of each timestep, the latent's share of the noisy latent's variance: SD's
    ``alphas_cumprod``, ``(TIMESTEPS,)``."""
    first, last = BETAS
    roots = torch.linspace(first**0.5, last**0.5, TIMESTEPS, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0).float()


def noisy(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """``(B, C, H, W)`` as they are at timesteps ``(B,)`` or ``(1,)``."""
    share = signal_shares()[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def context(unet: UNet2DConditionModel, batch: int) -> Tensor:
    """What stands for the text, ``(batch, N, N)``: token i is the i-th unit vector, so that its
    key and its value in each transformer block are what that block has learned for it."""
    width = unet.config.cross_attention_dim
    assert isinstance(width, int)
    return torch.eye(width).expand(batch, -1, -1)


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: Iterable[Tensor]) -> Tensor:
    """Pictures ``(1, 3, H, W)`` to the posteriors' modes, scaled to about unit deviation."""
    modes = [vae.encode(picture).latent_dist.mode() for picture in pictures]
    return torch.cat(modes) * vae.config.scaling_factor


def held_out_latents(vae: AutoencoderKL, stride: int) -> Tensor:
    """The portrait's crops of 128x128, each ``stride`` pixels from the last: ``(N, 4, 16, 16)``."""
    with Image.open(PHOTO) as photo:
        x = to_tensor(photo.convert("RGB"))
    windows = x.unfold(2, SIDE, stride).unfold(3, SIDE, stride)  # (1, 3, rows, columns, 128, 128)
    crops = windows.flatten(2, 3).transpose(1, 2)[0]
    return encoded(vae, crops.split(1))


@torch.no_grad()
def measure(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, seed: int) -> Losses:
    """Both losses at each timestep, over all latents with fresh noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = context(unet, len(latents))
    network, linear = [], []
    for timestep in timesteps.split(1):
        noise = torch.randn(latents.shape, generator=generator)
        x = noisy(latents, noise, timestep)
        best = (noise * x).sum() / (x * x).sum()
        linear.append((noise - best * x).square().mean())
        network.append((noise - unet(x, timestep, tokens).sample).square().mean())
    return Losses(timesteps, torch.stack(network), torch.stack(linear))


def evenly(count: int) -> Tensor:
    """``count`` timesteps, each the middle of an equal part of all."""
    return (torch.arange(count) * 2 + 1) * TIMESTEPS // (2 * count)


def plot(found: Losses, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot(found.timesteps, found.linear, "--", label="best scalar times the noisy latent")
    axes.plot(found.timesteps, found.network, label="tiny U-Net")
    axes.set(
        xlabel="timestep", ylabel="squared error of the noise", xlim=(0, TIMESTEPS), ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Noise prediction on the held-out portrait.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument("--timesteps", type=int, default=20, help="how many, evenly spaced")
    parser.add_argument("--curve", type=Path, default=CURVE)
    args = parser.parse_args()
    vae = sdconv.load(args.vae, dtype=torch.float32)
    unet = sdconv.load(args.model, dtype=torch.float32)
    latents = held_out_latents(vae, stride=16)
    found = measure(unet, latents, evenly(args.timesteps), seed=0)
    print(f"{len(latents)} crops at {args.timesteps} timesteps")
    for name, losses in (("linear", found.linear), ("network", found.network)):
        parts = " ".join(f"{part.mean():.3f}" for part in losses.chunk(5))
        print(f"{name:8} {losses.mean():.4f}   by fifths of the timesteps: {parts}")
    print(f"ratio    {found.ratio:.4f}: {1 - found.ratio:.1%} under the linear prediction")
    plot(found, args.curve)


if __name__ == "__main__":
    main()
