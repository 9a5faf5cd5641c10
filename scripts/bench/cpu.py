"""Compares the fast backend on a CPU with its peers: times, memory, errors, all within one run.

Networks have full size and random weights. Each side has a process of its own; the sides take
turns, in an order that rotates from round to round, and medians are printed. Single layers take
turns in one process. Memory is the peak of a process's anonymous resident memory above that with
its weights loaded; the fast backend's packed weights are listed separately.

    python -m scripts.bench.cpu decode --size 512x512 --peers plain channels_last compiled openvino
    python -m scripts.bench.cpu encode --size 512x512
    python -m scripts.bench.cpu unet --size 64x64
    python -m scripts.bench.cpu unet-xl --size 128x128
    python -m scripts.bench.cpu tiny-decode --size 512x512
    python -m scripts.bench.cpu layers
    python -m scripts.bench.cpu memory --size 512x512
    python -m scripts.bench.cpu error --size 512x512
    python -m scripts.bench.cpu sizes --sizes 256 512 1024 2048 --plot docs/plots/sizes.webp
    python -m scripts.bench.cpu first --size 512x512
    python -m scripts.bench.cpu limits

Each takes --rounds, and --json FILE. `openvino` and `onnxruntime` need the `bench` extra. SDXL's
U-Net needs 10 GB of memory for each side.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sdconv
from scripts.bench.memory import Peak
from scripts.bench.plot import plot, slope
from scripts.bench.sides import (
    FAST,
    LABELS,
    PEERS,
    Run,
    Separate,
    Size,
    call,
    inputs_of,
    ours,
    side_of,
    size_of,
)
from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import Epilogue, conv3x3, plan_for
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import CONV3X3, OUTPUT_TILE, UPSAMPLE_CONV

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

# the default sizes of U-Nets
LATENTS: dict[str, Size] = {"unet": (64, 64), "unet-xl": (128, 128)}


def turns(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each run, after one warm-up call."""
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def network(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        names = (*options.peers, FAST)
        runs = {
            name: stack.enter_context(Separate(name, options.what, options.size)) for name in names
        }
        times = turns(runs, options.rounds)
    for name, seconds in times.items():
        yield {
            "work": f"{options.what} {options.size[0]}x{options.size[1]}",
            "side": LABELS[name],
            "seconds": round(seconds, 3),
            "over sdconv fast": round(seconds / times[FAST], 2),
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
            times = turns(runs, options.rounds)
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
    run = side_of(options.side, "decode", options.size)
    if options.side == FAST:
        # compiles kernels and packs weights before what is measured
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        scratch.release()
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


def _child(side: str, size: Size) -> dict[str, Any]:
    options = ["once", "--side", side, "--size", f"{size[0]}x{size[1]}"]
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
        found = _child(name, options.size)
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
            found = _child(name, (side, side))
            row[f"{name}, s"] = round(found["seconds"], 2)
            row[f"{name}, MB"] = round(found["peak"] / 1e6)
        rows.append((side, row))
        yield row
    slopes: dict[str, Any] = {"size": "slope"}
    for column in rows[0][1]:
        if column != "size":
            slopes[column] = round(slope([(side**2, row[column]) for side, row in rows]), 2)
    yield slopes
    if options.plot is not None:
        plot(rows, slopes, options.plot)


def limits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compares a decode's time with that of its matrix products alone."""
    rate = _product_rate()
    network = ours("decode")
    counts = {"direct": 0.0, "fast": 0.0}
    for name, convolution, height, width in _convolutions(network, options.size):
        channels, out_channels = convolution.in_channels, convolution.out_channels
        direct = convolution.kernel_size[0] ** 2 * channels * out_channels * height * width
        counts["direct"] += direct
        if convolution.kernel_size == (3, 3):
            scheme = UPSAMPLE_CONV if ".upsamplers." in name else CONV3X3
            direct *= scheme.positions / (9 * OUTPUT_TILE**2)
        counts["fast"] += direct
    seconds = turns({FAST: side_of(FAST, "decode", options.size)}, options.rounds)
    for method, multiplies in counts.items():
        least = 2 * multiplies / rate
        yield {
            "limit": f"{method} convolutions' products",
            "at, GFLOP/s": round(rate / 1e9),
            "seconds": round(least, 2),
            "whole decode over it": round(seconds[FAST] / least, 2),
        }


def _convolutions(network: Any, size: Size) -> list[tuple[str, nn.Conv2d, int, int]]:
    found: list[tuple[str, nn.Conv2d, int, int]] = []
    hooks = [
        part.register_forward_hook(
            lambda conv, _, out, name=name: found.append((name, conv, *out.shape[2:]))
        )
        for name, part in network.decoder.named_modules()
        if isinstance(part, nn.Conv2d)
    ]
    with torch.device("meta"):
        network.to("meta").decode(torch.empty(1, 4, size[0] // 8, size[1] // 8))
    for hook in hooks:
        hook.remove()
    return found


def _product_rate() -> float:
    """Operations a second of the fast backend's matrix products, where they are fastest."""
    kernels = kernels_for(torch.float32)
    left, right = torch.randn(36, 240, 512), torch.randn(36, 512, 512)
    packed, out = kernels.pack(right), torch.empty(36, 240, kernels.padded(512))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        kernels.bmm(left, packed, out)
        seconds.append(time.perf_counter() - start)
    return 2 * 36 * 240 * 512 * 512 / min(seconds)


def first(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the first call costs: compiling kernels (or reading compiled ones), packing weights."""
    for cache in ("as it is", "empty"):
        found = _first(cache, options.size)
        yield {"Numba's cache": cache, **{key: round(value, 2) for key, value in found.items()}}


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
print(json.dumps(dict(zip(("kernels, s", "first call, s", "second call, s"), (loading, *times)))))
"""


def _first(cache: str, size: Size) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as empty:
        environment = {"NUMBA_CACHE_DIR": empty} if cache == "empty" else {}
        return _answer(["-c", FIRST.format(size=size)], **environment)


WORKS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "decode": network,
    "encode": network,
    "unet": network,
    "unet-xl": network,
    "tiny-decode": network,
    "tiny-encode": network,
    "layers": layers,
    "memory": memory,
    "error": error,
    "sizes": sizes,
    "limits": limits,
    "first": first,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=(*WORKS, "once"))
    parser.add_argument("--size", type=size_of, help="of the image; of a U-Net's latents")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["plain", "channels_last"])
    parser.add_argument("--side", default=FAST, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--plot", type=Path, help="a file for the plot of `sizes`")
    options = parser.parse_args()
    options.size = options.size or LATENTS.get(options.what, (512, 512))
    with torch.inference_mode():
        if options.what == "once":
            once(options)
            return
        rows = []
        for row in WORKS[options.what](options):
            if not rows or list(row) != list(rows[-1]):
                print("| " + " | ".join(row) + " |\n|" + "---|" * len(row), flush=True)
            rows.append(row)
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    threads = torch.get_num_threads()
    print(f"\n({threads} threads, torch {torch.__version__}, {options.rounds} rounds)")
    if options.json is not None:
        options.json.write_text(json.dumps({"threads": threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
