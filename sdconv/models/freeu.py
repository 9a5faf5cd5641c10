"""FreeU (Si et al. 2023, https://arxiv.org/abs/2309.11497): amplifies the backbone and attenuates
the skip connections' low frequencies in the up path of a U-Net."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import fftn, fftshift, ifftn, ifftshift


def amplified(x: Tensor, factor: float) -> Tensor:
    """Multiplies the first half of the channels of ``x`` ``(B, C, H, W)`` by ``factor``."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * factor, x[:, half:]], dim=1)


def low_frequencies_scaled(x: Tensor, factor: float) -> Tensor:
    """Multiplies the lowest frequencies of ``x`` ``(B, C, H, W)``, 0 and -1 cycles along each axis,
    by ``factor``, in float32."""
    waves = fftshift(fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = waves.shape[-2] // 2, waves.shape[-1] // 2
    mask = torch.ones(waves.shape, device=x.device)
    mask[..., row - 1 : row + 1, column - 1 : column + 1] = factor
    waves = ifftshift(waves * mask, dim=(-2, -1))
    result: Tensor = ifftn(waves, dim=(-2, -1)).real.to(x.dtype)
    return result
