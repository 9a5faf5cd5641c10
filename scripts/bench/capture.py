"""Time that capturing every ResNet block's output adds to a U-Net's call.

Each round has a plain call, the same call under capture, and copies of the same feature maps alone.
Ratios are taken within a round; their medians are printed by wall-clock time and by processor time,
which other processes disturb less.

    python -m scripts.bench.capture                     # SD1.5 at full size, random weights
    python -m scripts.bench.capture --width 64 --latents 32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import sdconv
from sdconv.config import UNet2DConditionConfig
from sdconv.loading import build

PATTERN = "*.resnets.[0-9]"


def sd15(width: int) -> torch.nn.Module:
    """The U-Net of Stable Diffusion 1.5 with random weights.

    Args:
        width: channels of its first block; 320 in the published network.
    """
    fields = {
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    config = UNet2DConditionConfig.from_json({**UNet2DConditionConfig.assumed, **fields}, "SD1.5")
    with torch.device("meta"):
        network = build(config)
    network.to_empty(device="cpu").eval()
    random = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=random)
    return network


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds."""
    begun = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    network = sd15(given.width)
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(given.batch, 4, given.latents, given.latents, generator=random)
    text = torch.randn(given.batch, 77, 768, generator=random)
    feature_maps: list[Tensor] = []

    def plain() -> None:
        network(sample, 500, text)

    def captured() -> None:
        with sdconv.capture(network, PATTERN) as found:
            plain()
        feature_maps[:] = [found.series(name)[0].tensor for name in found]

    def copied() -> None:
        copies = [one.clone() for one in feature_maps]
        del copies

    captured()  # also warms up
    rounds = []
    for number in range(given.rounds):
        # alternating, so that neither always comes first
        runs = (plain, captured) if number % 2 else (captured, plain)
        took = {run: timed(run) for run in (*runs, copied)}
        rounds.append((took[plain], took[captured], took[copied]))
    size = sum(one.nbytes for one in feature_maps)
    copies = f"copies of {len(feature_maps)} feature maps, {size / 1e6:.0f} MB"
    print(f"| time | plain | captured | {copies} |", end="")
    print(" added | beyond the copies |\n|---|---|---|---|---|---|")
    for kind, of in enumerate(("clock", "processor")):
        columns = [[took[kind] for took in column] for column in zip(*rounds, strict=True)]
        call, under, copied_in = map(statistics.median, columns)
        of_round = list(zip(*columns, strict=True))
        added = statistics.median((b - a) / a for a, b, _ in of_round)
        beyond = statistics.median((b - a - c) / a for a, b, c in of_round)
        print(
            f"| {of} | {call:.3f} s | {under:.3f} s | {copied_in:.3f} s "
            f"| {100 * added:+.1f} % | {100 * beyond:+.1f} % |"
        )


if __name__ == "__main__":
    main()
