"""Trains ``weights/tiny-unet.safetensors``, a small U-Net like Stable Diffusion's for the tiny VAE.

    python -m scripts.train.train_tiny_unet  # made the file that ships, see weights/README.md

Needs the ``train`` extra, but no network connection. Uses the photos, crops and optimisers of the
tiny VAE's training, and takes minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdconv
from scripts.train.crops import Crops
from scripts.train.descent import Descent, update_average
from scripts.train.measure_tiny_unet import (
    MODEL,
    SIDE,
    VAE,
    context,
    encoded,
    evenly,
    held_out_latents,
    measure,
    noisy,
)
from scripts.train.train_tiny_vae import ROOT, STAGES
from sdconv.config import UNet2DConditionConfig
from sdconv.config.facts import TRAIN_TIMESTEPS
from sdconv.config.unet import CROSS_DOWN, CROSS_MID, CROSS_UP, DOWN, UP
from sdconv.integrations.diffusers import UNet2DConditionModel
from sdconv.models.blocks import ResnetBlock2D
from sdconv.models.vae import AutoencoderKL

TOKENS = 4

CONFIG = UNet2DConditionConfig(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
    mid_block_type=CROSS_MID,
    up_block_types=(UP, CROSS_UP, CROSS_UP),
    only_cross_attention=False,
    block_out_channels=(64, 96, 96),
    layers_per_block=1,
    norm_num_groups=32,
    cross_attention_dim=TOKENS,
    transformer_layers_per_block=1,
    reverse_transformer_layers_per_block=None,
    attention_head_dim=4,
    use_linear_projection=False,
    upcast_attention=False,
    class_embed_type=None,
    num_class_embeds=None,
    addition_embed_type=None,
    addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None,
    time_embedding_dim=None,
    time_cond_proj_dim=None,
)

STEPS = 1500
CROPS = 1024  # encoded before the first step
BATCH = 8  # for each worker
RATE = 2e-3
WORKERS = 2  # threads
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class NoisyLatents:
    """One worker's batches: random latents, timesteps and noise."""

    latents: Tensor
    generator: torch.Generator

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their timesteps and their noise."""
        chosen = torch.randint(len(self.latents), (BATCH,), generator=self.generator)
        x = self.latents[chosen]
        noise = torch.randn(x.shape, generator=self.generator)
        # stratified: one timestep from each of BATCH equal ranges
        ranges = torch.arange(BATCH) + torch.rand(BATCH, generator=self.generator)
        timesteps = (ranges * TRAIN_TIMESTEPS / BATCH).long().clamp(max=TRAIN_TIMESTEPS - 1)
        return noisy(x, noise, timesteps), timesteps, noise


def crop_latents(vae: AutoencoderKL, crops: Crops) -> Tensor:
    """The latents of one worker's crops: ``(CROPS / WORKERS, 4, 16, 16)``."""
    return encoded(vae, (crops.batch(1, SIDE) for _ in range(CROPS // WORKERS)))


def gradients(
    unet: UNet2DConditionModel, batches: NoisyLatents
) -> tuple[tuple[Tensor, ...], float]:
    """One worker's part of a step: the gradients and the loss of a batch."""
    x, timesteps, noise = batches.batch()
    loss = F.mse_loss(unet(x, timesteps, context(unet, len(x))).sample, noise)
    return torch.autograd.grad(loss, list(unet.parameters())), loss.item()


def initial_network() -> UNet2DConditionModel:
    """The network before training; every residual branch starts at zero."""
    network = UNet2DConditionModel(CONFIG).to(memory_format=torch.channels_last)
    nn.init.zeros_(network.conv_out.weight)
    for name, module in network.named_modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
    return network.train()


def save(average: UNet2DConditionModel, path: Path) -> None:
    """Writes the weights in float16."""
    sdconv.save(copy.deepcopy(average).half(), path)


def train(steps: int, seed: int, vae_path: Path, work: Path, out: Path) -> None:
    torch.manual_seed(seed)
    started = written = time.monotonic()
    pool = ThreadPoolExecutor(WORKERS)
    vae = sdconv.load(vae_path, dtype=torch.float32).to(memory_format=torch.channels_last)
    # the crops of the VAE's last stage
    stage = replace(STAGES[-1], steps=steps, horizon=steps, rate=RATE)
    crops = [Crops(stage.scales, stage.augmentation, seed + number) for number in range(WORKERS)]
    parts = list(pool.map(lambda source: crop_latents(vae, source), crops))
    latents = torch.cat(parts).contiguous(memory_format=torch.channels_last)
    print(f"{len(latents)} crops, standard deviation {latents.std():.3f}", flush=True)
    held_out = held_out_latents(vae, step=32)
    batches = [
        NoisyLatents(latents, torch.Generator().manual_seed(seed + number))
        for number in range(WORKERS)
    ]

    network = initial_network()
    average = copy.deepcopy(network).requires_grad_(False).eval()
    descent = Descent(network, pool)
    rows: list[dict[str, float]] = []
    window: list[float] = []
    for step in range(stage.steps):
        parts = list(pool.map(lambda source: gradients(network, source), batches))
        descent.step((grads for grads, _ in parts), stage.learning_rate(step))
        update_average(average, network, step)
        window += [loss for _, loss in parts]
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            written = time.monotonic()
            ratio = measure(average, held_out, evenly(10), seed=0).ratio
            row = {"minutes": (written - started) / 60, "step": step + 1, "loss": np.mean(window)}
            row |= {"held-out ratio": ratio}
            rows.append({name: round(float(value), 4) for name, value in row.items()})
            window.clear()
            print(rows[-1], flush=True)
            with (work / "loss.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
            save(average, work / "checkpoint.safetensors")
    save(average, out)
    minutes = (time.monotonic() - started) / 60
    print(f"{stage.steps} steps in {minutes:.1f} minutes: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "tiny-unet",
        help="folder for loss.csv and a checkpoint each minute",
    )
    parser.add_argument("--out", type=Path, default=MODEL)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.steps, args.seed, args.vae, args.work, args.out)


if __name__ == "__main__":
    main()
