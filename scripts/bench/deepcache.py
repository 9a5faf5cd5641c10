"""What DeepCache saves and what it costs: time, and PSNR of the pictures, against the interval.

The small U-Net makes pictures from the same noise at each interval. In each round every interval
takes its turn, beginning with another one each time; times are medians over the rounds, and shares
those of the plain run of the same round. Operations are those that torch's counter finds in
convolutions and matrix products. PSNR is between the decoded pictures and the plain run's, the mean
over pictures; the last line gives that of two pictures from unlike noise.

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
from scripts.train.measure_tiny_unet import MODEL, VAE
from scripts.train.measure_tiny_vae import psnr, to_pixels
from sdconv.features import recipes
from sdconv.models.unet import UNet2DConditionModel


def cached(unet: UNet2DConditionModel, noise: Tensor, given: argparse.Namespace, n: int) -> Tensor:
    """Latents out of noise, at interval ``n``."""
    with recipes.deepcache(unet, n, branch=given.branch):
        return denoised(unet, noise, given.steps)


def operations(unet: UNet2DConditionModel, noise: Tensor, given: argparse.Namespace, n: int) -> int:
    with FlopCounterMode(display=False) as counter:
        cached(unet, noise, given, n)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=256, help="in pixels, a multiple of 8")
    parser.add_argument("--count", type=int, default=2, help="pictures")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--branch", type=int, default=0)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5, 10])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    unet = sdconv.load(MODEL, dtype=torch.float32)
    vae = sdconv.load(VAE, dtype=torch.float32)
    shape = (given.count, 4, given.side // 8, given.side // 8)
    noise, unlike = (torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in (0, 1))

    @torch.no_grad()
    def pictures(latents: Tensor) -> list[np.ndarray]:
        return [
            to_pixels(vae.decode(x / vae.config.scaling_factor).sample) for x in latents.split(1)
        ]

    def alike(latents: Tensor) -> float:
        return statistics.mean(map(psnr, pictures(latents), plain))

    intervals = [1, *given.intervals]
    plain = pictures(denoised(unet, noise, given.steps))  # also warms up
    counts = {n: operations(unet, noise, given, n) for n in intervals}
    seconds: dict[int, list[float]] = {n: [] for n in intervals}
    results: dict[int, Tensor] = {}
    for number in range(given.rounds):
        first = number % len(intervals)
        for n in (*intervals[first:], *intervals[:first]):
            begun = time.perf_counter()
            results[n] = cached(unet, noise, given, n)
            seconds[n].append(time.perf_counter() - begun)

    print("| interval | time | of the plain run's | operations, of the plain run's | PSNR |")
    print("|---|---|---|---|---|")
    for n in intervals:
        share = statistics.median(a / b for a, b in zip(seconds[n], seconds[1], strict=True))
        near = alike(results[n])
        print(
            f"| {n} | {statistics.median(seconds[n]):.2f} s | {100 * share:.0f} % "
            f"| {100 * counts[n] / counts[1]:.0f} % "
            f"| {'the same picture' if near == float('inf') else f'{near:.1f} dB'} |"
        )
    print(f"| unlike noise | | | | {alike(denoised(unet, unlike, given.steps)):.1f} dB |")


if __name__ == "__main__":
    main()
