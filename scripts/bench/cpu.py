"""Compares the fast backend on a CPU with its peers: times, memory, errors, all within one run.

Networks have full size and random weights. Each side has a process of its own; the sides take
turns, in an order that rotates from round to round, and medians are printed. Single layers take
turns in one process. Memory is the peak of a process's anonymous resident memory above that with
its weights loaded; the fast backend's packed weights are listed separately.

    python -m scripts.bench.cpu decode --size 512x512 --peers channels_last compiled openvino mnn
    python -m scripts.bench.cpu decode --size 512x512 --dtype bfloat16 --peers openvino_bf16
    python -m scripts.bench.cpu encode --size 512x512
    python -m scripts.bench.cpu unet --size 64x64
    python -m scripts.bench.cpu unet-xl --size 128x128 --peers
    python -m scripts.bench.cpu tiny-decode --size 512x512
    python -m scripts.bench.cpu taef1-encode --size 512x512
    python -m scripts.bench.cpu without-numba --size 256x256
    python -m scripts.bench.cpu parts --of unet
    python -m scripts.bench.cpu layers
    python -m scripts.bench.cpu memory --size 512x512
    python -m scripts.bench.cpu error --size 512x512
    python -m scripts.bench.cpu sizes --sizes 256 512 1024 2048
    python -m scripts.bench.cpu first --size 512x512
    python -m scripts.bench.cpu limits

Each takes --rounds, and --json FILE. The runtimes `openvino`, `openvino_bf16`, `onnxruntime`, `mnn`
and `ncnn` need the `bench` extra. `python -m scripts.bench.all` runs all of it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import sdconv
from scripts.bench.limits import limits
from scripts.bench.memory import Peak
from scripts.bench.parts import parts
from scripts.bench.plot import slope
from scripts.bench.record import available_memory, table, write_whole
from scripts.bench.sides import (
    FAST,
    LABELS,
    LATENTS,
    NETWORKS,
    PEERS,
    PLAIN_KERNELS,
    REFERENCE,
    Run,
    Separate,
    SideError,
    Size,
    call,
    inputs_of,
    medians,
    ours,
    side_of,
    size_of,
    turns,
)
from sdconv.fast.cpu.buffer_pool import release_memory
from sdconv.fast.cpu.conv import Epilogue, conv3x3, plan_for
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.loading import build

ROOT = Path(__file__).parents[2]

# 3x3 convolutions of stride 1: (input channels, output channels, size)
VAE = (
    *((512, 512, 64), (512, 512, 128), (512, 256, 256), (256, 256, 256), (256, 128, 512)),
    *((128, 128, 512), (128, 256, 256), (256, 512, 128)),
)
SD15 = (
    *((320, 320, 64), (640, 320, 64), (960, 320, 64), (320, 640, 32), (640, 640, 32)),
    *((960, 640, 32), (1280, 640, 32), (1920, 640, 32), (640, 1280, 16), (1280, 1280, 16)),
    *((1920, 1280, 16), (2560, 1280, 16), (1280, 1280, 8), (2560, 1280, 8)),
)
SDXL = (
    *((320, 320, 128), (640, 320, 128), (960, 320, 128), (320, 640, 64), (640, 640, 64)),
    *((960, 640, 64), (1280, 640, 64), (1920, 640, 64), (640, 1280, 32), (1280, 1280, 32)),
    *((1920, 1280, 32), (2560, 1280, 32)),
)

# of the largest value: how far a side's output may be from diffusers' to be timed
TOLERANCE, TOLERANCE_BF16 = 1e-3, 5e-2


def network(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each side's output is compared with diffusers' before it is timed."""
    others = [name for name in options.peers if name != "plain"]
    narrow, dtype = options.dtype != "float32", getattr(torch, options.dtype)
    work = f"{options.what} {options.size[0]}x{options.size[1]}"
    work += f", {options.dtype}" if narrow else ""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        # the largest network is held once, by all sides
        shared = stack.enter_context(Separate()) if options.what == "unet-xl" else None
        expected: Any = None
        for name in ("plain", FAST, *others):
            rows[name] = {"work": work, "side": LABELS[name]}
            side = shared or stack.enter_context(Separate())
            try:
                check_room(options.what, name, side is shared and expected is not None)
                out = side.begin(name, options.what, options.size, dtype)
            except SideError as error:
                rows[name]["failed"] = str(error)
                continue
            if name == "plain":
                expected = out
            off = math.inf if expected is None else difference(out, expected)
            rows[name]["difference"] = f"{off:.0e}"
            if off <= (TOLERANCE_BF16 if narrow or name.endswith("bf16") else TOLERANCE):
                runs[name] = partial(side.run, name)
            else:
                rows[name]["failed"] = "not timed: its output is not diffusers'"
        times = turns(runs, options.rounds)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, row in rows.items():
        if name in middle:
            row["seconds"] = round(middle[name], 3)
            if FAST in middle:
                row["over sdconv fast"] = round(middle[name] / middle[FAST], 2)
            row["all seconds"] = [round(one, 4) for one in times[name]]
        yield row


def check_room(work: str, name: str, shared: bool) -> None:
    """Refuses a side for which there is too little memory next to those that have begun.

    Raises:
        SideError: it needs more than is free.
    """
    with torch.device("meta"):
        weights = 4 * sum(one.numel() for one in build(NETWORKS[work]).parameters())
    # packed weights and copies of converters; a runtime's own copy
    copies = {"plain": 0, "channels_last": 1, "compiled": 1, FAST: 0.5}.get(name, 2)
    need = int(((0 if shared else 1) + copies) * weights) + (2 << 30)
    free = available_memory()
    if need > free:
        raise SideError(f"needs about {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")


def difference(out: Any, expected: Any) -> float:
    """The largest difference over the largest value; infinity if the shapes differ."""
    if out.shape != expected.shape:
        return math.inf
    return float(abs(out - expected).max() / abs(expected).max())


def without_numba(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A decode by the reference, by torch's kernels and by Numba's: a first call and later ones."""
    names = (REFERENCE, PLAIN_KERNELS, FAST)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Separate()) for name in names}
        first = {}
        for name, side in sides.items():
            side.begin(REFERENCE, "decode", (64, 64))  # imports, and makes the weights
            start = time.perf_counter()
            side.begin(name, "decode", options.size)
            first[name] = time.perf_counter() - start
        runs = {name: partial(side.run, name) for name, side in sides.items()}
        times = turns(runs, options.rounds)
    for name in names:
        yield {
            "decode": f"{options.size[0]}x{options.size[1]}",
            "side": name,
            "first call, s": round(first[name], 2),
            "seconds": round(statistics.median(times[name]), 2),
        }


def layers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each 3x3 convolution with its bias, compared with torch's in either memory layout."""
    ratios = []
    for family, shapes in (("VAE", VAE), ("SD1.5 U-Net", SD15), ("SDXL U-Net", SDXL)):
        for channels, out_channels, side in shapes:
            x = torch.randn(1, channels, side, side)
            weight = torch.randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
            bias = torch.randn(out_channels)
            runs = _layer(x, weight, bias)
            times = medians(runs, options.rounds)
            torchs = min(times["torch"], times["torch, channels_last"])
            ratios.append(torchs / times["fast"])
            yield {
                "network": family,
                "channels": f"{channels} -> {out_channels}",
                "size": f"{side}x{side}",
                "method": plan_for("conv3x3", x, weight, False).method,
                "torch, ms": round(1e3 * torchs, 1),
                "fast, ms": round(1e3 * times["fast"], 1),
                "ratio": round(ratios[-1], 2),
            }
            weight_cache.clear()
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    yield {"network": "geometric mean", "ratio": round(mean, 2)}
    yield {"network": "least", "ratio": round(min(ratios), 2)}


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Run]:
    last = x.contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    return {
        "torch": lambda: functional.conv2d(x, weight, bias, padding=1),
        "torch, channels_last": lambda: functional.conv2d(last, weight_last, bias, padding=1),
        "fast": lambda: conv3x3(last, weight, None, Epilogue(bias), groups=1)[0],
    }


def once(options: argparse.Namespace) -> None:
    """One side's peak, in a process of its own; JSON on standard output."""
    dtype = getattr(torch, options.dtype)
    run = side_of(options.side, "decode", options.size, dtype=dtype)
    if options.side == FAST:
        # compiles kernels and packs weights before what is measured
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        release_memory()
    else:
        first = 0.0
    # memory that was freed returns to the system
    ctypes.CDLL(None).malloc_trim(0)
    with Peak() as peak:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    kept = weight_cache.memory
    print(json.dumps({"peak": peak.bytes, "kept": kept, "seconds": seconds, "first": first}))


def _child(side: str, size: Size, dtype: str) -> dict[str, Any]:
    options = ["once", "--side", side, "--size", f"{size[0]}x{size[1]}", "--dtype", dtype]
    return _answer(["-m", "scripts.bench.cpu", *options])


def _answer(command: list[str], **environment: str) -> dict[str, Any]:
    """The JSON that a Python process prints last."""
    done = subprocess.run(
        [sys.executable, *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    peaks: dict[str, int] = {}
    for name in ("plain", "channels_last", FAST):
        found = _child(name, options.size, options.dtype)
        peaks[name] = found["peak"]
        yield {
            "side": LABELS[name],
            "activations and scratch, MB": round(found["peak"] / 1e6),
            "packed weights, MB": round(found["kept"] / 1e6),
            "of diffusers'": round(found["peak"] / peaks["plain"], 3),
        }


def error(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Errors of a decode against float64: streamed and not, in 32 and in 16 bits."""
    full: Any = ours("decode")
    inputs = inputs_of("decode", options.size)
    exact = call(copy.deepcopy(full).double(), "decode", tuple(x.double() for x in inputs))
    scale = float(exact.abs().max())
    for name, dtype in (
        ("reference", torch.float32),
        ("fast", torch.float32),
        ("reference", torch.bfloat16),
        ("fast", torch.bfloat16),
        ("fast", torch.float16),  # torch's own takes minutes on many CPUs
    ):
        network = copy.deepcopy(full).to(dtype)
        given_now = tuple(x.to(dtype) for x in inputs)
        with sdconv.backend(name):
            whole = call(network, "decode", given_now)
            network.enable_streaming()
            streamed = call(network, "decode", given_now)
        difference = whole.double() - exact
        noise = float(difference.square().mean())
        yield {
            "backend": name,
            "dtype": str(dtype).removeprefix("torch."),
            "largest error": f"{float(difference.abs().max()) / scale:.1e}",
            "PSNR, dB": round(10 * math.log10((2 * scale) ** 2 / noise), 1),
            "streamed, from that": f"{float((streamed - whole).abs().max()) / scale:.1e}",
        }


def sizes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decodes of squares: seconds and peak of each side, one process each."""
    rows = []
    for side in options.sizes:
        row: dict[str, Any] = {"size": f"{side}x{side}"}
        for name in ("channels_last", FAST):
            found = _child(name, (side, side), options.dtype)
            row[f"{name}, s"] = round(found["seconds"], 2)
            row[f"{name}, MB"] = round(found["peak"] / 1e6)
        rows.append((side, row))
        yield row
    slopes: dict[str, Any] = {"size": "slope"}
    for column in rows[0][1]:
        if column != "size":
            slopes[column] = round(slope([(side**2, row[column]) for side, row in rows]), 2)
    yield slopes


def first(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the first call costs: compiling kernels (or reading compiled ones), packing weights."""
    for cache, rounds in (("as it is", options.rounds), ("empty", 1)):
        found = [_first(cache, options.size) for _ in range(rounds)]
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        row = {key: round(value, 2) for key, value in middle.items()}
        yield {"Numba's cache": cache, "processes": rounds, **row}


FIRST = """
import json, time
from scripts.bench import cpu as bench
from sdconv.fast.cpu.kernels import numba_kernels
run = bench.side_of(bench.FAST, "decode", {size!r})
_, loading = numba_kernels()
times = []
import torch
with torch.inference_mode():
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
names = ("kernels, s", "first call, s", "second call, s", "first over second")
print(json.dumps(dict(zip(names, (loading, *times, times[0] / times[1])))))
"""


def _first(cache: str, size: Size) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as empty:
        environment = {"NUMBA_CACHE_DIR": empty} if cache == "empty" else {}
        return _answer(["-c", FIRST.format(size=size)], **environment)


WORKS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    **dict.fromkeys(NETWORKS, network),
    "without-numba": without_numba,
    "parts": parts,
    "layers": layers,
    "memory": memory,
    "error": error,
    "sizes": sizes,
    "limits": limits,
    "first": first,
}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=(*WORKS, "once"))
    parser.add_argument("--size", type=size_of, help="of the image; of a U-Net's latents")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["plain", "channels_last"])
    parser.add_argument("--of", nargs="*", choices=NETWORKS, help="of `parts` and `limits`")
    parser.add_argument("--side", default=FAST, help=argparse.SUPPRESS)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of networks and `memory`",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the rows, written as they come")
    options = parser.parse_args(arguments)
    if options.what == "parts" and len(options.of or ()) > 1:
        parser.error("parts are measured of one work: name one after --of")
    work = (options.of or ["decode"])[0] if options.what == "parts" else options.what
    options.size = options.size or LATENTS.get(work, (512, 512))
    return options


def main() -> None:
    options = parsed()
    with torch.inference_mode():
        if options.what == "once":
            once(options)
            return
        rows: list[dict[str, Any]] = []
        for row in WORKS[options.what](options):
            rows.append(row)
            if options.json is not None:
                write_whole(options.json, json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(
        f"({torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
