"""The tiny autoencoders in their author's architecture, with seeded weights."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor, nn


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Block(nn.Module):
    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        three = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        self.conv = nn.Sequential(next(three), nn.ReLU(), next(three), nn.ReLU(), next(three))
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


def downsample(before: int, width: int, bias: bool) -> nn.Module:
    return nn.Conv2d(before, width, 3, 2, 1, bias=bias)


def blocks(width: int, count: int, pooled: bool = False) -> list[nn.Module]:
    return [Block(width, pooled) for _ in range(count)]


def encoder(latent: int, pooled: bool) -> nn.Sequential:
    layers = [nn.Conv2d(3, 64, 3, 1, 1), *blocks(64, 1)]
    for stage in range(3):
        layers += [downsample(64, 64, False), *blocks(64, 3, pooled and stage == 2)]
    return nn.Sequential(*layers, nn.Conv2d(64, latent, 3, 1, 1))


def sana_encoder(latent: int) -> nn.Sequential:
    layers = [
        downsample(3, 32, True),
        nn.ReLU(),
        downsample(32, 64, True),
        nn.ReLU(),
        *blocks(64, 1),
    ]
    for _ in range(3):
        layers += [downsample(64, 64, False), *blocks(64, 3)]
    return nn.Sequential(*layers, nn.Conv2d(64, latent, 3, 1, 1))


def decoder(latent: int, widths: tuple[int, ...], pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent, widths[0], 3, 1, 1), nn.ReLU()]
    for stage, width in enumerate(widths[:-1]):
        layers += [*blocks(width, 3, pooled and stage == 0), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(width, widths[stage + 1], 3, 1, 1, bias=False)]
    return nn.Sequential(*layers, *blocks(widths[-1], 1), nn.Conv2d(widths[-1], 3, 3, 1, 1))


SANA = (256, 128, 64, 64, 64, 64)

AUTHORS = {
    "taesd": (lambda: encoder(4, False), lambda: decoder(4, (64,) * 4, False)),
    "taef1": (lambda: encoder(16, False), lambda: decoder(16, (64,) * 4, False)),
    "taef2": (lambda: encoder(32, True), lambda: decoder(32, (64,) * 4, True)),
    "taesana": (lambda: sana_encoder(32), lambda: decoder(32, SANA, False)),
}


def author(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """The author's encoder and decoder, with seeded weights."""
    halves = []
    for seed, build in enumerate(AUTHORS[name]):
        half = build().eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in half.state_dict().items()}
        half.load_state_dict(seeded.weights(shapes, seed))
        halves.append(half)
    return halves[0], halves[1]


def files(folder: Path, *halves: nn.Module) -> list[Path]:
    """Writes each module to its own file, with layer numbers as names, as the author does."""
    paths = [folder / f"{number}.safetensors" for number in range(len(halves))]
    for path, half in zip(paths, halves, strict=True):
        save_file(half.state_dict(), path)
    return paths
