"""How much time a network's products take alone, at the rate of the fastest matrix products."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench.sides import FAST, Size, call, inputs_of, medians, ours, side_of
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, OUTPUT_TILE, UPSAMPLE_CONV, Scheme


def limits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compares a decode, an encode and a step of SD1.5's U-Net with their products, or the works
    that are asked for."""
    rate = _product_rate()
    for work in options.of or ("decode", "encode", "unet"):
        height, width = options.size
        size = (height // 8, width // 8) if work.startswith("unet") else (height, width)
        direct, fast, whole = _multiplies(work, size)
        seconds = medians({FAST: side_of(FAST, work, size)}, options.rounds)[FAST]
        for of, multiplies in (
            ("convolutions, direct", direct),
            ("convolutions, fast", fast),
            ("all products, fast", whole - direct + fast),
        ):
            least = 2 * multiplies / rate
            yield {
                "work": f"{work} {size[0]}x{size[1]}",
                "limit": of,
                "at, GFLOP/s": round(rate / 1e9),
                "seconds": round(least, 2),
                "whole work over it": round(seconds / least, 2),
            }


def _multiplies(work: str, size: Size) -> tuple[float, float, float]:
    """Multiply-accumulates of the convolutions, directly and by their schemes, and of all layers,
    convolved directly."""
    network = ours(work).to("meta")
    counts = {"direct": 0.0, "fast": 0.0}

    def count(name: str, conv: nn.Conv2d, out: torch.Tensor) -> None:
        pixels = out[0, 0].numel() * conv.kernel_size[0] * conv.kernel_size[1]
        direct = pixels * conv.in_channels * conv.out_channels
        scheme = _scheme(name, conv)
        counts["direct"] += direct
        counts["fast"] += direct * (scheme.positions / (9 * OUTPUT_TILE**2) if scheme else 1)

    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda conv, _, out, name=name: count(name, conv, out))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        call(network, work, tuple(one.to("meta") for one in inputs_of(work, size)))
    return counts["direct"], counts["fast"], counter.get_total_flops() / 2


def _scheme(name: str, conv: nn.Conv2d) -> Scheme | None:
    """The scheme by which the fast backend computes a convolution of a large feature map."""
    if conv.kernel_size != (3, 3):
        return None
    if conv.stride == (2, 2):
        return DOWNSAMPLE_CONV if conv.padding == (0, 0) else None
    return UPSAMPLE_CONV if ".upsamplers." in name else CONV3X3


def _product_rate() -> float:
    """Operations a second of the fast backend's matrix products, where they are fastest."""
    kernels = kernels_for(torch.float32)
    left, right = torch.randn(36, 240, 512), torch.randn(36, 512, 512)
    packed, out = kernels.pack(right), torch.empty(36, 240, kernels.padded(512))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        kernels.bmm(left, packed, out)
        seconds.append(time.perf_counter() - start)
    return 2 * 36 * 240 * 512 * 512 / min(seconds)
