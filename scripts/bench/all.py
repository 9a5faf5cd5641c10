"""Makes the figures of README and docs anew: every benchmark of a CPU, on one thread and on all
cores, into one file.

    python -m scripts.bench.all                               # everything, into out/bench.json
    python -m scripts.bench.all --only decode unet --threads 2 --minutes 20
    python -m scripts.bench.all --quick --out out/quick.json  # small sizes: does it all work?
    python -m scripts.bench.report --keep out/bench.json      # into docs/bench, and onto the pages

Each benchmark is a call of `scripts.bench.cpu` in a process of its own, whose command is kept with
its rows. The file is written after each, and a run that is started again goes on with those that
are missing or have failed. Figures of another machine or of other software are never mixed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.dataset import FAST, LOOP
from scripts.bench.record import ROOT, differences, machine, table, write_whole

RUNTIMES = ("openvino", "onnxruntime", "mnn", "ncnn")
BF16, F16 = ("--dtype", "bfloat16"), ("--dtype", "float16")
TORCHS = ("channels_last", "compiled")


Options = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One benchmark. ``what``: what it measures, by which `--only` chooses it. ``options``: of
    ``module``. ``minutes``: about what it takes on two cores without AVX-512. ``resumes``: one that
    was ended goes on with what is in its file."""

    what: str
    threads: int
    options: Options
    minutes: float
    module: str = "scripts.bench.cpu"
    resumes: bool = False

    @property
    def key(self) -> str:
        """The command, which is the key of its result."""
        return f"OMP_NUM_THREADS={self.threads} python {shlex.join(self.command)}"

    @property
    def command(self) -> list[str]:
        return ["-m", self.module, *self.options]


def tasks(cores: int, quick: bool) -> Iterator[Task]:
    """Every benchmark, the most wanted first; on one thread the shorter ones."""

    def rounds(usual: int) -> tuple[str, str]:
        return "--rounds", "1" if quick else str(usual)

    def sized(full: int, small: int) -> tuple[str, str]:
        side = small if quick else full
        return "--size", f"{side}x{side}"

    def compared(work: str, size: tuple[str, str], times: int, *peers: str) -> Options:
        return (work, *size, *rounds(times), "--peers", *peers)

    vae, unet = sized(512, 64), sized(64, 16)
    tiny = ("tiny-decode", "tiny-encode", "taef1-decode", "taef1-encode")
    yield Task("decode", cores, compared("decode", vae, 3, *TORCHS, *RUNTIMES), 11)
    bf16 = (*BF16, *rounds(5), "--peers", "channels_last", "openvino_bf16")
    yield Task("decode-bf16", cores, ("decode", *vae, *bf16), 4)
    yield Task("encode", cores, compared("encode", vae, 3, *TORCHS, "openvino", "mnn"), 4)
    yield Task("encode-bf16", cores, ("encode", *vae, *bf16), 3)
    for peer in (*TORCHS, "openvino"):  # by itself: few machines have room for more
        yield Task("unet", cores, compared("unet", unet, 3, peer), 1.5)
    yield Task("unet-bf16", cores, ("unet", *unet, *bf16), 3)
    # small ones: torch's own take minutes where the processor does not compute in float16
    f16 = (*F16, *rounds(1), "--peers")
    yield Task("unet-f16", cores, ("unet", *sized(32, 16), *f16), 4)
    yield Task("encode-f16", cores, ("encode", *sized(128, 64), *f16), 2)
    for work in tiny:
        peers = (*TORCHS, *RUNTIMES) if work.startswith("tiny") else TORCHS
        yield Task(work, cores, compared(work, vae, 3, *peers), 1.5)
    yield Task("without-numba", cores, ("without-numba", *sized(256, 64), *rounds(3)), 1)
    yield Task("memory", cores, ("memory", *vae), 2)
    yield Task("memory-bf16", cores, ("memory", *vae, *BF16), 2)
    yield Task("limits", cores, ("limits", *vae, *rounds(3)), 2)
    if not quick:
        xl = ("limits", "--of", "unet-xl", "--size", "1024x1024", *rounds(2))
        yield Task("limits", cores, xl, 4)
    yield Task("first", cores, ("first", *vae, *rounds(9)), 4.5)
    yield Task("parts", cores, ("parts", "--of", "decode", *vae, *rounds(2)), 2)
    yield Task("parts", cores, ("parts", "--of", "unet", *unet, *rounds(2)), 1.5)
    yield Task("decode", cores, compared("decode", sized(320, 96), 3, *TORCHS), 3)
    if not quick:
        yield Task("layers", cores, ("layers", *rounds(3)), 4)
        yield Task("unet-xl", cores, compared("unet-xl", ("--size", "128x128"), 2), 6)
    sides = ("64", "96") if quick else ("256", "384", "512", "768", "1024")
    yield Task("sizes", cores, ("sizes", "--sizes", *sides), 8)
    yield Task("error", cores, ("error", *sized(256, 64)), 5)
    streamed: Options = (*sized(1024, 128), "--memory", "1GiB", "--spill", "/var/tmp")
    streamed += ("--whole", sized(512, 64)[1], *rounds(3))
    yield Task("streaming", cores, streamed, 3, "scripts.bench.streaming")
    yield from data_sets(cores, quick)
    if cores == 1:
        return
    yield Task("decode", 1, compared("decode", sized(320, 64), 3, *TORCHS, *RUNTIMES), 9)
    yield Task("encode", 1, compared("encode", sized(320, 64), 3, *TORCHS), 3)
    yield Task("unet", 1, compared("unet", unet, 2, "channels_last"), 4)
    for work in tiny:
        yield Task(work, 1, compared(work, vae, 2, *TORCHS), 1.5)
    if not quick:
        yield Task("layers", 1, ("layers", *rounds(2)), 5)


def data_sets(cores: int, quick: bool) -> Iterator[Task]:
    """Many images, and one over several ranks, which have one thread each."""
    ranks, dataset = "scripts.bench.ranks", "scripts.bench.dataset"
    yield Task("planning", cores, ("--plan", "500" if quick else "20000"), 1, dataset)
    if quick:
        few = ("--sizes", "32", "--images", "4", "--rounds", "2")
        yield Task("dataset", cores, few, 1, dataset)
        small = ("--size", "64x64", "--errors", "--rounds", "1", "--ranks", str(min(cores, 2)))
        yield Task("ranks", 1, small, 1, ranks)
        return
    for sizes, minutes in (("256", 6), ("512", 18)):
        yield Task("dataset", cores, ("--sizes", sizes), minutes, dataset, True)
    two = ("--sides", LOOP, FAST)
    for sizes, minutes in (("256", 14), ("512", 57)):
        full = ("--full", "--sizes", sizes, *two)
        yield Task("dataset", cores, full, minutes, dataset, True)
    if cores > 1:
        size = ("--size", "512x512", "--errors", "--rounds")
        yield Task("ranks", 1, (*size, "2"), 15, ranks)
        yield Task("ranks", 1, ("--work", "encode", *size, "2"), 8, ranks)
        bf16 = ("--size", "64x64", "--errors", *BF16, "--rounds", "1")
        yield Task("ranks", 1, bf16, 8, ranks)


def run(task: Task) -> dict[str, Any]:
    """A benchmark's rows; with "failed" if it ended with an error, after the rows until then."""
    with tempfile.TemporaryDirectory() as folder:
        file = unfinished(task) if task.resumes else Path(folder) / "rows.json"
        begin, load = time.monotonic(), os.getloadavg()[0]
        ran = subprocess.run(
            [sys.executable, *task.command, "--json", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(task.threads)},
        )
        rows = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
        if not ran.returncode:
            file.unlink(missing_ok=True)
    found = {
        "what": task.what,
        "threads": task.threads,
        "load before": round(load, 2),
        "seconds": round(time.monotonic() - begin, 1),
        "rows": rows,
    }
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"ends with {ran.returncode}"]
        found["failed"] = lines[-1]
    return found


def unfinished(task: Task) -> Path:
    """The file of a benchmark that goes on when it is started again, with the same software."""
    same = [task.key, {**machine(), "date": None, "time": None}]
    name = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
    return ROOT / "out" / "unfinished" / f"{name}.json"


def begun(path: Path, quick: bool) -> dict[str, Any]:
    """A file's content, or a new one for this machine.

    Raises:
        SystemExit: it is another machine's, or of another kind.
    """
    here = machine()
    if not path.exists():
        return {"format": 1, "quick": quick, "machine": here, "results": {}}
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    others = differences(content["machine"], here)
    if others or content["quick"] != quick:
        what = f"other {', '.join(others)}" if others else "other sizes"
        raise SystemExit(f"{path}: figures with {what}; give another file: --out FILE")
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    cores = len(os.sched_getaffinity(0))
    every = list(dict.fromkeys(task.what for task in tasks(cores, False)))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench.json")
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="WHAT")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, cores], metavar="N")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--list", action="store_true", help="print what would run, and minutes")
    options = parser.parse_args(arguments)
    chosen = [
        task
        for task in tasks(cores, options.quick)
        if task.what in options.only and task.threads in options.threads
    ]
    if options.list:
        for task in chosen:
            print(f"{'' if options.quick else f'{task.minutes:4.1f} min  '}{task.key}")
        if not options.quick:
            print(f"{sum(task.minutes for task in chosen):4.0f} min in all")
        return 0
    content = begun(options.out, options.quick)
    results, begin, bad = content["results"], time.monotonic(), 0
    for task in chosen:
        if task.key in results and "failed" not in results[task.key]:
            continue
        spent = (time.monotonic() - begin) / 60
        if options.minutes is not None and spent + task.minutes > options.minutes:
            print(f"# left out for want of time: {task.key}", flush=True)
            continue
        print(f"# {task.key}", flush=True)
        results[task.key] = found = run(task)
        write_whole(options.out, json.dumps(content, indent=1) + "\n")
        print(table(found["rows"]), flush=True)
        if "failed" in found:
            bad += 1
            print(f"failed: {found['failed']}\n", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
