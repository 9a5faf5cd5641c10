"""The plan: where buffers are under a limit, which limits cannot be met, and predicted times."""

from __future__ import annotations

import itertools
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.commands import run
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import sdconv
from sdconv.models.vae import AutoencoderKL
from sdconv.sizes import format_bytes, parse_bytes
from sdconv.streaming import (
    StreamPlan,
    calibration,
    least_memory,
    make_plan,
    steps_of,
)
from sdconv.streaming.calibration import predict_seconds
from sdconv.streaming.planner import lifetimes

with torch.device("meta"):
    FULL = AutoencoderKL(seeded.kl((128, 256, 512, 512), 4, True))
GIB, MIB = 1 << 30, 1 << 20


BACKENDS = pytest.mark.parametrize("backend", ["reference", "fast"])


def full(
    direction: Any,
    side: int,
    limit: int | None,
    *,
    can_spill: bool = True,
    separate_spill: bool = False,
    batch: int = 1,
    backend: str = "reference",
) -> StreamPlan:
    scale = 8 if direction == "decode" else 1
    with sdconv.backend(backend):
        steps = steps_of(FULL, direction, side // scale, side // scale)
    return make_plan(
        steps, batch=batch, limit=limit, can_spill=can_spill, separate_spill=separate_spill
    )


def alive(plan: StreamPlan) -> list[list[tuple[int, int]]]:
    """First byte, and last byte plus one, of the buffers alive at each step, in ascending order."""
    spans, starts = lifetimes(plan.steps), plan.layout.starts
    return [
        sorted((at, at + key.bytes) for key, at in starts.items() if step in spans[key])
        for step in range(len(plan.steps))
    ]


@BACKENDS
@pytest.mark.parametrize("direction", ["encode", "decode"])
@given(st.integers(8, 600), st.integers(1, 1 << 34), st.booleans(), st.booleans())
def test_a_limit_is_kept_or_an_error(
    direction: str, backend: str, eighths: int, limit: int, can_spill: bool, separate_spill: bool
) -> None:
    side = 8 * eighths
    try:
        plan = full(
            direction,
            side,
            limit,
            can_spill=can_spill,
            separate_spill=separate_spill,
            backend=backend,
        )
    except sdconv.InputError:
        with pytest.raises(sdconv.InputError, match="cannot be met"):
            full(direction, side, limit // 2, can_spill=can_spill, backend=backend)
        return
    memory = plan.layout.memory
    assert plan.peak <= limit
    assert can_spill or plan.spilled == 0
    for step, units, spans in zip(plan.steps, plan.units, alive(plan), strict=True):
        held = sum(min(end, memory) - start for start, end in spans if start < memory)
        held = memory if separate_spill else held
        assert held + step.workspace(units) + plan.steps[-1].target.bytes <= plan.peak
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= memory + plan.spilled
        assert not separate_spill or not any(start < memory < end for start, end in spans)
    starts = plan.layout.starts
    assert all(starts[key] + key.bytes <= memory for key in starts if key.resident)
    assert all(1 <= n <= s.units for n, s in zip(plan.units, plan.steps, strict=True))


@BACKENDS
@pytest.mark.parametrize("spill", [True, False])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_least_memory_is_the_lowest_limit(direction: str, spill: bool, backend: str) -> None:
    steps = full(direction, 1024, None, backend=backend).steps
    least = least_memory(steps, batch=2, spill=spill)
    plan = full(direction, 1024, least, can_spill=spill, batch=2, backend=backend)
    assert plan.peak <= least
    with pytest.raises(sdconv.InputError, match="cannot be met"):
        full(direction, 1024, least - 1, can_spill=spill, batch=2, backend=backend)


def test_the_error_names_limits_that_are_enough() -> None:
    with pytest.raises(sdconv.InputError) as raised:
        full("decode", 1024, 50 * MIB, can_spill=False)
    text = str(raised.value)
    least = {s: least_memory(full("decode", 1024, None).steps, batch=1, spill=s) for s in (0, 1)}
    wanted = f"at least {format_bytes(least[0])}, or {format_bytes(least[1])} with spill=folder"
    assert wanted in text and "got: 50 MiB" in text
    assert full("decode", 1024, parse_bytes(format_bytes(least[1]))).spilled > 0


@BACKENDS
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    plan = full("decode", 4096, 4 * GIB, backend=backend)
    largest = max(plan.layout.starts, key=lambda key: key.bytes)
    assert largest.height * largest.width * largest.channels > 2**31
    assert plan.peak <= 4 * GIB
    # the largest feature map, with 256 channels, and the one that a block computes from it
    assert plan.spilled == 4096 * 4096 * (256 + 128) * 4 - plan.layout.memory
    assert plan.layout.memory > 3 * GIB, "what the limit allows stays in memory"


@pytest.mark.parametrize("direction", ["encode", "decode"])
@given(st.integers(1, 100), st.integers(1, 100))
def test_buffers_leave_hardly_any_gaps(direction: Any, rows: int, columns: int) -> None:
    """They need no more than those of the fullest step, except for rounding up to pages."""
    scale = 1 if direction == "decode" else 8
    steps = steps_of(FULL, direction, scale * rows, scale * columns)
    plan = make_plan(steps, batch=1, limit=None, can_spill=False)
    fullest = max(sum(end - start for start, end in spans) for spans in alive(plan))
    assert fullest <= plan.layout.size <= fullest + 4 * mmap.PAGESIZE


def test_two_buffers_are_alive_at_once_and_three_in_attention() -> None:
    plan = full("decode", 1024, None)
    at_once = [len([1 for s in lifetimes(plan.steps).values() if i in s])
               for i in range(len(plan.steps))]  # fmt: skip
    attention = [i for i, step in enumerate(plan.steps) if "attentions" in step.name]
    assert max(n for i, n in enumerate(at_once) if i not in attention) == 2
    assert max(at_once[i] for i in attention) == 3


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_multiplies_are_those_that_torch_counts(direction: Any) -> None:
    """torch counts the ordinary network. It counts each addition too, and on a CPU leaves out
    attention's two matrix products."""
    network = seeded.network(seeded.kl((32, 64, 64), 4, True))
    shape = (1, 3, 24, 40) if direction == "encode" else (1, 4, 6, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(network, direction)(torch.zeros(shape))
    steps = steps_of(network, direction, *shape[2:])
    plan = make_plan(steps, batch=3, limit=None, can_spill=False)
    attention = 2 * (6 * 10) ** 2 * 64
    assert plan.multiplies == 3 * (counter.get_total_flops() // 2 + attention)


@BACKENDS
def test_time_is_predicted_from_strips(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are injected; `scripts/bench/streaming.py` compares predictions with clocks."""
    with sdconv.backend(backend):
        plan = make_plan(steps_of(FULL, "decode", 8, 8), batch=2, limit=None, can_spill=False)
    device = torch.device("cpu")
    assert predict_seconds(plan, device=device) > 0, "without weights"
    monkeypatch.setattr(calibration, "_time_step", lambda *_: (2.0, 1e-3))
    expected = 2 * sum(2.0 + 1e-3 * step.multiplies for step in plan.steps)
    assert predict_seconds(plan, device=device) == pytest.approx(expected)


@BACKENDS
def test_the_command_prints_the_plan(backend: str) -> None:
    options = f"plan --size 1000x1000 --memory 300MiB --batch 2 --backend {backend} --no-time"
    printed = json.loads(run(*options.split(), "--json").stdout)
    assert printed["backend"] == backend
    for direction in ("encode", "decode"):
        answer, own = printed[direction], full(direction, 1000, 300 * MIB, batch=2, backend=backend)
        assert (answer["peak"], answer["spilled"]) == (own.peak, own.spilled)
        assert answer["seconds"] is None
        for key, spill in (("least", True), ("least_without_spill", False)):
            assert answer[key] == least_memory(own.steps, batch=2, spill=spill)
    assert printed["encode"] != printed["decode"], "the control"


def test_the_command_times_strips_of_small_vaes(tmp_path: Path) -> None:
    weights = tmp_path / "vae.safetensors"
    sdconv.save(seeded.network(seeded.kl((64, 64), 4, True)), weights, layout="diffusers")
    command = ("plan", str(weights), "--family", "sd1", "--size", "64x96", "--backend", "fast")
    printed = json.loads(run(*command, "--spill", str(tmp_path), "--json").stdout)
    assert printed["decode"]["seconds"] > 0 and printed["encode"]["seconds"] > 0
    table = run(*command, "--no-time").stdout
    assert "decode" in table and format_bytes(printed["decode"]["peak"]) in table
