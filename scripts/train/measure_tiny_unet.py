"""Measures ``weights/tiny-unet.safetensors`` on a portrait that it never saw in training.

    python -m scripts.train.measure_tiny_unet

Prints the mean squared error of the predicted noise and that of the best linear prediction, which
at each timestep is the noisy latent times the scalar that fits best. The curve needs the ``train``
extra.
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
from sdconv.config.facts import BETAS, TRAIN_TIMESTEPS
from sdconv.models.unet import UNet2DConditionModel
from sdconv.models.vae import AutoencoderKL

MODEL = WEIGHTS / "tiny-unet.safetensors"
CURVE = WEIGHTS / "tiny-unet-curve.png"

SIDE = 128  # of a crop, in pixels


@dataclass(frozen=True)
class Losses:
    """Mean squared errors of the predicted noise at each of ``timesteps``: the network's, and those
    of the best linear prediction."""

    timesteps: Tensor
    network: Tensor
    linear: Tensor

    @property
    def ratio(self) -> float:
        """The network's mean over the timesteps, as a share of the linear prediction's."""
        return (self.network.mean() / self.linear.mean()).item()


def signal_shares() -> Tensor:
    """At each timestep, the latent's share of the noisy latent's variance: Stable Diffusion's
    ``alphas_cumprod``, ``(TRAIN_TIMESTEPS,)``."""
    first, last = BETAS
    roots = torch.linspace(first**0.5, last**0.5, TRAIN_TIMESTEPS, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0).float()


def noisy(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents ``(B, C, H, W)`` with the noise of timesteps ``(B,)`` or ``(1,)``."""
    share = signal_shares()[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def context(unet: UNet2DConditionModel, batch: int) -> Tensor:
    """The prompt embeddings, ``(batch, N, N)``: token i is the i-th unit vector, so that every
    transformer block learns the token's key and value itself."""
    width = unet.config.cross_attention_dim
    assert isinstance(width, int)
    return torch.eye(width).expand(batch, -1, -1)


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Iterable[Tensor]) -> Tensor:
    """The modes of the latents of images ``(1, 3, H, W)``, scaled to about unit variance."""
    modes = [vae.encode(image).latent_dist.mode() for image in images]
    return torch.cat(modes) * vae.config.scaling_factor


def held_out_latents(vae: AutoencoderKL, step: int) -> Tensor:
    """Latents of the portrait's crops of 128x128, ``step`` pixels apart: ``(N, 4, 16, 16)``."""
    with Image.open(PHOTO) as photo:
        x = to_tensor(photo.convert("RGB"))
    windows = x.unfold(2, SIDE, step).unfold(3, SIDE, step)  # (1, 3, rows, columns, 128, 128)
    crops = windows.flatten(2, 3).transpose(1, 2)[0]
    return encoded(vae, crops.split(1))


@torch.no_grad()
def measure(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, seed: int) -> Losses:
    """Both errors at each timestep, over all latents with fresh noise."""
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
    """The midpoints of ``count`` equal ranges of timesteps."""
    return (torch.arange(count) * 2 + 1) * TRAIN_TIMESTEPS // (2 * count)


def plot(losses: Losses, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot(losses.timesteps, losses.linear, "--", label="best scalar times the noisy latent")
    axes.plot(losses.timesteps, losses.network, label="tiny U-Net")
    axes.set(
        xlabel="timestep",
        ylabel="squared error of the noise",
        xlim=(0, TRAIN_TIMESTEPS),
        ylim=(0, None),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument("--timesteps", type=int, default=20, help="how many, evenly spaced")
    parser.add_argument("--curve", type=Path, default=CURVE)
    args = parser.parse_args()
    vae = sdconv.load(args.vae, dtype=torch.float32)
    unet = sdconv.load(args.model, dtype=torch.float32)
    latents = held_out_latents(vae, step=16)
    losses = measure(unet, latents, evenly(args.timesteps), seed=0)
    print(f"{len(latents)} crops at {args.timesteps} timesteps")
    for name, errors in (("linear", losses.linear), ("network", losses.network)):
        parts = " ".join(f"{part.mean():.3f}" for part in errors.chunk(5))
        print(f"{name:8} {errors.mean():.4f}   by fifths of the timesteps: {parts}")
    print(f"ratio    {losses.ratio:.4f}: {1 - losses.ratio:.1%} below the linear prediction")
    plot(losses, args.curve)


if __name__ == "__main__":
    main()
