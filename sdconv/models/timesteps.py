"""A timestep as a vector: the U-Net's sinusoid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# the slowest wave's period is this many times 2 pi steps (Vaswani et al. 2017, section 3.5)
MAX_PERIOD = 10000


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """``[cos(t w_0), ..., cos(t w_n), sin(t w_0), ..., sin(t w_n)]`` with ``w_i = 10000^(-i/n)``.

    Cosines first, as in ``timestep_embedding`` of ``ldm/modules/diffusionmodules/util.py``.

    Args:
        timesteps: ``(N,)``, of any dtype; may be fractions.
        width: of the result, even.

    Returns:
        ``(N, width)`` in float32, whatever the network computes in.
    """
    half = width // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(
        half, dtype=torch.float32, device=timesteps.device
    )
    angles = torch.outer(timesteps.float(), torch.exp(exponents / half))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
