"""Trains ``weights/tiny-vae.safetensors``: Stable Diffusion's VAE, but narrow, on a dozen photos.

    python -m scripts.train.train_tiny_vae    # what made the file that ships; see weights/README.md

Needs the ``train`` extra, and no network: every photo lies in the installed scikit-image. Some
hour and a half on two idle cores; a checkpoint each minute, and ``--stage`` goes on from a stage's
beginning.
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
from scripts.train.descent import Descent, follow
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
    """From step ``start`` of a stage on, each worker takes ``batch`` crops of ``side`` pixels."""

    start: int
    batch: int
    side: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``steps`` of the optimisers, from the averaged weights of the stage before.

    ``rate`` falls along a cosine that would be zero after ``horizon`` steps. ``scales``,
    ``wildness``: of the crops. ``edges``: weight of the differences between neighbours in the loss.
    """

    steps: int
    horizon: int
    rate: float
    phases: tuple[Phase, ...]
    scales: tuple[float, float]
    wildness: float
    edges: float

    def shortened(self, share: float) -> Stage:
        phases = tuple(replace(phase, start=int(phase.start * share)) for phase in self.phases)
        steps, horizon = (int(count * share) for count in (self.steps, self.horizon))
        return replace(self, steps=steps, horizon=max(horizon, WARM_UP + 1), phases=phases)

    def learning_rate(self, step: int) -> float:
        if step < WARM_UP:
            return self.rate * step / WARM_UP
        fallen = (step - WARM_UP) / (self.horizon - WARM_UP)
        return self.rate * 0.5 * (1 + math.cos(math.pi * min(fallen, 1)))


# any colours at first, so that a dozen photos teach the whole gamut; then those of photos
STAGES = (
    Stage(
        steps=3460,
        horizon=4660,
        rate=1e-3,
        phases=(Phase(start=0, batch=2, side=64), Phase(start=2760, batch=1, side=96)),
        scales=(0.4, 1.5),
        wildness=1.0,
        edges=0.02,
    ),
    Stage(
        steps=2754,
        horizon=2754,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=96), Phase(start=2080, batch=1, side=128)),
        scales=(0.35, 0.9),
        wildness=0.3,
        edges=0.005,
    ),
    Stage(
        steps=2090,
        horizon=2090,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=96), Phase(start=1450, batch=1, side=128)),
        scales=(0.35, 0.9),
        wildness=0.3,
        edges=0.0,
    ),
    Stage(
        steps=1306,
        horizon=2200,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=128),),
        scales=(0.35, 0.9),
        wildness=0.3,
        edges=0.0,
    ),
)


def reconstruction_loss(output: Tensor, target: Tensor, edges: float) -> Tensor:
    """Smooth L1 of the pixels and a little L1 of the differences between neighbours, at full, half,
    quarter and eighth size: the coarse sizes speak for colours, which fine detail would drown."""
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
    """One worker's share of a step: a batch's gradients; its loss, squared error in [0, 1], KL."""
    x = crops.batch(phase.batch, phase.side)
    posterior = network.encode(x).latent_dist
    output = network.decode(posterior.sample(crops.noise)).sample
    kl = posterior.kl().sum() / posterior.mean.numel()
    loss = reconstruction_loss(output, x, stage.edges)
    found = torch.autograd.grad(loss + KL_WEIGHT * kl, list(network.parameters()))
    error = F.mse_loss(output.detach().clamp(-1, 1), x) / 4
    return found, (loss.item(), error.item(), kl.item())


def fresh_network() -> AutoencoderKL:
    network = AutoencoderKL(CONFIG).to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):  # at first each block passes its input on
            nn.init.zeros_(module.conv2.weight)
    with torch.no_grad():  # the log-variance: little noise at first, so that the means are heard
        network.quant_conv.bias[CONFIG.latent_channels :] = -4.0
    return network


@torch.no_grad()
def save(average: AutoencoderKL, photos: list[Image.Image], path: Path) -> float:
    """Writes the weights in float16; scaled, the latents of the photos have unit deviation."""
    rounded = copy.deepcopy(average).half().float()
    pictures = np.stack([np.asarray(ImageOps.fit(photo, (256, 256))) for photo in photos])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    latents = torch.cat([rounded.encode(one).latent_dist.mode() for one in x.split(1)])
    factor = round(1 / latents.std().item(), 5)
    rounded.config = replace(CONFIG, scaling_factor=factor)
    sdconv.save(rounded.half(), path)
    return factor


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """The loss and the training crops' PSNR over the steps, as a picture."""
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
    """A row a minute: kept as CSV, and drawn at the end."""

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
    """One stage, from the checkpoint of the stage before to its own."""
    seeds = (seed + number * WORKERS + worker for worker in range(WORKERS))
    workers = [Crops(stage.scales, stage.wildness, one) for one in seeds]
    network = fresh_network()
    if number > 0:
        network.load_state_dict(sdconv.load(checkpoint, dtype=torch.float32).state_dict())
    average = copy.deepcopy(network).requires_grad_(False)
    earlier, steps_before = log.last("minutes"), int(log.last("step"))
    begun = written = time.monotonic()
    pool = ThreadPoolExecutor(WORKERS)
    descent = Descent(network, pool)
    for step in range(stage.steps):
        phase = [phase for phase in stage.phases if phase.start <= step][-1]
        # threads over parts of a batch meet once a step; threads inside operators would at each
        parts = list(pool.map(partial(gradients, network, stage, phase), workers))
        descent.step((part[0] for part in parts), stage.learning_rate(step))
        follow(average, network, step)
        log.window += [part[1] for part in parts]
        now = time.monotonic()
        if now - written > CHECKPOINT_SECONDS or step == stage.steps - 1:
            written = now
            done = {"minutes": earlier + (now - begun) / 60, "step": steps_before + step + 1}
            log.write(**done, side=phase.side)
            factor = save(average, workers[0].photos, checkpoint)
    print(f"stage {number}: {stage.steps} steps, scaling factor {factor}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stage", type=int, default=0, help="begin with this one, from the checkpoint in --work"
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
