"""Convolutions of bfloat16 by matrix units: against float64, and what the kernel reads against the
same sums in torch, which needs no such processor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.conv_cases import lying
from helpers.numbers import error, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import amx, kernels, processor
from sdconv.fast.cpu.conv import (
    Epilogue,
    Prologue,
    amx_conv,
    conv3x3,
    direct_conv,
    direct_upsample_conv,
    plan_for,
    upsample_conv,
)
from sdconv.fast.cpu.cost_model import plan_conv
from sdconv.fast.cpu.group_stats import group_stats
from sdconv.fast.cpu.kernels import methods_for
from sdconv.fast.cpu.winograd import Kind

needs_amx = pytest.mark.skipif(
    not processor.has_amx_kernels(),
    reason="needs a processor with AMX for bfloat16 (Intel Xeon of the fourth generation or newer)",
)
# of the largest value: half a unit in the last place of bfloat16, and the rounding of what is
# multiplied
WITHIN = 6e-3
KINDS: list[Kind] = ["conv3x3", "upsample_conv"]


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).bfloat16()


def convolved(kind: Kind, x: Tensor, weight: Tensor) -> Tensor:
    """In float64."""
    x, weight = x.double(), weight.double()
    if kind == "upsample_conv":
        return direct_upsample_conv(x, weight, None)
    return direct_conv(x, weight, None, Epilogue())


# --- what the kernel reads, on any processor


def as_the_kernel_does(kind: Kind, x: Tensor, weight: Tensor) -> Tensor:
    """The sums that the kernel computes from a packed weight, in float64."""
    packed, taps = amx.PACK[kind](weight), amx._taps(kind, x.shape[3] + 2)
    phases, count = taps.shape
    (out_channels, channels), (height, width) = weight.shape[:2], x.shape[2:]
    blocks = (phases, -(-out_channels // 32), -(-channels // 32), count, 2, 16, 16, 2)
    # phase, output channel, tap, channel
    factors = packed.view(blocks).permute(0, 1, 4, 6, 3, 2, 5, 7)
    factors = factors.reshape(phases, blocks[1] * 32, count, blocks[2] * 32).double()
    assert factors[:, out_channels:].count_nonzero() == 0
    assert factors[..., channels:].count_nonzero() == 0
    pixels = functional.pad(x[0], (1, 1, 1, 1)).flatten(1).double()
    starts = torch.arange(height)[:, None] * (width + 2) + torch.arange(width)
    out = torch.stack([
        torch.einsum(
            "otc,ctp->op",
            factors[phase, :out_channels, :, :channels],
            pixels[:, (taps[phase][:, None] + starts.flatten())],
        )
        for phase in range(phases)
    ])  # fmt: skip
    if kind == "conv3x3":
        return out.view(1, out_channels, height, width)
    several = out.view(2, 2, out_channels, height, width).permute(2, 3, 0, 4, 1)
    return several.reshape(1, out_channels, 2 * height, 2 * width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "out_channels"), [(32, 32), (40, 70), (3, 5)])
def test_packed_weights(kind: Kind, channels: int, out_channels: int) -> None:
    x, weight = bf16(1, channels, 5, 7), bf16(out_channels, channels, 3, 3, seed=1)
    found, exact = as_the_kernel_does(kind, x, weight), convolved(kind, x, weight)
    # the sums of taps after upsampling are rounded
    within = 1e-12 if kind == "conv3x3" else 3e-3
    assert error(found, exact) < within
    changed = weight.clone()
    changed[0, 0, 2, 1] += 1
    assert error(as_the_kernel_does(kind, x, changed), exact) > 2 * within
    # where no sum needs more than 8 bits, nothing is lost
    few = (weight * 8).round().clamp(-31, 31)
    assert error(as_the_kernel_does(kind, x, few), convolved(kind, x, few)) < 1e-12


def test_plans() -> None:
    """bfloat16 has them where the processor does; other dtypes never."""
    shape = (1, 128, 128, 64, 64)
    for kind in KINDS:
        plan = plan_conv(kind, *shape, True, ("winograd", "amx"), 3.0)
        assert plan.method == "amx" and "natively" in plan.reason
        assert plan.packed_bytes == 2 * 128 * 128 * (9 if kind == "conv3x3" else 16)
        without = plan_conv(kind, *shape, True, ("winograd",), 1.0)
        assert without.method == "winograd" and "amx" not in dict(without.costs)
    strided = plan_conv("downsample_conv", *shape, False, ("winograd", "amx"), 3.0)
    assert strided.method != "amx"
    # the kernel normalises 16 channels at a time
    odd = (1, 120, 128, 64, 64)
    assert plan_conv("conv3x3", *odd, True, ("winograd", "amx")).method != "amx"
    assert plan_conv("conv3x3", *odd, False, ("winograd", "amx")).method == "amx"
    for dtype in (torch.float32, torch.float16):
        assert "amx" not in methods_for(dtype)
    assert ("amx" in methods_for(torch.bfloat16)) is processor.has_amx_kernels()


@pytest.mark.parametrize(
    "missing", ["the processor's units", "Numba", "code for this processor", "the system's consent"]
)
def test_kernels_need_processor_numba_and_system(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = frozenset() if missing == "the processor's units" else frozenset({"amx_bf16"})
    monkeypatch.setattr(processor, "features", lambda: found)
    if missing == "Numba":
        monkeypatch.setattr(processor, "find_spec", lambda name: None)
    if missing == "code for this processor":
        monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: missing != "the system's consent")
    assert not processor.has_amx_kernels.__wrapped__()


@pytest.mark.parametrize("works", [True, False])
def test_without_kernels_that_work_nothing_is_planned_for_them(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba is installed, but its kernels cannot be imported: a fault that is injected."""
    monkeypatch.setattr(kernels, "has_amx_kernels", lambda: True)
    monkeypatch.setattr(kernels, "has_numba_kernels", lambda: works)
    assert ("amx" in methods_for.__wrapped__(torch.bfloat16)) is works
    assert "amx" not in methods_for.__wrapped__(torch.float32)


# --- the kernel


@needs_amx
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 2),
    channels=st.sampled_from([16, 32, 48, 96]),
    out_channels=st.sampled_from([3, 8, 32, 40, 96]),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    normalised=st.booleans(),
    silu=st.booleans(),
    residual=st.sampled_from(["none", "added", "multiplied"]),
    relu=st.booleans(),
    layout=st.sampled_from(["channels first", "channels last", "every other"]),
    threads=st.integers(1, 3),
)
@example("conv3x3", 1, 96, 96, 33, 64, True, True, "multiplied", False, "channels last", 2)
@example("conv3x3", 2, 48, 40, 1, 1, True, False, "added", True, "channels first", 1)
@example("upsample_conv", 2, 96, 96, 17, 31, False, False, "none", False, "channels last", 2)
def test_any_shape(
    kind: Kind,
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    normalised: bool,
    silu: bool,
    residual: str,
    relu: bool,
    layout: str,
    threads: int,
) -> None:
    x = lying(bf16(batch, channels, height, width), layout)
    weight = (randn(out_channels, channels, 3, 3, seed=1) / (9 * channels) ** 0.5).bfloat16()
    bias, groups = bf16(out_channels, seed=2), 1 if out_channels % 8 else 8
    prologue, epilogue = None, Epilogue(bias)
    if kind == "conv3x3":
        if normalised:
            affine = bf16(channels, seed=3), bf16(channels, seed=4)
            prologue = Prologue(group_stats(x, 8), *affine, 1e-5, silu)
        added, shortcut = None, None
        if residual != "none":
            many = out_channels if residual == "added" else 24
            added = lying(bf16(batch, many, height, width, seed=5), layout)
        if residual == "multiplied":
            shortcut = bf16(out_channels, 24, 1, 1, seed=6) / 5, bf16(out_channels, seed=7)
        temb = bf16(batch, out_channels, seed=8)
        epilogue = Epilogue(bias, temb, added, shortcut, relu)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, stats = amx_conv(kind, x, weight, prologue, epilogue, groups)
    finally:
        torch.set_num_threads(before)
    assert out.is_contiguous(memory_format=torch.channels_last)
    wide: Any = [None if one is None else _double(one) for one in (prologue, epilogue)]
    if kind == "conv3x3":
        exact = direct_conv(x.double(), weight.double(), *wide)
    else:
        exact = direct_upsample_conv(x.double(), weight.double(), bias.double())
    assert error(out.double(), exact) < WITHIN
    assert torch.allclose(stats, group_stats(out, groups), rtol=1e-9, atol=1e-9)


def _double(part: Any) -> Any:
    def wide(one: Any) -> Any:
        if isinstance(one, tuple):
            return tuple(map(wide, one))
        return one.double() if isinstance(one, Tensor) else one

    return type(part)(**{name: wide(value) for name, value in vars(part).items()})


@needs_amx
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_and_edits_matter(kind: Kind) -> None:
    x, weight = bf16(1, 128, 48, 64), bf16(128, 128, 3, 3, seed=1) / 34
    assert plan_for(kind, x, weight, False).method == "amx"

    def run() -> Tensor:
        if kind == "upsample_conv":
            return upsample_conv(x, weight, None, groups=1)[0]
        return conv3x3(x, weight, None, Epilogue(), groups=1)[0]

    before = run()
    assert error(before.double(), convolved(kind, x, weight)) < WITHIN
    weight.data[3, 5, 1, 1] += 1
    after = run()
    assert (before != after).any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [3]


@needs_amx
@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_themselves_have_the_same_bits(kind: Kind) -> None:
    """Each output is the same sum, however rows are divided."""
    x, weight = bf16(1, 96, 41, 37), bf16(64, 96, 3, 3, seed=1) / 29
    whole = amx_conv(kind, x, weight, None, Epilogue(), 1)[0][0].permute(1, 2, 0)
    conv = amx.AmxConv(kind, amx.PACK[kind](weight), 64, torch.zeros(64))
    rows, factor = x[0].permute(1, 2, 0).contiguous(), amx.FACTOR[kind]
    for first, end in ((0, 41), (0, 1), (7, 8), (5, 30), (40, 41)):
        window = torch.zeros(end - first + 2, 37, 96, dtype=torch.bfloat16)
        top, bottom = max(first - 1, 0), min(end + 1, 41)
        window[top - first + 1 : bottom - first + 1] = rows[top:bottom]
        out = window.new_empty(factor * (end - first), factor * 37, 64)
        conv.run(window, 1, end - first + 1, None, out)
        assert torch.equal(out, whole[factor * first : factor * end])
    assert not torch.equal(out, whole[: len(out)])


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 41, 37), (1, 81, 920)])
def test_the_output_may_overwrite_the_input(
    threads: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, height, width = shape
    x = bf16(batch, 96, height, width).contiguous(memory_format=torch.channels_last)
    weight, residual = bf16(96, 96, 3, 3, seed=1) / 29, bf16(batch, 40, height, width, seed=2)
    prologue = Prologue(group_stats(x, 8), bf16(96, seed=3), bf16(96, seed=4), 1e-5, True)
    epilogue = Epilogue(bf16(96, seed=5), None, residual, (bf16(96, 40, 1, 1, seed=6), None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def overwritten() -> tuple[Tensor, Tensor]:
        given = x.clone(memory_format=torch.preserve_format)
        out, stats = amx_conv("conv3x3", given, weight, prologue, epilogue, 8, in_place=True)
        assert out is given
        return out, stats

    expected, stats = amx_conv("conv3x3", x, weight, prologue, epilogue, 8)
    exact = direct_conv(
        *(
            _double(one) if isinstance(one, (Prologue, Epilogue)) else one.double()
            for one in (x, weight, prologue, epilogue)
        )
    )
    assert error(expected.double(), exact) < WITHIN
    found, found_stats = overwritten()
    assert torch.equal(found, expected) and torch.equal(found_stats, stats)
    # fault injection: without the rows that are overwritten before another thread reads them
    monkeypatch.setattr(amx, "copied_borders", lambda rows, starts: torch.zeros_like(rows))
    assert not torch.equal(overwritten()[0], expected)


@needs_amx
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_come_out_where_the_reference_has_them(value: float) -> None:
    x, weight = bf16(1, 32, 20, 40), bf16(32, 32, 3, 3, seed=1)
    x[0, 3, 7, 9] = value
    out = amx_conv("conv3x3", x, weight, None, Epilogue(), 1)[0]
    exact = direct_conv(x, weight, None, Epilogue())
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())
    assert not out.isfinite().all() and out[..., 20:].isfinite().all()


@needs_amx
def test_silu_of_infinity_is_the_reference_s() -> None:
    x, weight = bf16(1, 32, 20, 40), bf16(32, 32, 3, 3, seed=1).abs()
    scale, shift = bf16(32, seed=2), bf16(32, seed=3)
    for value, kind in ((-torch.inf, torch.isnan), (torch.inf, torch.isinf), (1.0, torch.isfinite)):
        shift[5] = value
        prologue = Prologue(group_stats(x, 8), scale, shift, 1e-5, True)
        out = amx_conv("conv3x3", x, weight, prologue, Epilogue(), 1)[0]
        exact = direct_conv(x, weight, prologue, Epilogue())
        assert kind(out).all() and kind(exact).all()


@needs_amx
def test_several_threads_at_once() -> None:
    x, weight = bf16(1, 64, 40, 33), bf16(64, 64, 3, 3, seed=1)

    def run(_: int = 0) -> Tensor:
        return amx_conv("conv3x3", x, weight, None, Epilogue(), 1)[0]

    expected = run()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, expected) for one in pool.map(run, range(40)))


@needs_amx
def test_torch_s_own_kernels_find_the_units_as_they_left_them() -> None:
    left, right = bf16(200, 96), bf16(96, 130, seed=1)
    before = left @ right
    for _ in range(3):
        amx_conv("conv3x3", bf16(1, 32, 20, 40), bf16(32, 32, 3, 3), None, Epilogue(), 1)
        assert torch.equal(left @ right, before)
