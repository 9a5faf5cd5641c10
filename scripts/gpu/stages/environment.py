"""The device, the software, and the ceilings that other stages compare with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.options import Options
from scripts.gpu.precision import float32_by_tf32
from scripts.gpu.record import Record
from scripts.gpu.timing import timed

PACKAGES = ("diffusers", "transformers", "safetensors", "triton", "numba", "numpy")
# what nvidia-smi is asked for
ASKED = {
    "driver": "driver_version",
    "clock now, SM": "clocks.sm",
    "clock at most, SM": "clocks.max.sm",
    "clock at most, memory": "clocks.max.mem",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
}


def run(record: Record, options: Options) -> None:
    record.facts(device=options.device, small=options.small, **software())
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device here; --device cpu runs on the CPU")
        record.facts(**gpu())
    else:
        record.facts(name=processor(), threads=torch.get_num_threads())
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        if name == "tf32" and options.device == "cpu":
            continue
        rate = partial(product, dtype, tf32, options)
        record.measure(f"matrix product, {name}", rate, must_work=True, unit="TFLOP/s")
    record.measure("copy", lambda: copy(options), must_work=True, unit="GB/s, read and written")


def product(dtype: torch.dtype, tf32: bool, options: Options) -> dict[str, Any]:
    """The rate of a square matrix product."""
    side = 256 if options.small else 8192
    a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
    with float32_by_tf32(tf32):
        timing = timed(lambda: a @ b, options.device, runs=20, seconds=2)
    return {"of": f"{side}x{side}", "rate": 2 * side**3 / timing.milliseconds / 1e9}


def copy(options: Options) -> dict[str, Any]:
    """The bandwidth of a copy, counting what is read and what is written."""
    size = (1 << 24) if options.small else (1 << 30)
    a = torch.zeros(size, dtype=torch.uint8, device=options.device)
    b = torch.empty_like(a)
    timing = timed(lambda: b.copy_(a), options.device, runs=20, seconds=2)
    return {"of": f"{size >> 20} MiB", "rate": 2 * size / timing.milliseconds / 1e6}


def software() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["C compiler"] = shutil.which("cc") or shutil.which("gcc")  # Triton needs one
    return found | {"cores": os.cpu_count(), "platform": f"{sys.platform} {platform.machine()}"}


def gpu() -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": facts.name,
        "compute capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory, GiB": round(facts.total_memory / 2**30, 1),
    }
    try:
        command = ["nvidia-smi", "-i", "0", "--format=csv,noheader", "--query-gpu="]
        command[-1] += ",".join(ASKED.values())
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        answers = ran.stdout.strip().splitlines()[0].split(", ")
        found |= dict(zip(ASKED, answers, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        found["driver"] = f"nvidia-smi does not say: {type(error).__name__}"
    return found


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
