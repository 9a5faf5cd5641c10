"""The photos that the small networks are trained on, and random crops of them.

Needs the ``train`` extra: the photos are those in the scikit-image package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor

# relative frequency of each photo; all are files of the scikit-image package, in the public domain,
# CC0 or without known restrictions (its docstrings say which)
PHOTOS: dict[Callable[[], np.ndarray], float] = {
    data.astronaut: 4,
    data.chelsea: 3,
    data.coffee: 3,
    data.rocket: 3,
    data.immunohistochemistry: 1,
    data.retina: 1,
    data.hubble_deep_field: 0.5,
    data.camera: 1,
    data.coins: 0.5,
    data.brick: 0.5,
    data.grass: 0.25,
    data.gravel: 0.25,
}
LARGEST_SIDE = 768


class Crops:
    """Random crops of the photos, in [-1, 1]: scaled, mirrored and recoloured; some are composed of
    two that meet along a line or a circle.

    ``scales``: smallest and largest scale of a photo in its crop. ``augmentation``: 0 to 1, how
    much colours change and how often crops are composed.
    """

    def __init__(self, scales: tuple[float, float], augmentation: float, seed: int) -> None:
        self.scales, self.augmentation = np.log(scales), augmentation
        self.photos = [photograph(load) for load in PHOTOS]
        weights = np.array(list(PHOTOS.values()), dtype=float)
        self.probabilities = weights / weights.sum()
        self.rng = np.random.default_rng(seed)
        self.noise = torch.Generator().manual_seed(seed)

    def batch(self, count: int, side: int) -> Tensor:
        """``(count, 3, side, side)``."""
        crops = np.stack([self._one(side) for _ in range(count)])
        images = torch.from_numpy(crops).float().permute(0, 3, 1, 2) * 2 - 1
        return images.contiguous(memory_format=torch.channels_last)

    def _one(self, side: int) -> np.ndarray:
        pixels = self._recoloured(self._cropped(side))
        if self.rng.random() >= 0.5 * self.augmentation:
            return pixels
        other = self._recoloured(self._cropped(side))
        return other + self._mask(side) * (pixels - other)

    def _cropped(self, side: int) -> np.ndarray:
        rng = self.rng
        photo = self.photos[rng.choice(len(self.photos), p=self.probabilities)]
        scale = math.exp(rng.uniform(*self.scales))
        size = min(side / scale, *photo.size)
        left, top = rng.uniform(0, photo.width - size), rng.uniform(0, photo.height - size)
        box = (left, top, left + size, top + size)
        crop = photo.resize((side, side), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(crop, dtype=np.float32) / 255
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels.transpose(1, 0, 2) if rng.random() < 0.2 else pixels

    def _recoloured(self, pixels: np.ndarray) -> np.ndarray:
        rng, strength = self.rng, self.augmentation
        if rng.random() < 0.5 * strength:
            pixels = pixels[..., rng.permutation(3)]
        grey = pixels.mean(axis=-1, keepdims=True)
        pixels = (grey + (1 + strength * rng.uniform(-0.3, 1.0)) * (pixels - grey)).clip(0, 1)
        # one gamma for all channels and one for each, which also tints the grey photos
        gamma = rng.uniform(-0.4, 0.4) + rng.uniform(-0.6, 0.6, size=3)
        pixels = pixels ** np.exp(strength * gamma)
        low = strength * rng.uniform(0, 0.15, size=3)
        high = 1 + strength * rng.uniform(-0.4, 0.1, size=3)
        return (low + (high - low) * pixels).clip(0, 1)

    def _mask(self, side: int) -> np.ndarray:
        """1 on one side of a random line or circle and 0 on the other, ``(side, side, 1)``."""
        rng = self.rng
        (x, y), angle = rng.uniform(0, side, size=2), rng.uniform(0, 2 * math.pi)
        across, down = np.arange(side)[None] - x, np.arange(side)[:, None] - y
        if rng.random() < 0.5:
            distance = across * math.cos(angle) + down * math.sin(angle)
        else:
            distance = np.hypot(across, down) - rng.uniform(0.1, 0.5) * side
        return (distance + 0.5).clip(0, 1)[..., None]


def photograph(load: Callable[[], np.ndarray]) -> Image.Image:
    """A photo in RGB, its longer side at most ``LARGEST_SIDE`` pixels."""
    photo = Image.fromarray(load()).convert("RGB")
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return photo
