"""Memory and time of the streamed VAE, compared with its ordinary run and with its plan.

A full-size VAE with random weights, one case per process. Memory is the peak of the
process's anonymous resident memory above that with its weights loaded; that of the Numba kernels
(``kernel_memory``) and of the network are listed separately. Time per pixel excludes the mid
block's attention, which grows with the square of the pixels; it is compared with ordinary runs on a
smaller image in the same process and by the same backend.

    python -m scripts.bench.streaming --size 2048x2048 --memory 2GiB --spill /var/tmp
    python -m scripts.bench.streaming --size 4096x4096 --memory 4GiB --spill /var/tmp --rounds 0
    python -m scripts.bench.streaming --size 1024x1024 --memory 512MiB --spill /var/tmp -w encode
    python -m scripts.bench.streaming --size 1024x1024 --backend reference
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.bench.memory import Peak, anonymous
from scripts.bench.record import write_whole
from scripts.bench.sides import Size, inputs_of, ours, size_of
from sdconv.backends import BACKENDS, backend
from sdconv.fast.cpu.kernels import numba_kernels
from sdconv.streaming import Streaming, check_disk_space
from sdconv.streaming.calibration import predict_seconds
from sdconv.streaming.executor import run
from sdconv.streaming.steps import AttentionStep, StreamStep


def ordinary(network: Any, work: str, size: Size) -> float:
    """Seconds per pixel of an ordinary run, without attention."""
    block: Any = network.get_submodule(f"{work}r.mid_block.attentions.0")
    whole, inside = block.forward, 0.0

    def timed(x: Tensor) -> Tensor:
        nonlocal inside
        start = time.perf_counter()
        out: Tensor = whole(x)
        inside += time.perf_counter() - start
        return out

    block.forward = timed
    x = inputs_of(work, size)[0].to(next(network.parameters()).dtype)
    start = time.perf_counter()
    getattr(network, work)(x)
    seconds = time.perf_counter() - start
    del block.forward
    return (seconds - inside) / (size[0] * size[1])


def streamed(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one streamed run, of its plan, and of ordinary runs after it."""
    dtype = getattr(torch, options.dtype)
    network = ours("decode").to(dtype).requires_grad_(False)
    before = anonymous()
    if options.backend == "fast":
        numba_kernels()
    kernel_bytes = anonymous() - before
    x = inputs_of(options.work, options.size)[0].to(dtype)
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
        out = x.new_empty(plan.shape)
        last = time.perf_counter()
        # in a process that has computed nothing before: what kernels keep is counted
        run(plan, x, out, folder=options.spill, on_strip=on_strip)
    per_pixel = times["layers"] / (options.size[0] * options.size[1])
    result = {
        "work": options.work,
        "backend": options.backend,
        "dtype": options.dtype,
        "size": "x".join(map(str, options.size)),
        "memory_limit": streaming.limit,
        "peak": peak.bytes,
        "planned_peak": plan.peak,
        "peak_over_planned": peak.bytes / plan.peak,
        "spilled": plan.spilled,
        "weights": network_bytes,
        "kernel_memory": kernel_bytes,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", "-w", choices=("encode", "decode"), default="decode")
    parser.add_argument("--size", type=size_of, default=(1024, 1024))
    parser.add_argument("--memory", default=None, help="such as 2GiB; default: no limit")
    parser.add_argument("--spill", type=Path, default=None)
    parser.add_argument("--whole", type=size_of, default=(512, 512), help="of the ordinary runs")
    parser.add_argument("--rounds", type=int, default=3, help="number of ordinary runs, 0 for none")
    parser.add_argument("--backend", choices=BACKENDS, default="fast")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    with torch.inference_mode(), backend(options.backend):
        found = streamed(options)
    print(json.dumps(found, indent=2), flush=True)
    if options.json is not None:
        write_whole(options.json, json.dumps({"rows": [shown(found)]}, indent=1) + "\n")


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """The figures as a row of a table."""
    return {
        "work": f"{found['work']} {found['size']}"
        + ("" if found["dtype"] == "float32" else f", {found['dtype']}"),
        "limit, MB": round(found["memory_limit"] / 1e6) if found["memory_limit"] else "",
        "peak, MB": round(found["peak"] / 1e6),
        "of the plan": round(found["peak_over_planned"], 2),
        "spilled, MB": round(found["spilled"] / 1e6),
        "seconds": round(found["seconds"], 1),
        "of the planned": round(found["seconds_over_planned"], 2),
        "each pixel, over an unstreamed one": round(found["over_whole"], 2)
        if "over_whole" in found
        else "",
    }


if __name__ == "__main__":
    main()
