"""Time, memory and error of one image over several ranks, compared with one process.

A full-size VAE with random weights; every process has one thread. Each round starts the processes
of each case anew: the first call gives the memory (the most anonymous resident bytes of a rank
above those before it), the second one the time. Errors are those against float64, relative to its
largest value. `distvae` is measured where it is installed.

    python -m scripts.bench.ranks --size 512x512 --errors --json out/ranks.json
    python -m scripts.bench.ranks --size 64x64 --errors --dtype bfloat16 --rounds 1
    python -m scripts.bench.ranks --work encode --ranks 2 3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, in the ranks too

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.bench.memory import Peak
from scripts.bench.record import table, write_whole
from scripts.bench.sides import call, inputs_of, ours, size_of, theirs
from sdconv.backends import backend
from sdconv.fast.cpu.kernels import numba_kernels

Call = Callable[[], Tensor]


def unstreamed(network: Any, work: str, x: Tensor) -> Call:
    return lambda: call(network, work, (x,))


def streamed(network: Any, work: str, x: Tensor) -> Call:
    network.enable_streaming(None, progress=False)
    return unstreamed(network, work, x)


def over_ranks(network: Any, work: str, x: Tensor) -> Call:
    network.enable_parallel(progress=False)
    return unstreamed(network, work, x)


def diffusers(network: Any, work: str, x: Tensor) -> Call:
    return unstreamed(theirs(network), work, x)


def distvae(network: Any, work: str, x: Tensor) -> Call:
    from distvae.vae import parallelize_decoder, parallelize_encoder

    peer = theirs(network)
    parallelize = {"decode": parallelize_decoder, "encode": parallelize_encoder}[work]
    parallelize(peer, dist.group.WORLD)
    return unstreamed(peer, work, x)


def cases(ranks: list[int]) -> list[tuple[str, int, str, Callable[..., Call]]]:
    """Name, number of ranks, backend and function of each case."""
    found: list[tuple[str, int, str, Callable[..., Call]]] = [
        ("diffusers", 1, "reference", diffusers)
    ]
    for name in ("reference", "fast"):
        found.append((f"sdconv {name}", 1, name, unstreamed))
        found.append((f"sdconv {name}, streamed", 1, name, streamed))
        found += [(f"sdconv {name}, over ranks", number, name, over_ranks) for number in ranks]
    if find_spec("distvae"):
        found += [("distvae", number, "reference", distvae) for number in ranks]
    return found


def work_as_rank(rank: int, case: Any, options: Any, folder: str, answers: Any) -> None:
    _, ranks, name, function = case
    where = f"file://{folder}/ranks"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
    if name == "fast":
        numba_kernels()
    with torch.no_grad(), backend(name):
        network = ours(options.work).to(options.dtype).requires_grad_(False)
        (x,) = inputs_of(options.work, options.size)
        run = function(network, options.work, x.to(options.dtype))
        dist.barrier()
        with Peak() as peak:
            out = run()
        if rank == 0 and options.errors:
            torch.save(out, f"{folder}/out")
        dist.barrier()
        start = time.perf_counter()
        run()
        dist.barrier()
        answers.put((time.perf_counter() - start, peak.bytes))
    os._exit(0)


def measured(case: Any, options: Any, exact: Tensor | None) -> tuple[float, float, float]:
    """Seconds, bytes of the rank with most, and the error, 0 if it is not asked for."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=work_as_rank, args=(rank, case, options, folder, answers))
            for rank in range(case[1])
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{case[0]}: a rank failed")
        found = [answers.get() for _ in processes]
        error = 0.0
        if exact is not None:
            out = torch.load(f"{folder}/out").double()
            error = float((out - exact).abs().max() / exact.abs().max())
    return max(seconds for seconds, _ in found), max(size for _, size in found), error


def rows_of(options: Any, chosen: Any, results: Any) -> list[dict[str, Any]]:
    """Medians of each case that has run, with its seconds over those of one rank."""
    (rows, columns), dtype = options.size, str(options.dtype).removeprefix("torch.")
    found, alone = [], dict[str, float]()
    for (name, ranks, _, _), runs in zip(chosen, results, strict=True):
        if not runs:
            continue
        seconds, size, error = (statistics.median(column) for column in zip(*runs, strict=True))
        side = name.removesuffix(", over ranks")
        if ranks == 1:
            alone[side] = seconds
        # distvae's network is diffusers'
        one = alone.get("diffusers" if side == "distvae" else side)
        found.append(
            {
                "work": f"{options.work} {rows}x{columns}",
                "dtype": dtype,
                "side": name,
                "ranks": ranks,
                "seconds": round(seconds, 2),
                "of one rank's": round(seconds / one, 2) if ranks > 1 and one else "",
                "memory of a rank, MB": round(size / 1e6),
                **({"error against float64": f"{error:.1e}"} if options.errors else {}),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", "-w", choices=("encode", "decode"), default="decode")
    parser.add_argument("--size", type=size_of, default=(512, 512))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--errors", action="store_true", help="against float64, which takes long")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", type=Path, help="a file for the figures, written as they come")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    exact = None
    if options.errors:
        with torch.no_grad():
            (x,) = inputs_of(options.work, options.size)
            network = ours(options.work).to(options.dtype).double()
            exact = call(network, options.work, (x.to(options.dtype).double(),))
    chosen = [case for case in cases(options.ranks) if options.only in case[0]]
    results: list[list[tuple[float, float, float]]] = [[] for _ in chosen]
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for case, found in zip(chosen, results, strict=True):
            found.append(measured(case, options, exact))
            seconds, size, error = found[-1]
            print(
                f"# {case[0]}, {case[1]}: {seconds:.2f} s, {size / 1e6:.0f} MB, {error:.1e}",
                flush=True,
            )
            rows = rows_of(options, chosen, results)
            if options.json is not None:
                write_whole(options.json, json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
