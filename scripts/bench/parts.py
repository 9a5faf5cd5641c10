"""The share of each part in a decode and in a U-Net's step: products, transforms, attention, norms,
memory.

torch's profiler gives the seconds of each operation without those that it calls; the fast backend's
kernels are operations of their own to it. Convolutions are computed strip by strip, because the one
kernel that computes a whole one has no parts. What is left of the wall-clock time is Python, and
what the profiler itself costs.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scripts.bench.sides import FAST, LABELS, Run, ours, side_of
from sdconv.fast.cpu.kernels import Kernels, kernels_for

PARTS = ("products", "transforms", "attention", "norms and activations", "memory", "the rest")
_KERNEL = "sdconv kernel: "
# the beginnings of the names of each part's operations
_OPERATIONS = {
    "products": (
        *(f"{_KERNEL}bmm", f"{_KERNEL}multiply_tiles", f"{_KERNEL}linear", f"{_KERNEL}geglu"),
        f"{_KERNEL}image_conv",
        *("aten::mkldnn", "aten::_slow_conv"),
        *("aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"),
        *("aten::linear", "aten::matmul"),
    ),
    "transforms": (f"{_KERNEL}input_transform", f"{_KERNEL}output_transform"),
    "attention": (
        *(f"{_KERNEL}attention", "aten::_scaled_dot", "aten::scaled_dot", "aten::_softmax"),
    ),
    "norms and activations": (
        *(f"{_KERNEL}sums", "aten::native_group", "aten::native_layer", "aten::silu", "aten::gelu"),
        *("aten::relu", "aten::var", "aten::mul", "aten::add", "aten::sum", "aten::tanh"),
        *("aten::square", "aten::pow", "aten::mean"),
    ),
    "memory": (
        *(f"{_KERNEL}fingerprint", f"{_KERNEL}pack", "aten::copy", "aten::clone", "aten::cat"),
        *("aten::contiguous", "aten::empty", "aten::zero", "aten::fill", "aten::upsample"),
        *("aten::pad", "aten::constant_pad", "aten::resize", "aten::_to_copy"),
    ),
}


def parts(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of each part, for diffusers and for the fast backend, in one process."""
    (work,) = options.of or ("decode",)
    network = ours(work)
    for name in ("plain", FAST):
        run = side_of(name, work, options.size, network)
        run()
        total, seconds = measured(run, options.rounds)
        for part in PARTS:
            yield {
                "work": f"{work} {options.size[0]}x{options.size[1]}",
                "side": LABELS[name],
                "part": part,
                "seconds": round(seconds[part], 3),
                "share": f"{seconds[part] / total:.0%}",
            }


def measured(run: Run, rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of a run, and of each of its parts, on average over the rounds."""
    with _named_kernels(), profile(activities=[ProfilerActivity.CPU]) as found:
        begin = time.perf_counter()
        for _ in range(rounds):
            run()
        total = time.perf_counter() - begin
    seconds = dict.fromkeys(PARTS, 0.0)
    for one in found.key_averages():
        seconds[part_of(one.key)] += one.self_cpu_time_total / 1e6
    known = sum(seconds[part] for part in PARTS[:-1])
    seconds[PARTS[-1]] = max(0.0, total - known)
    return total / rounds, {part: each / rounds for part, each in seconds.items()}


def part_of(operation: str) -> str:
    """The part that an operation of the profiler's belongs to."""
    fits = (part for part, starts in _OPERATIONS.items() if operation.startswith(starts))
    return next(fits, PARTS[-1])


def kernel_names() -> list[str]:
    """The fast backend's kernels that have a part, by the names of their functions."""
    functions = inspect.getmembers(Kernels, inspect.isfunction)
    names = [name for name, _ in functions if not name.startswith("_")]
    return [name for name in names if name not in ("padded", "conv_in_bands")]


@contextmanager
def _named_kernels() -> Iterator[None]:
    """The fast backend's kernels are operations to the profiler."""
    kernels: Any = kernels_for(torch.float32)
    own = {name: getattr(kernels, name) for name in (*kernel_names(), "conv_in_bands")}
    for name, function in own.items():
        setattr(kernels, name, _named(name, function))
    kernels.conv_in_bands = lambda *_: None
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(kernels, name, function)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(_KERNEL + name):
            return function(*args, **kwargs)

    return call
