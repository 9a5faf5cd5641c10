"""Streamed runs, planned and executed by hand, and the files that this process has open."""

from __future__ import annotations

import dataclasses
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sdconv
from sdconv.streaming import StreamPlan, make_plan, steps_of
from sdconv.streaming.buffers import MemoryLayout
from sdconv.streaming.executor import run

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it reads /proc")


def open_files(folder: Path) -> list[str]:
    """This process's open files and mappings in a folder, named or not."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    mappings = Path("/proc/self/maps").read_text().splitlines()
    return [f"{one}" for one in (*links, *mappings) if str(folder) in f"{one}"]


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(network: Any, direction: str, x: Tensor, backend: str = "fast") -> Tensor:
    """The network's output: the moments of images' latents, or latents' images."""
    with sdconv.backend(backend), torch.no_grad():
        if direction == "decode":
            return network.decode(x).sample
        return network.encode(x).latent_dist.parameters


def planned(
    network: Any,
    direction: Any,
    x: Tensor,
    *,
    rows: int | None,
    spill: bool,
    backend: str = "fast",
) -> StreamPlan:
    """A plan with ``rows`` units a strip (None: the planner's), and about half of the buffers'
    bytes spilled if asked."""
    with sdconv.backend(backend):
        steps = steps_of(network, direction, *x.shape[2:])
    plan = make_plan(steps, batch=len(x), limit=None, can_spill=spill)
    if spill:
        plan = dataclasses.replace(plan, layout=half_spilled(plan.layout))
    if rows is not None:
        plan = dataclasses.replace(plan, units=(rows,) * len(steps))
    return plan


def half_spilled(layout: MemoryLayout) -> MemoryLayout:
    """The same layout with about half of its bytes outside memory, so that buffers lie in both."""
    memory = layout.size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    return dataclasses.replace(layout, memory=memory)


@torch.no_grad()
def executed(plan: StreamPlan, x: Tensor, folder: Path | None = None) -> Tensor:
    out = torch.full(plan.shape, torch.nan, dtype=x.dtype)
    run(plan, x, out, folder=folder)
    return out
