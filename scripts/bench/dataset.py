"""Images per second of `sdconv.dataset.encode` and of a plain diffusers + DataLoader loop.

    python -m scripts.bench.dataset                      # 300 images at 256 and 512, the small VAE
    python -m scripts.bench.dataset --full --sizes 256   # a VAE of full size, weights from a seed
    python -m scripts.bench.dataset --plan 20000         # files per second of planning alone
    python -m scripts.bench.dataset --json out/data.json # goes on where it was, if it was ended

The images are divided over the rounds. In each, every side in turn encodes the round's images in
processes of its own; what is printed is all images over all seconds, from imports to the last file,
the seconds that the network waited for images (in the loop, those that `next` took), and the peak
memory of all of a side's processes together. Every side has the same number of processes: the
loop's network has the DataLoader's workers next to it and as many threads; sdconv's workers have a
network each, with one thread. Both write mean and log-variance of each image to the disk.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.bench.record import ROOT, table, write_whole

LOOP, FAST = "diffusers + DataLoader", "sdconv fast"
SIDES = (LOOP, "sdconv reference", FAST)
ROWS = 1024
"""Of each image, whatever size it is encoded at."""


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
        if side == LOOP:
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
        time.sleep(0.5)  # polling more often costs a noticeable share of a core
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


def write_images(folder: Path, numbers: range, side: int = ROWS) -> None:
    """Photo-like JPEGs: parts of the photo that ships, enlarged, each another one."""
    from PIL import Image

    photo = Image.open(ROOT / "weights" / "photo.jpg")
    folder.mkdir(parents=True)
    for number in numbers:
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
    for side in SIDES:
        source = inspect.getsource(loop if side == LOOP else sdconv_encode)
        body = source.partition('"""')[2].partition('"""\n')[2]
        count[side] = sum(bool(line.strip()) for line in body.splitlines())
    return count


def planning(files: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds of a first plan of many small images, and of one that finds nothing new."""
    from PIL import Image

    from sdconv.dataset.placement import parse_sizing
    from sdconv.dataset.plan import Plan, extended
    from sdconv.dataset.sources import find_images

    for number in range(100):  # that many sizes
        path = folder / f"{number:02d}" / "0.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (400 + 7 * number, 900 - 5 * number)).save(path)
        for other in range(1, -(-files // 100)):
            path.with_name(f"{other}.jpg").write_bytes(path.read_bytes())
    rows, old = [], Plan()
    for what in ("the first plan", "nothing new"):
        start = time.perf_counter()
        source = find_images(folder)
        found = extended(old, source, parse_sizing("buckets:1024"), 8, 1000, dict)
        seconds = time.perf_counter() - start
        assert found.new == (len(source.items) if what == "the first plan" else 0)
        rows.append(
            {
                "work": f"plan, {what}",
                "files": len(source.items),
                "seconds": round(seconds, 2),
                "files/s": round(len(source.items) / seconds),
            }
        )
        old = found
    return rows


Runs = dict[str, list[dict[str, float]]]


def row_of(work: str, side: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """A side's runs as one row."""
    images, seconds, waited = (
        sum(one[name] for one in found) for name in ("images", "seconds", "waited")
    )
    return {
        "work": work,
        "side": side,
        "images": int(images),
        "images/s": round(images / seconds, 3),
        "waited, s": round(waited, 1),
        "memory, MB": round(max(one["memory"] for one in found) / 1e6),
        "lines of code": lines_of_code()[side],
    }


def encoding(args: argparse.Namespace, folder: Path, runs: Runs, keep: Any) -> None:
    """Runs what is missing in ``runs``, and calls ``keep`` after each."""
    model = write_model(folder / "vae", args.full)
    share = -(-args.images // args.rounds)
    for size in args.sizes:
        for turn in range(args.rounds):
            numbers = range(turn * share, min(args.images, (turn + 1) * share))
            images = folder / f"images{turn}"
            if not images.exists():
                write_images(images, numbers)
            for side in args.sides:
                done = runs.setdefault(json.dumps([work_of(size, args), side]), [])
                if len(done) > turn or not numbers:
                    continue
                found = measured(side, size, args, images, model)
                done.append({**found, "images": len(numbers)})
                print(f"# {work_of(size, args)}, {side}: {found['seconds']:.1f} s", flush=True)
                keep()


def work_of(size: int, args: argparse.Namespace) -> str:
    return f"encode {size}x{size}, {'full-size' if args.full else 'small'} VAE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="over which they are divided")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--full", action="store_true", help="a VAE of full size")
    parser.add_argument("--plan", type=int, metavar="FILES", help="measure planning alone")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    for name in ("--side", "--folder", "--model"):
        parser.add_argument(name, type=str if name == "--side" else Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side, args)))
        return
    names = ("images", "sizes", "workers", "rounds", "sides", "full")
    told = {name: getattr(args, name) for name in names}
    runs: Runs = {}
    if args.json is not None and args.json.exists():
        before = json.loads(args.json.read_text("utf-8"))
        if before.get("options") != told:
            raise SystemExit(f"{args.json}: figures of other options; give another file")
        runs = before["runs"]
    rows: list[dict[str, Any]] = []

    def keep() -> None:
        if runs:
            named = ((json.loads(name), found) for name, found in runs.items() if found)
            rows[:] = [row_of(work, side, found) for (work, side), found in named]
        if args.json is not None:
            content = {"options": told, "runs": runs, "rows": rows}
            write_whole(args.json, json.dumps(content, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as name:
        if args.plan:
            rows += planning(args.plan, Path(name))
        else:
            encoding(args, Path(name), runs, keep)
    keep()
    print(table(rows))


if __name__ == "__main__":
    main()
