"""Trains ``weights/tiny-vae.safetensors``: Stable Diffusion's VAE, but narrow, on a dozen photos.

    python scripts/train_tiny_vae.py    # what made the file that ships; see weights/README.md

Needs the ``train`` extra, and no network: every photo lies in the installed scikit-image. Bounded
by wall-clock time, so a slower or busier machine takes fewer steps and ends elsewhere: the seed
fixes the crops and the noise, not the pace.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from skimage import data
from torch import Tensor

import sdconv
from sdconv.config import AutoencoderKLConfig
from sdconv.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parent.parent

CONFIG = AutoencoderKLConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 32, 96, 96),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=256,
    scaling_factor=1.0,  # measured at the end
    shift_factor=None,
    force_upcast=False,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
)

# how often each is drawn; only files inside the scikit-image package, in the public domain, CC0 or
# without known restrictions (its docstrings say which)
PHOTOS: dict[Callable[[], np.ndarray], int] = {
    data.astronaut: 4,
    data.chelsea: 3,
    data.coffee: 3,
    data.rocket: 3,
    data.camera: 2,
    data.hubble_deep_field: 1,
    data.immunohistochemistry: 1,
    data.retina: 1,
    data.coins: 1,
    data.brick: 1,
    data.grass: 1,
    data.gravel: 1,
}
LARGEST_SIDE = 768

LEARNING_RATE = 1e-3
WARM_UP = 0.03  # of the time
EMA_DECAY = 0.999
GRADIENT_WEIGHT = 0.25
KL_WEIGHT = 1e-5
WORKERS = 2  # threads, each with its own crops
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Phase:
    """From ``start`` (a fraction of the time) on, each worker takes ``batch`` crops of ``side``."""

    start: float
    batch: int
    side: int


PHASES = (Phase(0.0, 2, 64), Phase(0.85, 1, 128))


class Crops:
    """Random crops of the photos, in [-1, 1]: any scale from 0.4 to 1.5, mirrored, recoloured."""

    def __init__(self, seed: int) -> None:
        self.photos = [photograph(load) for load in PHOTOS]
        weights = np.array(list(PHOTOS.values()), dtype=float)
        self.chances = weights / weights.sum()
        self.rng = np.random.default_rng(seed)
        self.noise = torch.Generator().manual_seed(seed)

    def batch(self, phase: Phase) -> Tensor:
        """``(batch, 3, side, side)``."""
        crops = np.stack([self._one(phase.side) for _ in range(phase.batch)])
        pictures = torch.from_numpy(crops).float().permute(0, 3, 1, 2) * 2 - 1
        return pictures.contiguous(memory_format=torch.channels_last)

    def _one(self, side: int) -> np.ndarray:
        rng = self.rng
        photo = self.photos[rng.choice(len(self.photos), p=self.chances)]
        scale = math.exp(rng.uniform(math.log(0.4), math.log(1.5)))
        size = min(side / scale, *photo.size)
        left, top = rng.uniform(0, photo.width - size), rng.uniform(0, photo.height - size)
        box = (left, top, left + size, top + size)
        crop = photo.resize((side, side), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(crop, dtype=np.float32) / 255
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        if rng.random() < 0.2:
            pixels = pixels.transpose(1, 0, 2)
        return self._recoloured(pixels)

    def _recoloured(self, pixels: np.ndarray) -> np.ndarray:
        rng = self.rng
        if rng.random() < 0.5:
            pixels = pixels[..., rng.permutation(3)]
        grey = pixels.mean(axis=-1, keepdims=True)
        pixels = (grey + rng.uniform(0.3, 1.6) * (pixels - grey)).clip(0, 1)
        # one gamma for all and a little for each channel, which also tints the grey photos
        pixels = pixels ** np.exp(rng.uniform(-0.5, 0.5) + rng.uniform(-0.3, 0.3, size=3))
        low, high = rng.uniform(0, 0.15), rng.uniform(0.8, 1.1)
        return (low + (high - low) * pixels).clip(0, 1)


def photograph(load: Callable[[], np.ndarray]) -> Image.Image:
    photo = Image.fromarray(load()).convert("RGB")
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return photo


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Smooth L1, and L1 of the differences between neighbours at full, half and quarter size."""
    loss = F.smooth_l1_loss(output, target, beta=0.1)
    error = output - target
    for _ in range(3):
        loss = loss + GRADIENT_WEIGHT / 3 * (
            error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        )
        error = F.avg_pool2d(error, 2)
    return loss


def gradients(
    network: AutoencoderKL, phase: Phase, crops: Crops
) -> tuple[tuple[Tensor, ...], tuple[float, float, float]]:
    """One worker's share of a step: a batch's gradients; its loss, squared error in [0, 1], KL."""
    x = crops.batch(phase)
    posterior = network.encode(x).latent_dist
    output = network.decode(posterior.sample(crops.noise)).sample
    kl = posterior.kl().sum() / posterior.mean.numel()
    loss = reconstruction_loss(output, x)
    found = torch.autograd.grad(loss + KL_WEIGHT * kl, list(network.parameters()))
    error = F.mse_loss(output.detach().clamp(-1, 1), x) / 4
    return found, (loss.item(), error.item(), kl.item())


def learning_rate(progress: float) -> float:
    """Linear warm-up, then half a cosine down to nothing; ``progress`` runs from 0 to 1."""
    if progress < WARM_UP:
        return LEARNING_RATE * progress / WARM_UP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


@torch.no_grad()
def follow(average: AutoencoderKL, network: AutoencoderKL, step: int) -> None:
    """Moves the averaged weights towards the network's, quickly while there is little to keep."""
    share = 1 - min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)


@torch.no_grad()
def save(average: AutoencoderKL, photos: list[Image.Image], path: Path) -> float:
    """Writes the weights in float16; scaled, the latents of the photos have unit deviation."""
    rounded = copy.deepcopy(average).half().float()
    pictures = np.stack([np.asarray(ImageOps.fit(photo, (256, 256))) for photo in photos])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    latents = torch.cat([rounded.encode(one).latent_dist.mode() for one in x.split(1)])
    factor = round(1 / latents.std().item(), 5)
    rounded.config = replace(CONFIG, scaling_factor=factor)
    sdconv.save(rounded.half(), path)
    return factor


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """The loss and the training crops' PSNR over time, as a picture."""
    import matplotlib.pyplot as plt

    minutes = [row["minutes"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(minutes, [row["loss"] for row in rows])
    left.set(xlabel="minutes", ylabel="training loss", yscale="log")
    right.plot(minutes, [row["psnr"] for row in rows])
    right.set(xlabel="minutes", ylabel="PSNR of training crops (dB)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def train(minutes: float, seed: int, work: Path, out: Path, curve: Path) -> None:
    torch.manual_seed(seed)
    workers = [Crops(seed + number) for number in range(WORKERS)]
    network = AutoencoderKL(CONFIG).to(memory_format=torch.channels_last)
    with torch.no_grad():  # the log-variance: little noise at first, so that the means are heard
        network.quant_conv.bias[CONFIG.latent_channels :] = -4.0
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    rows: list[dict[str, float]] = []
    window: list[tuple[float, float, float]] = []
    begun = written = time.monotonic()
    step = 0
    pool = ThreadPoolExecutor(WORKERS)
    while (progress := (time.monotonic() - begun) / (60 * minutes)) < 1:
        phase = [phase for phase in PHASES if phase.start <= progress][-1]
        # threads over shares meet once a step; threads inside operators would meet at each
        shares = list(pool.map(partial(gradients, network, phase), workers))
        found = zip(*(share[0] for share in shares), strict=True)
        for parameter, grads in zip(network.parameters(), found, strict=True):
            parameter.grad = torch.stack(grads).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        optimizer.step()
        follow(average, network, step)
        step += 1
        window += [share[1] for share in shares]
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            written = time.monotonic()
            losses, errors, kls = np.mean(window, axis=0)
            window.clear()
            row = {"minutes": (written - begun) / 60, "step": step, "side": phase.side}
            row |= {"loss": losses, "psnr": -10 * math.log10(errors), "kl": kls}
            rows.append({name: round(float(value), 5) for name, value in row.items()})
            print(rows[-1], flush=True)
            with (work / "loss.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
            save(average, workers[0].photos, work / "checkpoint.safetensors")
    factor = save(average, workers[0].photos, out)
    if rows:
        plot(rows, curve)
    taken = (time.monotonic() - begun) / 60
    print(f"{step} steps in {taken:.1f} minutes, scaling factor {factor}: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60, help="of wall-clock time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "tiny-vae",
        help="folder for loss.csv and a checkpoint each minute",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "weights" / "tiny-vae.safetensors")
    parser.add_argument("--curve", type=Path, default=ROOT / "weights" / "tiny-vae-loss.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.minutes, args.seed, args.work, args.out, args.curve)


if __name__ == "__main__":
    main()
