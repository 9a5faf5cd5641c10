"""Memory and time of the VAE in strips, beside its ordinary run and beside what was planned.

A full-size VAE with seeded random weights, float32, one case a process. Memory is the peak of
anonymous resident memory above what the process had with its weights in place. Time per pixel
leaves the middle's attention out, which grows with the square of the pixels; it is compared with
ordinary runs of a smaller picture in the same process and by the same backend. What the compiled
kernels' loading takes (``engine_memory``) is told apart, as is the network's own memory.

    python -m scripts.bench.streaming --size 2048x2048 --memory 2GiB --spill /var/tmp
    python -m scripts.bench.streaming --size 4096x4096 --memory 4GiB --spill /var/tmp --rounds 0
    python -m scripts.bench.streaming --size 1024x1024 --memory 512MiB --spill /var/tmp -w encode
    python -m scripts.bench.streaming --size 1024x1024 --backend reference
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.backends import BACKENDS, backend
from sdconv.config import AutoencoderKLConfig
from sdconv.fast.cpu import kernels as engines
from sdconv.models.vae import AutoencoderKL
from sdconv.streaming import Streaming, check_disk_space
from sdconv.streaming.calibration import predict_seconds
from sdconv.streaming.executor import run
from sdconv.streaming.steps import AttentionStep, StreamStep


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux: it reads /proc/self/status")


class Peak:
    """The most anonymous memory while it is entered, above what there was before."""

    def __enter__(self) -> Peak:
        self._before = self._most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = self._most - self._before


def full_size() -> AutoencoderKL:
    """The VAE of SD1, SD2 and SDXL, with random weights."""
    torch.manual_seed(0)
    own = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    network = AutoencoderKL(AutoencoderKLConfig(**{**AutoencoderKLConfig.assumed, **own}))
    return network.eval().requires_grad_(False)


def given(work: str, size: tuple[int, int]) -> Tensor:
    """What comes in, for a picture of this size."""
    height, width = size
    if work == "encode":
        return torch.randn(1, 3, height, width)
    return torch.randn(1, 4, height // 8, width // 8)


def ordinary(network: AutoencoderKL, work: str, size: tuple[int, int]) -> float:
    """Seconds per pixel of an ordinary run, attention apart."""
    block: Any = network.get_submodule(f"{work}r.mid_block.attentions.0")
    whole, inside = block.forward, 0.0

    def timed(x: Tensor) -> Tensor:
        nonlocal inside
        start = time.perf_counter()
        out: Tensor = whole(x)
        inside += time.perf_counter() - start
        return out

    block.forward = timed
    x = given(work, size)
    start = time.perf_counter()
    getattr(network, work)(x)
    seconds = time.perf_counter() - start
    del block.forward
    return (seconds - inside) / (size[0] * size[1])


def streamed(options: argparse.Namespace) -> dict[str, Any]:
    """One streamed run, its plan, and ordinary runs after it."""
    network = full_size()
    before = anonymous()
    if options.backend == "fast":
        engines.compiled()
    engine_bytes = anonymous() - before
    x = given(options.work, options.size)
    streaming = Streaming.of(options.memory, options.spill, False)
    plan = streaming.plan(network, options.work, x)
    if plan.spilled:
        check_disk_space(options.spill, plan.spilled)
    network_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    times = {"layers": 0.0, "attention": 0.0}
    last = 0.0

    def on_strip(step: StreamStep, done: int) -> None:
        nonlocal last
        now = time.perf_counter()
        times["attention" if isinstance(step, AttentionStep) else "layers"] += now - last
        last = now

    with Peak() as peak:
        out = torch.empty(plan.shape)
        last = time.perf_counter()
        # in a process that has computed nothing before: what kernels keep is counted
        run(plan, x, out, folder=options.spill, on_strip=on_strip)
    per_pixel = times["layers"] / (options.size[0] * options.size[1])
    result = {
        "work": options.work,
        "backend": options.backend,
        "size": "x".join(map(str, options.size)),
        "memory_limit": streaming.limit,
        "peak": peak.bytes,
        "planned_peak": plan.peak,
        "peak_over_planned": peak.bytes / plan.peak,
        "spilled": plan.spilled,
        "weights": network_bytes,
        "engine_memory": engine_bytes,
        "seconds": sum(times.values()),
        "attention_seconds": times["attention"],
        "ns_per_pixel": 1e9 * per_pixel,
        "finite": bool(out.isfinite().all()),
    }
    planned = predict_seconds(plan, device=x.device)
    result["planned_seconds"] = planned
    result["seconds_over_planned"] = sum(times.values()) / planned
    if options.rounds:
        ordinary(network, options.work, options.whole)
        rounds = [ordinary(network, options.work, options.whole) for _ in range(options.rounds)]
        result["whole_ns_per_pixel"] = 1e9 * statistics.median(rounds)
        result["over_whole"] = per_pixel / statistics.median(rounds)
    return result


def size_of(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", "-w", choices=("encode", "decode"), default="decode")
    parser.add_argument("--size", type=size_of, default=(1024, 1024))
    parser.add_argument("--memory", default=None, help="such as 2GiB; no limit if left out")
    parser.add_argument("--spill", type=Path, default=None)
    parser.add_argument("--whole", type=size_of, default=(512, 512), help="ordinary runs' size")
    parser.add_argument("--rounds", type=int, default=3, help="ordinary runs; 0 for none")
    parser.add_argument("--backend", choices=BACKENDS, default="fast")
    options = parser.parse_args()
    with torch.inference_mode(), backend(options.backend):
        print(json.dumps(streamed(options), indent=2), flush=True)


if __name__ == "__main__":
    main()
