"""Where the time of one fast decode goes, by operation and shape, and how near that is to a bound.

The bound of an operation is the longer of two times: its multiplications at the measured rate of a
matrix product, and the bytes of its inputs and output at the measured bandwidth of a copy (the
``environment`` stage's). Upsampling is folded into its convolution here, so a network of such
operations takes at least the sum. ``share`` is the bound over the time taken: 1 is the ceiling.
A kernel that torch started for no operation of its own (Triton's) has a name and no shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.gpu import networks
from scripts.gpu.options import Options
from scripts.gpu.precision import BFLOAT16, FLOAT32
from scripts.gpu.record import Record, plain, read
from scripts.gpu.stages.speed import FAST, Work, caller
from scripts.gpu.timing import once, timed

ROWS = 40
# what the profiler also calls an operation: calls of the driver's, and its own work
OVERHEAD = ("cu", "Activity Buffer")
Shapes = tuple[tuple[int, ...], ...]
# microseconds by operation and shapes, and how often each ran
Spent = tuple[Counter[tuple[str, Shapes]], Counter[tuple[str, Shapes]]]


@torch.no_grad()
def run(record: Record, options: Options) -> None:
    precision = FLOAT32 if options.device == "cpu" else BFLOAT16
    work = Work(networks.SDXL_VAE, "decode", 64 if options.small else 1024, 1, precision)
    network = networks.built(work.network, precision.dtype, options).requires_grad_(False)
    network.to(memory_format=torch.channels_last)
    call = caller(network, work, FAST, options)
    timing = timed(call, options.device, runs=3 if options.small else 20, seconds=2)
    record.facts(**work.values, side=FAST.name, milliseconds=timing.milliseconds)
    spent, counts = profiled(call, options.device)
    total = sum(spent.values())
    ceilings = ceilings_of(record, precision.name)
    record.facts(**ceilings, profiled_milliseconds=total / 1e3)
    bounds = {key: bound(*key, precision.dtype.itemsize, ceilings) for key in spent}
    for (name, shapes), time in spent.most_common(ROWS):
        each = bounds[name, shapes]
        taken = time / counts[name, shapes]
        record.row(
            f"{name} {shapes}",
            operation=name,
            shapes=" ".join("x".join(map(str, shape)) for shape in shapes),
            calls=counts[name, shapes],
            milliseconds=time / 1e3,
            of_total=time / total,
            bound_milliseconds=None if each is None else counts[name, shapes] * each / 1e3,
            share=None if each is None else each / taken,
        )
    known = sum(counts[key] * each for key, each in bounds.items() if each is not None)
    record.facts(
        bound_milliseconds=known / 1e3 if known else None,
        share=known / 1e3 / timing.milliseconds if known else None,
    )


def profiled(call: Callable[[], Any], device: str) -> Spent:
    """Profiles one run."""
    once(call, device)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=activities, record_shapes=True) as prof:
        once(call, device)
    return (by_kernel if device == "cuda" else by_operation)(prof.events())


def by_operation(events: Iterable[Any]) -> Spent:
    """On a CPU: the time that each operation spent outside of others."""
    spent: Counter[tuple[str, Shapes]] = Counter()
    counts: Counter[tuple[str, Shapes]] = Counter()
    for event in events:
        key = event.name, _shapes(event.input_shapes)
        spent[key] += event.self_cpu_time_total
        counts[key] += 1
    return spent, counts


def by_kernel(events: Iterable[Any]) -> Spent:
    """On CUDA: the kernels' time, by the operation that started each; by the kernel's own name
    where none did."""
    spent: Counter[tuple[str, Shapes]] = Counter()
    counts: Counter[tuple[str, Shapes]] = Counter()
    every: Counter[tuple[str, Shapes]] = Counter()
    numbers: Counter[tuple[str, Shapes]] = Counter()
    for event in events:
        if "CUDA" in str(event.device_type):
            if getattr(event, "is_user_annotation", False):
                continue  # a span of kernels that are counted on their own
            every[event.name, ()] += event.time_range.elapsed_us()
            numbers[event.name, ()] += 1
            continue
        if not event.kernels or event.name.startswith(OVERHEAD):
            continue
        key = event.name, _shapes(event.input_shapes)
        counts[key] += 1
        for kernel in event.kernels:
            spent[key] += kernel.duration
            every[kernel.name, ()] -= kernel.duration
            numbers[kernel.name, ()] -= 1
    for key, time in every.items():
        if numbers[key] > 0 and time > 0:
            spent[key] += time
            counts[key] += numbers[key]
    return spent, counts


def _shapes(shapes: Any) -> Shapes:
    """The shapes of an operation's tensors."""
    found = (shape for shape in shapes or () if shape and not isinstance(shape, int))
    # a list of tensors has a list of shapes
    return tuple(tuple(shape) for shape in found if all(isinstance(n, int) for n in shape))


def bound(name: str, shapes: Shapes, itemsize: int, ceilings: dict[str, Any]) -> float | None:
    """Microseconds that one call takes at least; None if that is not known."""
    products, numbers = work_of(name, shapes)
    rate, bandwidth = ceilings["rate"], ceilings["bandwidth"]
    if not numbers or not rate or not bandwidth:
        return None
    return float(max(2 * products / rate / 1e6, numbers * itemsize / bandwidth / 1e3))


def work_of(name: str, shapes: Shapes) -> tuple[int, int]:
    """How many multiplications an operation takes, and how many numbers it reads and writes; zeros
    if that is not known. Convolutions have stride 1 and "same" padding, or are transposed, as in a
    decoder."""
    short = name.removeprefix("aten::").lstrip("_")
    read = sum(math.prod(shape) for shape in shapes)
    if short in ("conv2d", "convolution"):
        return 0, 0  # they call one of those below
    if "conv" in short:
        if len(shapes) < 2 or len(shapes[0]) != 4 or len(shapes[1]) != 4:
            return 0, 0
        (batch, channels, height, width), weight = shapes[:2]
        products = batch * height * width * math.prod(weight)
        out_channels = math.prod(weight[:2]) // channels
        scale = 4 if "transpose" in short else 1
        return products, read + batch * height * width * out_channels * scale
    if "attention" in short and len(shapes) >= 3:
        queries, keys, values = shapes[:3]
        if "efficient" in short:  # (B, tokens, heads, C), not (B, heads, tokens, C)
            queries, keys, values = ((b, h, n, c) for b, n, h, c in (queries, keys, values))
        pairs = math.prod(queries[:-1]) * keys[-2]
        return pairs * (queries[-1] + values[-1]), read + math.prod(queries[:-1]) * values[-1]
    if short in ("mm", "addmm", "bmm", "baddbmm", "linear") and len(shapes) >= 2:
        a, b = shapes[-2:] if short in ("addmm", "baddbmm") else shapes[:2]
        columns = b[0] if short == "linear" else b[-1]
        return math.prod(a) * columns, read + math.prod(a[:-1]) * columns
    if short in ("copy_", "add", "add_", "mul", "silu", "native_group_norm", "clone") and shapes:
        return 0, read + (0 if short == "copy_" else math.prod(shapes[0]))
    return 0, 0


def ceilings_of(record: Record, dtype: str) -> dict[str, Any]:
    """The rate of a matrix product in TFLOP/s and the bandwidth of a copy in GB/s, as measured."""
    rows = (read(record.folder, "environment") or {"rows": []})["rows"]
    rates = {row["key"]: row.get("rate") for row in rows}
    return plain({"rate": rates.get(f"matrix product, {dtype}"), "bandwidth": rates.get("copy")})
