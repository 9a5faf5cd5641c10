"""The Triton kernels on a CPU: run in Triton's interpreter, with faults planted, in a process of
their own, as importing Triton decides whether it interprets; and compiled for NVIDIA's GPUs."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

KERNELS = "sdconv.fast.cuda.triton_kernels"
SOFTMAX = "sdconv.fast.cuda.triton_softmax"

# a piece of the kernels' source, and what replaces it
Fault = tuple[str, str]


class Interpreter:
    """Runs the kernels' functions in another process."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def sum_and_stats(self, *args: Any, fault: Fault | None = None) -> tuple[Tensor, Tensor]:
        return self.pool.submit(_sum_and_stats, fault, *args).result()

    def group_norm(self, *args: Any, fault: Fault | None = None) -> Tensor:
        return self.pool.submit(_group_norm, fault, *args).result()

    def norm_by_group(self, *args: Any, fault: Fault | None = None) -> Tensor:
        return self.pool.submit(_norm_by_group, fault, *args).result()

    def softmax_rows(self, *args: Any, fault: Fault | None = None) -> tuple[Tensor, Tensor]:
        return self.pool.submit(_softmax_rows, fault, *args).result()

    def add_taps(self, *args: Any, fault: Fault | None = None) -> Tensor:
        return self.pool.submit(_add_taps, fault, *args).result()


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="Triton's kernels need it: pip install triton, on Linux")
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawned) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("TMPDIR", folder)  # where it leaves faulty kernels
            pool.submit(importlib.import_module, "triton").exception()  # starts the process
        yield Interpreter(pool)


def _kernels(fault: Fault | None, name: str = KERNELS) -> Any:
    """A module of kernels, or a copy with a fault in it."""
    if fault is None:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text("utf-8")
    assert fault[0] in source, f"not in the kernels' source: {fault[0]}"
    folder = tempfile.mkdtemp()
    path = Path(folder, "faulty.py")
    path.write_text(source.replace(*fault), "utf-8")
    faulty = importlib.util.spec_from_file_location("faulty", path)
    assert faulty is not None and faulty.loader is not None
    module = importlib.util.module_from_spec(faulty)
    importlib.import_module("sys").modules["faulty"] = module  # dataclasses look it up
    faulty.loader.exec_module(module)
    return module


def _sum_and_stats(
    fault: Fault | None,
    tiling: Any,
    x: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    groups: int,
    subpixel: bool,
) -> tuple[Tensor, Tensor]:
    from sdconv.fast.cuda import epilogue

    x = x.contiguous(memory_format=torch.channels_last)
    out = epilogue.blank(x, subpixel)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    stats = _kernels(fault).run_sum_and_stats(
        x, bias, added, residual, residual_bias, out, groups, tiling, subpixel=subpixel
    )
    return out, stats


def _group_norm(
    fault: Fault | None,
    tiling: Any,
    x: Tensor,
    offset: Tensor | None,
    added: Tensor | None,
    stats: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    kernels = _kernels(fault)
    x = x.contiguous(memory_format=torch.channels_last)
    if stats is None:
        stats = kernels.run_sum_and_stats(x, offset, added, None, None, None, groups, tiling)
    out: Tensor = kernels.run_normalise(
        x, offset, added, stats, weight, bias, groups, eps, silu, tiling
    )
    return out


def _norm_by_group(fault: Fault | None, x: Tensor, *args: Any) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = _kernels(fault).run_normalise_group(x, *args)
    return out


def _softmax_rows(fault: Fault | None, columns: int, *args: Any) -> tuple[Tensor, Tensor]:
    kernels = _kernels(fault, SOFTMAX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COLUMNS", columns)
        out: tuple[Tensor, Tensor] = kernels.run_softmax_rows(*args)
    return out


def _add_taps(fault: Fault | None, weight: Tensor, transposed: bool) -> Tensor:
    out: Tensor = _kernels(fault).run_add_taps(weight, transposed)
    return out


def compiler() -> ModuleType:
    """Triton's compiler, where it can compile for NVIDIA's GPUs."""
    return pytest.importorskip("triton", reason="needs Triton: pip install triton, on Linux")
