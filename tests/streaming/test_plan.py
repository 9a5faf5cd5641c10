"""The plan: what is put where under a limit, what is refused, and what it predicts."""

from __future__ import annotations

import itertools
import json
import mmap
import time
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
from sdconv.streaming import (
    Plan,
    Streaming,
    calibration,
    in_words,
    least_memory,
    make_plan,
    parse_bytes,
    steps_of,
)
from sdconv.streaming.planner import lifetimes

with torch.device("meta"):
    FULL = AutoencoderKL(seeded.kl((128, 256, 512, 512), 4, True))
GIB, MIB = 1 << 30, 1 << 20


BACKENDS = pytest.mark.parametrize("backend", ["reference", "fast"])


def full(
    work: Any,
    side: int,
    limit: int | None,
    *,
    can_spill: bool = True,
    parted: bool = False,
    pictures: int = 1,
    backend: str = "reference",
) -> Plan:
    scale = 8 if work == "decode" else 1
    with sdconv.backend(backend):
        steps = steps_of(FULL, work, side // scale, side // scale)
    return make_plan(steps, pictures=pictures, limit=limit, can_spill=can_spill, parted=parted)


def alive(plan: Plan) -> list[list[tuple[int, int]]]:
    """From and up to which bytes the maps of each step lie, from low to high."""
    spans, starts = lifetimes(plan.steps), plan.layout.starts
    return [
        sorted((at, at + key.bytes) for key, at in starts.items() if step in spans[key])
        for step in range(len(plan.steps))
    ]


@BACKENDS
@pytest.mark.parametrize("work", ["encode", "decode"])
@given(st.integers(8, 600), st.integers(1, 1 << 34), st.booleans(), st.booleans())
def test_a_limit_is_kept_or_refused(
    work: str, backend: str, eighths: int, limit: int, can_spill: bool, parted: bool
) -> None:
    side = 8 * eighths
    try:
        plan = full(work, side, limit, can_spill=can_spill, parted=parted, backend=backend)
    except sdconv.InputError:
        with pytest.raises(sdconv.InputError, match="cannot be met"):
            full(work, side, limit // 2, can_spill=can_spill, backend=backend)
        return
    memory = plan.layout.memory
    assert plan.peak <= limit
    assert can_spill or plan.spilled == 0
    for step, units, maps in zip(plan.steps, plan.units, alive(plan), strict=True):
        held = sum(min(end, memory) - start for start, end in maps if start < memory)
        held = memory if parted else held
        assert held + step.remains(units) + plan.steps[-1].target.bytes <= plan.peak
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(maps))
        assert maps[-1][1] <= memory + plan.spilled
        assert not parted or not any(start < memory < end for start, end in maps)
    starts = plan.layout.starts
    assert all(starts[key] + key.bytes <= memory for key in starts if key.whole)
    assert all(1 <= n <= s.units for n, s in zip(plan.units, plan.steps, strict=True))


@BACKENDS
@pytest.mark.parametrize("spill", [True, False])
@pytest.mark.parametrize("work", ["encode", "decode"])
def test_the_least_is_the_least(work: str, spill: bool, backend: str) -> None:
    steps = full(work, 1024, None, backend=backend).steps
    least = least_memory(steps, pictures=2, spill=spill)
    plan = full(work, 1024, least, can_spill=spill, pictures=2, backend=backend)
    assert plan.peak <= least
    with pytest.raises(sdconv.InputError, match="cannot be met"):
        full(work, 1024, least - 1, can_spill=spill, pictures=2, backend=backend)


def test_the_refusal_says_what_suffices() -> None:
    with pytest.raises(sdconv.InputError) as raised:
        full("decode", 1024, 50 * MIB, can_spill=False)
    text = str(raised.value)
    least = {s: least_memory(full("decode", 1024, None).steps, pictures=1, spill=s) for s in (0, 1)}
    wanted = f"at least {in_words(least[0])}, or {in_words(least[1])} with spill=folder"
    assert wanted in text and "got: 50 MiB" in text
    assert full("decode", 1024, parse_bytes(in_words(least[1]))).spilled > 0


@BACKENDS
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    plan = full("decode", 4096, 4 * GIB, backend=backend)
    largest = max(plan.layout.starts, key=lambda key: key.bytes)
    assert largest.height * largest.width * largest.channels > 2**31
    assert plan.peak <= 4 * GIB
    # the largest map, with 256 channels, and the one that a block makes from it
    assert plan.spilled == 4096 * 4096 * (256 + 128) * 4 - plan.layout.memory
    assert plan.layout.memory > 3 * GIB, "what the limit allows stays in memory"


@pytest.mark.parametrize("work", ["encode", "decode"])
@given(st.integers(1, 100), st.integers(1, 100))
def test_maps_leave_few_gaps(work: Any, rows: int, columns: int) -> None:
    """They take no more than those of the fullest step, but for whole pages."""
    scale = 1 if work == "decode" else 8
    steps = steps_of(FULL, work, scale * rows, scale * columns)
    plan = make_plan(steps, pictures=1, limit=None, can_spill=False)
    fullest = max(sum(end - start for start, end in maps) for maps in alive(plan))
    assert fullest <= plan.layout.size <= fullest + 4 * mmap.PAGESIZE


def test_maps_that_live_at_once_are_two_outside_attention() -> None:
    plan = full("decode", 1024, None)
    at_once = [len([1 for s in lifetimes(plan.steps).values() if i in s])
               for i in range(len(plan.steps))]  # fmt: skip
    attention = [i for i, step in enumerate(plan.steps) if "attentions" in step.name]
    assert max(n for i, n in enumerate(at_once) if i not in attention) == 2
    assert max(at_once[i] for i in attention) == 3


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_multiplies_are_those_that_torch_counts(work: Any) -> None:
    """Of the ordinary network, by another counter; it counts an addition with each, and on a CPU
    nothing for attention's two products."""
    network = seeded.network(seeded.kl((32, 64, 64), 4, True))
    shape = (1, 3, 24, 40) if work == "encode" else (1, 4, 6, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        getattr(network, work)(torch.zeros(shape))
    steps = steps_of(network, work, *shape[2:])
    plan = make_plan(steps, pictures=3, limit=None, can_spill=False)
    attention = 2 * (6 * 10) ** 2 * 64
    assert plan.multiplies == 3 * (counter.get_total_flops() // 2 + attention)


@BACKENDS
def test_time_is_predicted_from_strips(backend: str) -> None:
    """Within a factor that a busy machine allows for; `scripts/bench/streaming.py` prints it."""
    network = seeded.network(seeded.kl((64, 64), 4, True, layers_per_block=1))
    streaming = Streaming.of(None, None, False)
    z = torch.randn(1, 4, 64, 64)
    ratios = []
    with sdconv.backend(backend):
        plan = streaming.plan(network, "decode", z)
        for _ in range(3):
            predicted = calibration.seconds(plan, device=z.device)
            start = time.perf_counter()
            streaming(network, "decode", z)
            ratios.append((time.perf_counter() - start) / predicted)
        assert 1 / 3 < sorted(ratios)[1] < 3
        blank = steps_of(FULL, "decode", 8, 8)
    small = make_plan(blank, pictures=2, limit=None, can_spill=False)
    assert calibration.seconds(small, device=z.device) > 0, "without weights"


@BACKENDS
def test_the_command_says_what_the_plan_is(backend: str) -> None:
    options = f"plan --size 1000x1000 --memory 300MiB --batch 2 --backend {backend} --no-time"
    said = json.loads(run(*options.split(), "--json").stdout)
    assert said["backend"] == backend
    for work in ("encode", "decode"):
        own = full(work, 1000, 300 * MIB, pictures=2, backend=backend)
        assert (said[work]["peak"], said[work]["spilled"]) == (own.peak, own.spilled)
        assert said[work]["seconds"] is None
        for key, spill in (("least", True), ("least_without_spill", False)):
            assert said[work][key] == least_memory(own.steps, pictures=2, spill=spill)
    assert said["encode"] != said["decode"], "the control"


def test_the_command_times_strips_of_small_vaes(tmp_path: Path) -> None:
    weights = tmp_path / "vae.safetensors"
    sdconv.save(seeded.network(seeded.kl((64, 64), 4, True)), weights, layout="diffusers")
    command = ("plan", str(weights), "--family", "sd1", "--size", "64x96", "--backend", "fast")
    said = json.loads(run(*command, "--spill", str(tmp_path), "--json").stdout)
    assert said["decode"]["seconds"] > 0 and said["encode"]["seconds"] > 0
    table = run(*command, "--no-time").stdout
    assert "decode" in table and in_words(said["decode"]["peak"]) in table


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("2GiB", 2 * GIB),
        ("2 gib", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("1GB", 10**9),
        ("512MiB", 512 * MIB),
        ("7", 7),
        ("7 B", 7),
        (12345, 12345),
    ],
)
def test_sizes_as_people_write_them(written: str | int, size: int) -> None:
    assert parse_bytes(written) == size


@pytest.mark.parametrize(
    "written", ["", "GiB", "-1GiB", "2 GiB of it", "2QiB", "0", 0, -5, 2.5, True, None, "1e9", "٣"]
)
def test_what_is_no_size(written: Any) -> None:
    with pytest.raises(sdconv.InputError, match="not a size of memory"):
        parse_bytes(written)


@given(st.integers(0, 1 << 45))
def test_sizes_in_words_suffice(size: int) -> None:
    words = in_words(size)
    if size:
        read = parse_bytes(words.replace("bytes", "B"))
        assert size <= read <= 1.1 * size + 1
