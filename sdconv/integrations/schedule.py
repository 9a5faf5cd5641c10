"""diffusers' DDIM scheduler, for pictures out of noise and noise upon pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from sdconv.config.facts import BETAS, TRAIN_TIMESTEPS

# Stable Diffusion's
_SCHEDULE = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}


class Schedule:
    """Timesteps from noise to picture, without randomness (DDIM, Song et al. 2021).

    Args:
        steps: how many of the 1000 timesteps are visited.
        config: the file in which a pipeline says how it was trained; None for Stable Diffusion's
            schedule, predicting the noise.
    """

    def __init__(self, steps: int, config: Path | None = None) -> None:
        own = {} if config is None else DDIMScheduler.load_config(config)
        kept = {name: value for name, value in own.items() if not name.startswith("_")}
        self._scheduler = DDIMScheduler.from_config({**_SCHEDULE, **kept})
        self._scheduler.set_timesteps(steps)

    @property
    def timesteps(self) -> list[int]:
        """From the noisiest on."""
        return [int(timestep) for timestep in self._scheduler.timesteps]

    @property
    def predicts(self) -> str:
        """``epsilon``, the noise; or ``v_prediction`` or ``sample``."""
        return str(self._scheduler.config.prediction_type)

    def noisy(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Latents ``(B, C, H, W)`` as they are at a timestep."""
        when = torch.tensor([timestep], device=latents.device)
        mixed: Tensor = self._scheduler.add_noise(latents, noise, when)
        return mixed

    def next(self, prediction: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` one step nearer to the picture."""
        stepped: Tensor = self._scheduler.step(prediction, timestep, latents).prev_sample
        return stepped
