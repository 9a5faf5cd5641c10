"""Time that DeepCache saves and likeness that it costs, by interval.

The small U-Net makes images from the same noise at each interval. The intervals take turns, in an
order that rotates from round to round; times are medians over the rounds, and shares are of the
plain run in the same round. Operations are those that torch counts in convolutions and matrix
products. PSNR is the mean over images, between each decoded image and the plain run's; the last
line has that of two images from different noise.

    python -m scripts.bench.deepcache
    python -m scripts.bench.deepcache --side 128 --steps 10 --rounds 1
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sdconv
from scripts.train.denoise import denoised
from scripts.train.measure_tiny_unet import MODEL
from scripts.train.measure_tiny_vae import MODEL as VAE
from scripts.train.measure_tiny_vae import psnr, to_pixels
from sdconv.features import recipes
from sdconv.models.unet import UNet2DConditionModel


def cached(unet: UNet2DConditionModel, noise: Tensor, given: argparse.Namespace, n: int) -> Tensor:
    """Latents from noise, at interval ``n``."""
    with recipes.deepcache(unet, n, branch=given.branch):
        return denoised(unet, noise, given.steps)


def operations(unet: UNet2DConditionModel, noise: Tensor, given: argparse.Namespace, n: int) -> int:
    with FlopCounterMode(display=False) as counter:
        cached(unet, noise, given, n)
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=256, help="in pixels, a multiple of 8")
    parser.add_argument("--count", type=int, default=2, help="number of images")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--branch", type=int, default=0)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5, 10])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    unet = sdconv.load(MODEL, "unet", dtype=torch.float32)
    vae = sdconv.load(VAE, "vae", dtype=torch.float32)
    shape = (given.count, 4, given.side // 8, given.side // 8)
    noise, other_noise = (
        torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    )

    @torch.no_grad()
    def images(latents: Tensor) -> list[np.ndarray]:
        return [
            to_pixels(vae.decode(x / vae.config.scaling_factor).sample)
            for x in latents.unsqueeze(1)
        ]

    def alike(latents: Tensor) -> float:
        return statistics.mean(map(psnr, images(latents), plain))

    intervals = [1, *given.intervals]
    plain = images(denoised(unet, noise, given.steps))  # also warms up
    counts = {n: operations(unet, noise, given, n) for n in intervals}
    seconds: dict[int, list[float]] = {n: [] for n in intervals}
    results: dict[int, Tensor] = {}
    for number in range(given.rounds):
        first = number % len(intervals)
        for n in (*intervals[first:], *intervals[:first]):
            begun = time.perf_counter()
            results[n] = cached(unet, noise, given, n)
            seconds[n].append(time.perf_counter() - begun)

    print("| interval | time | of the plain run | operations, of the plain run | PSNR |")
    print("|---|---|---|---|---|")
    for n in intervals:
        share = statistics.median(a / b for a, b in zip(seconds[n], seconds[1], strict=True))
        near = alike(results[n])
        print(
            f"| {n} | {statistics.median(seconds[n]):.2f} s | {100 * share:.0f} % "
            f"| {100 * counts[n] / counts[1]:.0f} % "
            f"| {'the same image' if near == float('inf') else f'{near:.1f} dB'} |"
        )
    print(f"| other noise | | | | {alike(denoised(unet, other_noise, given.steps)):.1f} dB |")


if __name__ == "__main__":
    main()
