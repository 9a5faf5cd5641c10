"""Images per second of `sdconv.dataset.encode` and of a plain diffusers + DataLoader loop.

    python -m scripts.bench.dataset                      # 300 images at 256 and 512, the small VAE
    python -m scripts.bench.dataset --full --images 20   # a VAE of full size, weights from a seed
    python -m scripts.bench.dataset --sizes 256 --workers 2 --rounds 3

Each side runs in processes of its own, in turn, several rounds; medians are printed, with the
seconds that the network waited for images (in the loop, those that `next` took) and the peak
memory of all of a side's processes together. Every side has the same number of processes: the
loop's network has the DataLoader's workers next to it and as many threads; sdconv's workers have a
network each, with one thread. Both write mean and log-variance of each image to the disk.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("loop", "sdconv reference", "sdconv fast")


def loop(folder: Path, model: Path, out: Path, size: int, workers: int) -> float:
    """The plain loop. Returns the seconds that it waited for images."""
    import diffusers
    import numpy as np
    import torch
    from PIL import Image, ImageOps
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            self.paths = sorted(folder.rglob("*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            image = ImageOps.exif_transpose(Image.open(self.paths[index])).convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(image))
            return pixels.permute(2, 0, 1).float() / 127.5 - 1, index

    torch.set_num_threads(workers)
    network = diffusers.AutoencoderKL.from_pretrained(model)
    images, waited = Images(), 0.0
    batches = iter(DataLoader(images, batch_size=1, num_workers=workers))
    with torch.inference_mode():
        for _ in range(len(images)):
            start = time.perf_counter()
            x, (index,) = next(batches)
            waited += time.perf_counter() - start
            posterior = network.encode(x).latent_dist
            tensors = {"mean": posterior.mean[0], "logvar": posterior.logvar[0]}
            save_file(tensors, out / f"{images.paths[index].stem}.safetensors")
    return waited


def sdconv_encode(
    folder: Path, model: Path, out: Path, size: int, workers: int, backend: str
) -> float:
    """sdconv's call. Returns the seconds that its networks waited for images, per worker."""
    from sdconv import dataset

    settings = dataset.Settings(backend=backend)
    options = dataset.Options(size=str(size), workers=workers, decoders=1, shard_size=25)
    return dataset.encode(folder, model, out, settings, options).waited / workers


def one_side(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Runs one side in this process: seconds in all, from imports to the last file."""
    with tempfile.TemporaryDirectory() as name:
        given = (args.folder, args.model, Path(name), args.sizes[0], args.workers)
        start = time.perf_counter()
        if side == "loop":
            waited = loop(*given)
        else:
            waited = sdconv_encode(*given, side.removeprefix("sdconv "))
        return {"seconds": time.perf_counter() - start, "waited": waited}


def measured(side: str, size: int, args: argparse.Namespace, folder: Path, model: Path) -> Any:
    """Runs one side in a process, and adds the peak memory of its tree in bytes."""
    command = [sys.executable, "-m", "scripts.bench.dataset", "--side", side, "--sizes", str(size)]
    command += ["--workers", str(args.workers), "--folder", str(folder), "--model", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    peak = 0
    while run.poll() is None:
        peak = max(peak, sum(map(_memory, _tree(run.pid))))
        time.sleep(0.1)
    assert run.stdout
    if run.returncode:
        raise SystemExit(f"{side} ended with {run.returncode}")
    return {**json.loads(run.stdout.read().splitlines()[-1]), "memory": peak}


def _tree(process: int) -> Iterator[int]:
    yield process
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text("ascii").split():
                yield from _tree(int(child))
    except OSError:
        return


def _memory(process: int) -> int:
    """A process's share of the memory (PSS), in bytes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def write_images(folder: Path, count: int, side: int) -> None:
    """Photo-like JPEGs: parts of the photo that ships, enlarged, each another one."""
    from PIL import Image

    photo = Image.open(ROOT / "weights" / "photo.jpg")
    folder.mkdir(parents=True)
    for number in range(count):
        left, top = number * 7 % 64, number * 13 % 64
        part = photo.crop((left, top, left + 192, top + 160))
        part.resize((side * 6 // 5, side), Image.Resampling.BICUBIC).save(
            folder / f"{number:05d}.jpg", quality=92
        )


def write_model(folder: Path, full: bool) -> Path:
    """A VAE in diffusers' form: the one that ships, or one of full size with seeded weights."""
    import torch

    import sdconv
    from sdconv.config import AutoencoderKLConfig
    from sdconv.loading import build

    if full:
        torch.manual_seed(0)
        config = AutoencoderKLConfig(
            **{
                **AutoencoderKLConfig.assumed,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
            }
        )
        network = build(config)
    else:
        network = sdconv.load(ROOT / "weights" / "tiny-vae.safetensors", dtype=torch.float32)
    sdconv.save(network, folder)
    return folder


def lines_of_code() -> dict[str, int]:
    """Lines that a user writes, without signatures and docstrings."""
    count = {}
    for side, function in (("loop", loop), ("sdconv", sdconv_encode)):
        body = inspect.getsource(function).partition('"""')[2].partition('"""\n')[2]
        count[side] = sum(bool(line.strip()) for line in body.splitlines())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="a VAE of full size")
    for name in ("--side", "--folder", "--model"):
        parser.add_argument(name, type=str if name == "--side" else Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side, args)))
        return
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "vae", args.full)
        write_images(Path(name) / "images", args.images, 2 * max(args.sizes))
        print(f"{args.images} images, {args.workers} workers, {args.rounds} rounds")
        print(f"{'size':>5}  {'side':<17} {'images/s':>9} {'waited s':>9} {'memory MB':>10}")
        for size in args.sizes:
            runs: dict[str, list[Any]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    runs[side].append(measured(side, size, args, Path(name) / "images", model))
            for side, found in runs.items():
                seconds, waited, memory = (
                    statistics.median(one[field] for one in found)
                    for field in ("seconds", "waited", "memory")
                )
                rate = args.images / seconds
                print(f"{size:>5}  {side:<17} {rate:>9.2f} {waited:>9.1f} {memory / 1e6:>10.0f}")
    code = ", ".join(f"{side} {count}" for side, count in lines_of_code().items())
    print(f"lines of code: {code}")


if __name__ == "__main__":
    main()
