"""Stable Diffusion's noise schedule with diffusers' DDIM scheduler."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from sdconv.config.facts import BETAS, TRAIN_TIMESTEPS

_STABLE_DIFFUSION = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}


class Schedule:
    """Timesteps from noise to image, without added randomness (DDIM, Song et al. 2021).

    Args:
        steps: how many of the 1000 training timesteps are visited.
        config: a pipeline's ``scheduler_config.json``; its fields replace those of Stable
            Diffusion's schedule, which predicts the noise.
    """

    def __init__(self, steps: int, config: Path | None = None) -> None:
        fields = {} if config is None else DDIMScheduler.load_config(config)
        public = {name: value for name, value in fields.items() if not name.startswith("_")}
        self._scheduler = DDIMScheduler.from_config({**_STABLE_DIFFUSION, **public})
        self._scheduler.set_timesteps(steps)

    @property
    def timesteps(self) -> list[int]:
        """The timesteps, the noisiest first."""
        return [int(timestep) for timestep in self._scheduler.timesteps]

    @property
    def prediction_type(self) -> str:
        """``epsilon`` (the noise), ``v_prediction`` or ``sample``."""
        return str(self._scheduler.config.prediction_type)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Latents ``(B, C, H, W)`` with the noise that belongs to a timestep."""
        noisy: Tensor = self._scheduler.add_noise(
            latents, noise, torch.tensor([timestep], device=latents.device)
        )
        return noisy

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` with the noise of the next timestep, which has less."""
        previous: Tensor = self._scheduler.step(prediction, timestep, latents).prev_sample
        return previous
