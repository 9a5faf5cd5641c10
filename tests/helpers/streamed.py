"""Streamed runs: planned and executed by hand, and the files they have open."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import half_spilled
from torch import Tensor

import sdconv
from sdconv.streaming import Plan, make_plan, steps_of
from sdconv.streaming.executor import run

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it reads /proc")


def open_files(folder: Path) -> list[str]:
    """This process's open files and mappings in a folder, named or not."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [f"{one}" for one in (*links, *maps) if str(folder) in f"{one}"]


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(network: Any, work: str, x: Tensor, backend: str = "fast") -> Tensor:
    """Moments of a picture's latents, or latents' pictures."""
    with sdconv.backend(backend), torch.no_grad():
        if work == "decode":
            return network.decode(x).sample
        return network.encode(x).latent_dist.parameters


def planned(network: Any, work: Any, x: Tensor, rows: int, spill: bool) -> Plan:
    """A plan with this many units a strip, and half of the maps' bytes spilled if asked."""
    with sdconv.backend("fast"):
        steps = steps_of(network, work, *x.shape[2:])
    plan = make_plan(steps, pictures=len(x), limit=None, can_spill=spill)
    if spill:
        plan = dataclasses.replace(plan, layout=half_spilled(plan.layout))
    return dataclasses.replace(plan, units=(rows,) * len(steps))


@torch.no_grad()
def executed(plan: Plan, x: Tensor, folder: Path | None = None) -> Tensor:
    out = torch.full(plan.shape, torch.nan, dtype=x.dtype)
    for one, made in zip(x, out, strict=True):
        run(plan, one, made, folder=folder)
    return out
