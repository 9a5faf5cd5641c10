"""Trains ``weights/tiny-vae.safetensors``, a narrow VAE like Stable Diffusion's, on a dozen photos.

    python -m scripts.train.train_tiny_vae    # made the file that ships, see weights/README.md

Needs the ``train`` extra, but no network connection: the photos are in the scikit-image package.
Takes about an hour and a half on two idle cores, with a checkpoint each minute; ``--stage`` resumes
at the beginning of a stage.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

import sdconv
from scripts.train.crops import Crops
from scripts.train.descent import Descent, update_average
from sdconv.config import AutoencoderKLConfig
from sdconv.models.blocks import ResnetBlock2D
from sdconv.models.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parents[2]

CONFIG = AutoencoderKLConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(64, 64, 64, 64),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=256,
    scaling_factor=1.0,  # measured at the end
    shift_factor=None,
    force_upcast=False,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
)

WARM_UP = 60  # steps
KL_WEIGHT = 1e-5
WORKERS = 2  # threads, each with its own crops
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The batches from step ``start`` of a stage: ``batch`` crops of ``side`` pixels per worker."""

    start: int
    batch: int
    side: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``steps`` of the optimisers, starting with the averaged weights of the previous stage.

    The learning rate falls from ``rate`` along a cosine that reaches zero after ``horizon`` steps.
    ``scales``, ``augmentation``: see ``Crops``. ``edges``: the weight of the differences between
    neighbouring pixels in the loss.
    """

    steps: int
    horizon: int
    rate: float
    phases: tuple[Phase, ...]
    scales: tuple[float, float]
    augmentation: float
    edges: float

    def shortened(self, share: float) -> Stage:
        """The stage with a share of its steps."""
        phases = tuple(replace(phase, start=int(phase.start * share)) for phase in self.phases)
        steps, horizon = (int(count * share) for count in (self.steps, self.horizon))
        return replace(self, steps=steps, horizon=max(horizon, WARM_UP + 1), phases=phases)

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step of the stage."""
        if step < WARM_UP:
            return self.rate * step / WARM_UP
        fallen = (step - WARM_UP) / (self.horizon - WARM_UP)
        return self.rate * 0.5 * (1 + math.cos(math.pi * min(fallen, 1)))


# strongly changed colours first, so that a dozen photos cover the whole gamut; then natural ones
STAGES = (
    Stage(
        steps=3460,
        horizon=4660,
        rate=1e-3,
        phases=(Phase(start=0, batch=2, side=64), Phase(start=2760, batch=1, side=96)),
        scales=(0.4, 1.5),
        augmentation=1.0,
        edges=0.02,
    ),
    Stage(
        steps=2754,
        horizon=2754,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=96), Phase(start=2080, batch=1, side=128)),
        scales=(0.35, 0.9),
        augmentation=0.3,
        edges=0.005,
    ),
    Stage(
        steps=2090,
        horizon=2090,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=96), Phase(start=1450, batch=1, side=128)),
        scales=(0.35, 0.9),
        augmentation=0.3,
        edges=0.0,
    ),
    Stage(
        steps=1306,
        horizon=2200,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=128),),
        scales=(0.35, 0.9),
        augmentation=0.3,
        edges=0.0,
    ),
)


def reconstruction_loss(output: Tensor, target: Tensor, edges: float) -> Tensor:
    """Smooth L1 of the pixels plus L1 of the differences between neighbouring pixels, at full,
    half, quarter and eighth size; the small sizes weigh colours, which fine detail would dominate.
    """
    loss = output.new_zeros(())
    for size in (1, 2, 4, 8):
        error = F.avg_pool2d(output - target, size)
        steps = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5)
        loss = loss + edges * steps
    return loss


def gradients(
    network: AutoencoderKL, stage: Stage, phase: Phase, crops: Crops
) -> tuple[tuple[Tensor, ...], tuple[float, float, float]]:
    """One worker's part of a step: a batch's gradients, and its loss, squared error in [0, 1] and
    KL divergence."""
    x = crops.batch(phase.batch, phase.side)
    posterior = network.encode(x).latent_dist
    output = network.decode(posterior.sample(crops.noise)).sample
    kl = posterior.kl().sum() / posterior.mean.numel()
    loss = reconstruction_loss(output, x, stage.edges)
    grads = torch.autograd.grad(loss + KL_WEIGHT * kl, list(network.parameters()))
    error = F.mse_loss(output.detach().clamp(-1, 1), x) / 4
    return grads, (loss.item(), error.item(), kl.item())


def initial_network() -> AutoencoderKL:
    """The network before training; every residual branch starts at zero."""
    network = AutoencoderKL(CONFIG).to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    with torch.no_grad():  # a small log-variance: little noise at first
        network.quant_conv.bias[CONFIG.latent_channels :] = -4.0
    return network


@torch.no_grad()
def save(average: AutoencoderKL, photos: list[Image.Image], path: Path) -> float:
    """Writes the weights in float16 and returns the scaling factor, with which the latents of the
    photos have unit standard deviation."""
    rounded = copy.deepcopy(average).half().float()
    images = np.stack([np.asarray(ImageOps.fit(photo, (256, 256))) for photo in photos])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = torch.cat([rounded.encode(one).latent_dist.mode() for one in x.split(1)])
    factor = round(1 / latents.std().item(), 5)
    rounded.config = replace(CONFIG, scaling_factor=factor)
    sdconv.save(rounded.half(), path)
    return factor


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Plots the loss and the PSNR of the training crops over the steps."""
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows])
    left.set(xlabel="steps", ylabel="training loss", yscale="log")
    right.plot(steps, [row["psnr"] for row in rows])
    right.set(xlabel="steps", ylabel="PSNR of training crops (dB)")
    ends = accumulate(stage.steps for stage in STAGES[:-1])
    for end, axes in product(ends, (left, right)):
        axes.axvline(end * steps[-1] / sum(stage.steps for stage in STAGES), color="grey", ls=":")
    figure.savefig(path, dpi=100)


class Log:
    """The training log: a row a minute, as CSV, and plotted at the end."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        if resume:
            with path.open(newline="") as file:
                self.rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        self.window: list[tuple[float, float, float]] = []

    def last(self, name: str) -> float:
        return self.rows[-1][name] if self.rows else 0.0

    def write(self, **row: float) -> None:
        loss, error, kl = np.mean(self.window, axis=0)
        self.window.clear()
        row |= {"loss": loss, "psnr": -10 * math.log10(error), "kl": kl}
        self.rows.append({name: round(float(value), 5) for name, value in row.items()})
        print(self.rows[-1], flush=True)
        with self.path.open("w", newline="") as file:
            table = csv.DictWriter(file, self.rows[0])
            table.writeheader()
            table.writerows(self.rows)


def train(number: int, stage: Stage, seed: int, log: Log, checkpoint: Path) -> None:
    """Trains one stage, from the checkpoint of the previous stage."""
    seeds = (seed + number * WORKERS + worker for worker in range(WORKERS))
    workers = [Crops(stage.scales, stage.augmentation, one) for one in seeds]
    network = initial_network()
    if number > 0:
        network.load_state_dict(sdconv.load(checkpoint, dtype=torch.float32).state_dict())
    average = copy.deepcopy(network).requires_grad_(False)
    earlier, steps_before = log.last("minutes"), int(log.last("step"))
    started = written = time.monotonic()
    pool = ThreadPoolExecutor(WORKERS)
    descent = Descent(network, pool)
    for step in range(stage.steps):
        phase = [phase for phase in stage.phases if phase.start <= step][-1]
        # threads over parts of a batch synchronise once a step, threads in operators at each one
        parts = list(pool.map(partial(gradients, network, stage, phase), workers))
        descent.step((grads for grads, _ in parts), stage.learning_rate(step))
        update_average(average, network, step)
        log.window += [losses for _, losses in parts]
        now = time.monotonic()
        if now - written > CHECKPOINT_SECONDS or step == stage.steps - 1:
            written = now
            done = {"minutes": earlier + (now - started) / 60, "step": steps_before + step + 1}
            log.write(**done, side=phase.side)
            factor = save(average, workers[0].photos, checkpoint)
    print(f"stage {number}: {stage.steps} steps, scaling factor {factor}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the steps, for a trial run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stage",
        type=int,
        default=0,
        help="the stage to start with, from the checkpoint in --work",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "tiny-vae",
        help="folder for loss.csv and a checkpoint each minute",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "weights" / "tiny-vae.safetensors")
    parser.add_argument("--curve", type=Path, default=ROOT / "weights" / "tiny-vae-loss.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    checkpoint = args.work / "checkpoint.safetensors"
    log = Log(args.work / "loss.csv", resume=args.stage > 0)
    for number, stage in list(enumerate(STAGES))[args.stage :]:
        train(number, stage.shortened(args.share), args.seed, log, checkpoint)
    print(f"{time.process_time() / 60:.1f} minutes of processor time", flush=True)
    shutil.copyfile(checkpoint, args.out)
    plot(log.rows, args.curve)


if __name__ == "__main__":
    main()
