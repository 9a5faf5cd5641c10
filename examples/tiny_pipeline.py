"""A diffusers pipeline with the two small networks that ship, for the other examples.

For a checkpoint of your own, use `diffusers.DiffusionPipeline.from_pretrained(folder)` instead, and
a prompt. The small U-Net was trained without text: in place of a prompt it has four learned tokens,
which the identity matrix selects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import sdconv

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def tiny_pipeline() -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with sdconv's networks."""
    pipe = StableDiffusionPipeline(
        vae=sdconv.load(WEIGHTS / "tiny-vae.safetensors", dtype=torch.float32),
        unet=sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        ),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: StableDiffusionPipeline, steps: int, size: int, **more: Any) -> Any:
    """One image from the noise of seed 0."""
    return pipe(
        prompt_embeds=torch.eye(4)[None],
        guidance_scale=1,
        num_inference_steps=steps,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(0),
        **more,
    ).images
