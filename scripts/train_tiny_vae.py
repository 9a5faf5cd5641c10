"""Trains ``weights/tiny-vae.safetensors``: Stable Diffusion's VAE, but narrow, on a dozen photos.

    python scripts/train_tiny_vae.py    # what made the file that ships; see weights/README.md

Needs the ``train`` extra, and no network: every photo lies in the installed scikit-image. Bounded
by wall-clock time, so a slower or busier machine takes fewer steps and ends elsewhere: the seed
fixes the crops and the noise, not the pace.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from skimage import data
from torch import Tensor, nn

import sdconv
from sdconv.blocks import ResnetBlock2D
from sdconv.config import AutoencoderKLConfig
from sdconv.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parent.parent

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

# how often each is drawn; only files inside the scikit-image package, in the public domain, CC0 or
# without known restrictions (its docstrings say which)
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

WARM_UP = 0.7  # minutes
EMA_DECAY = 0.999
KL_WEIGHT = 1e-5
WORKERS = 2  # threads, each with its own crops
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From minute ``start`` of a stage on, each worker takes ``batch`` crops of ``side`` pixels."""

    start: float
    batch: int
    side: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of the optimisers over ``minutes``, from the averaged weights of the stage before.

    ``rate`` falls along a cosine that would be zero after ``horizon`` minutes. ``scales``: of the
    photos in a crop. ``wildness``: how far colours are changed, and how often crops are composed.
    ``edges``: weight of the differences between neighbours in the loss.
    """

    minutes: float
    horizon: float
    rate: float
    phases: tuple[Phase, ...]
    scales: tuple[float, float]
    wildness: float
    edges: float

    def learning_rate(self, minute: float) -> float:
        if minute < WARM_UP:
            return self.rate * minute / WARM_UP
        fallen = (minute - WARM_UP) / (self.horizon - WARM_UP)
        return self.rate * 0.5 * (1 + math.cos(math.pi * min(fallen, 1)))


# any colours at first, so that a dozen photos teach the whole gamut; then those of photos
STAGES = (
    Stage(
        minutes=52,
        horizon=70,
        rate=1e-3,
        phases=(Phase(start=0, batch=2, side=64), Phase(start=42, batch=1, side=96)),
        scales=(0.4, 1.5),
        wildness=1.0,
        edges=0.02,
    ),
    Stage(
        minutes=26,
        horizon=26,
        rate=6e-4,
        phases=(Phase(start=0, batch=1, side=96), Phase(start=19, batch=1, side=128)),
        scales=(0.35, 0.9),
        wildness=0.3,
        edges=0.005,
    ),
)
MINUTES = sum(stage.minutes for stage in STAGES)


class Crops:
    """Random crops of the photos, in [-1, 1]: scaled, mirrored, recoloured; some composed of two,
    that meet along a line or a circle."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.scales, self.wildness = np.log(stage.scales), stage.wildness
        self.photos = [photograph(load) for load in PHOTOS]
        weights = np.array(list(PHOTOS.values()), dtype=float)
        self.chances = weights / weights.sum()
        self.rng = np.random.default_rng(seed)
        self.noise = torch.Generator().manual_seed(seed)

    def batch(self, phase: Phase) -> Tensor:
        """``(batch, 3, side, side)``."""
        crops = np.stack([self._one(phase.side) for _ in range(phase.batch)])
        pictures = torch.from_numpy(crops).float().permute(0, 3, 1, 2) * 2 - 1
        return pictures.contiguous(memory_format=torch.channels_last)

    def _one(self, side: int) -> np.ndarray:
        pixels = self._recoloured(self._cropped(side))
        if self.rng.random() >= 0.5 * self.wildness:
            return pixels
        other = self._recoloured(self._cropped(side))
        return other + self._cut(side) * (pixels - other)

    def _cropped(self, side: int) -> np.ndarray:
        rng = self.rng
        photo = self.photos[rng.choice(len(self.photos), p=self.chances)]
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
        rng, wild = self.rng, self.wildness
        if rng.random() < 0.5 * wild:
            pixels = pixels[..., rng.permutation(3)]
        grey = pixels.mean(axis=-1, keepdims=True)
        pixels = (grey + (1 + wild * rng.uniform(-0.3, 1.0)) * (pixels - grey)).clip(0, 1)
        # one gamma for all and one for each channel, which also tints the grey photos
        gamma = rng.uniform(-0.4, 0.4) + rng.uniform(-0.6, 0.6, size=3)
        pixels = pixels ** np.exp(wild * gamma)
        low, high = wild * rng.uniform(0, 0.15, size=3), 1 + wild * rng.uniform(-0.4, 0.1, size=3)
        return (low + (high - low) * pixels).clip(0, 1)

    def _cut(self, side: int) -> np.ndarray:
        """1 on one side of a random line or circle and 0 on the other, ``(side, side, 1)``."""
        rng = self.rng
        (x, y), angle = rng.uniform(0, side, size=2), rng.uniform(0, 2 * math.pi)
        across, down = np.arange(side)[None] - x, np.arange(side)[:, None] - y
        if rng.random() < 0.5:
            distance = across * math.cos(angle) + down * math.sin(angle)
        else:
            distance = np.hypot(across, down) - rng.uniform(0.1, 0.5) * side
        return (distance + 0.5).clip(0, 1)[..., None]


class Muon:
    """Momentum whose matrices are made nearly orthogonal before each step (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon), scaled to move as far as Adam would (Liu et al.
    2025, https://arxiv.org/abs/2502.16982). A convolution counts as a matrix of ``(out, in*h*w)``.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.state = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float, pool: ThreadPoolExecutor) -> None:
        list(pool.map(lambda pair: self._move(*pair, rate), self.state))

    def _move(self, parameter: nn.Parameter, momentum: Tensor, rate: float) -> None:
        with torch.no_grad():
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 0.05)
            update = parameter.grad.lerp(momentum, 0.95).flatten(1)
            tall = update.shape[0] > update.shape[1]
            x = update.T if tall else update
            x = x / (x.norm() + 1e-12)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = (x.T if tall else x).reshape(parameter.shape)
            parameter.sub_(x, alpha=rate * 0.2 * math.sqrt(max(update.shape)))


def photograph(load: Callable[[], np.ndarray]) -> Image.Image:
    photo = Image.fromarray(load()).convert("RGB")
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return photo


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
    x = crops.batch(phase)
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
def follow(average: AutoencoderKL, network: AutoencoderKL, step: int) -> None:
    """Moves the averaged weights towards the network's, quickly while there is little to keep."""
    share = 1 - min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)


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
    """The loss and the training crops' PSNR over time, as a picture."""
    import matplotlib.pyplot as plt

    minutes = [row["minutes"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(minutes, [row["loss"] for row in rows])
    left.set(xlabel="minutes", ylabel="training loss", yscale="log")
    right.plot(minutes, [row["psnr"] for row in rows])
    right.set(xlabel="minutes", ylabel="PSNR of training crops (dB)")
    ends = accumulate(stage.minutes for stage in STAGES[:-1])
    for end, axes in product(ends, (left, right)):
        axes.axvline(end * minutes[-1] / MINUTES, color="grey", linestyle=":")
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


def train(number: int, share: float, seed: int, log: Log, checkpoint: Path) -> None:
    """One stage, from the checkpoint of the stage before to its own; ``share`` of its full time."""
    stage = STAGES[number]
    workers = [Crops(stage, seed + number * WORKERS + worker) for worker in range(WORKERS)]
    network = fresh_network()
    if number > 0:
        network.load_state_dict(sdconv.load(checkpoint, dtype=torch.float32).state_dict())
    average = copy.deepcopy(network).requires_grad_(False)
    matrices = [p for p in network.parameters() if p.ndim > 1 and min(p.shape[:2]) >= 32]
    chosen = {id(p) for p in matrices}
    rest = [p for p in network.parameters() if id(p) not in chosen]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0)
    earlier, steps_before = log.last("minutes"), int(log.last("step"))
    begun = written = time.monotonic()
    step = 0
    pool = ThreadPoolExecutor(WORKERS)
    while (minute := (time.monotonic() - begun) / 60 / share) < stage.minutes:
        phase = [phase for phase in stage.phases if phase.start <= minute][-1]
        # threads over parts of a batch meet once a step; threads inside operators would at each
        parts = list(pool.map(partial(gradients, network, stage, phase), workers))
        found = zip(*(part[0] for part in parts), strict=True)
        for parameter, grads in zip(network.parameters(), found, strict=True):
            parameter.grad = torch.stack(grads).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        rate = stage.learning_rate(minute)
        muon.step(2 * rate, pool)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        follow(average, network, step)
        step += 1
        log.window += [part[1] for part in parts]
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            written = time.monotonic()
            minutes = earlier + (written - begun) / 60
            log.write(minutes=minutes, step=steps_before + step, side=phase.side)
            save(average, workers[0].photos, checkpoint)
    factor = save(average, workers[0].photos, checkpoint)
    print(f"stage {number}: {step} steps, scaling factor {factor}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of wall-clock time")
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
    for number in range(args.stage, len(STAGES)):
        train(number, args.minutes / MINUTES, args.seed, log, checkpoint)
    shutil.copyfile(checkpoint, args.out)
    plot(log.rows, args.curve)


if __name__ == "__main__":
    main()
