"""The Numba kernels against torch's, and the ways to run them on several threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cpu import torch_kernels
from sdconv.fast.cpu.group_stats import combine
from sdconv.fast.cpu.kernels import Kernels, numba_kernels
from sdconv.fast.cpu.numba import launch
from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, UPSAMPLE_CONV, Scheme

pytest.importorskip("numba", reason="the kernels need numba: pip install sdconv[fast]")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(
    height=st.integers(1, 25),
    width=st.integers(1, 70),
    channels=st.sampled_from([4, 64, 72, 192, 320]),
    scheme=st.sampled_from([CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=100)
def test_transforms(
    height: int, width: int, channels: int, scheme: Scheme, dtype: torch.dtype, data: st.DataObject
) -> None:
    if scheme is DOWNSAMPLE_CONV:
        height, width = 2 * height, 2 * width
    rows = random(height, width, channels).to(dtype)
    affine = data.draw(st.sampled_from([(random(channels), random(channels)), None]))
    silu = data.draw(st.booleans())
    height, width = height * 4 // scheme.step, width * 4 // scheme.step
    whole = -(-height // 4)
    first = data.draw(st.integers(0, whole - 1))
    strip = Strip(scheme, height, width, first, data.draw(st.integers(1, whole - first)))
    row, end = strip.input_rows
    above = residual = None
    if strip.first and scheme is CONV3X3 and data.draw(st.booleans()):
        above = random(width, channels).to(dtype)
    if data.draw(st.booleans()):
        residual = random(strip.end - strip.first, width, channels)
        residual = residual.to(data.draw(st.sampled_from([dtype, torch.float32])))
    bias, relu = random(channels), data.draw(st.booleans())
    blocks = channels // 64 if channels % 64 == 0 and data.draw(st.booleans()) else 1
    tiles, outs, sums = [], [], []
    # torch's in float64: in float32 its transforms lose more than Numba's
    for kernels, wide in ((numba_kernels()[0], None), (torch_kernels, torch.float64)):
        own_rows, own_above, own_bias, own_residual = (
            None if t is None else t.to(wide or t.dtype) for t in (rows, above, bias, residual)
        )
        own_affine = None if affine is None else tuple(t.to(wide or t.dtype) for t in affine)
        shape = blocks, scheme.positions, strip.tiles, channels // blocks
        made = torch.empty(shape, dtype=wide)
        kernels.input_transform(strip, own_rows[row:end], row, own_above, own_affine, silu, made)
        made = made.permute(1, 2, 0, 3).flatten(2)
        out = torch.empty(strip.end - strip.first, width, channels, dtype=wide or dtype)
        products = torch.full((*made.shape[:2], kernels.padded(channels)), nan, dtype=wide)
        products[:, :, :channels] = made
        parts = kernels.output_transform(strip, products, own_bias, own_residual, relu, out, 4)
        tiles.append(made)
        outs.append(out)
        sums.append(combine(*parts))
    assert outs[0].dtype is dtype
    assert error(*tiles) <= 2e-6
    # that of the rounding alone
    assert error(*outs) <= 2e-6 + (0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2)
    assert error(sums[0], combine(*torch_kernels.sums(outs[0], 4))) <= 2e-6


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 40),
    channels=st.sampled_from([4, 64, 72, 192]),
    dtype=st.sampled_from(DTYPES),
)
def test_sums(height: int, width: int, channels: int, dtype: torch.dtype) -> None:
    rows = random(height, width, channels).to(dtype)
    found, expected = (one.sums(rows, 4) for one in (numba_kernels()[0], torch_kernels))
    assert error(combine(*found), combine(*expected)) <= 1e-12
    rows[-1, -1, -1] += 1
    assert error(combine(*numba_kernels()[0].sums(rows, 4)), combine(*expected)) > 1e-7


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("height", [1, 4], ids=["parts of tiles", "whole tiles"])
def test_rounding_is_torchs(dtype: torch.dtype, height: int) -> None:
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    steps = exact[exact.isfinite() & (exact > 0)].sort().values
    ties = (steps[1:] + steps[:-1]) / 2
    # the tie between the largest number and infinity, too
    ties = torch.cat([ties, steps[-1:] + (steps[-1:] - steps[-2:-1]) / 2])
    near = [torch.nextafter(ties, torch.tensor(to)) for to in (0.0, float("inf"))]
    numbers = torch.cat([exact, *(sign * one for one in (ties, *near) for sign in (1, -1))])
    # what is subnormal in float32 counts as 0 in some processors' instructions
    subnormal = (numbers != 0) & (numbers.abs() < torch.finfo(torch.float32).tiny)
    numbers = numbers[~subnormal]
    rows = numbers[: len(numbers) // 1024 * 1024].view(height, -1, 64)
    width, channels = rows.shape[1:]
    strip, zeros = Strip(CONV3X3, height, width, 0, 1), torch.zeros(channels)
    products = torch.zeros(CONV3X3.positions, strip.tiles, channels)
    out = torch.empty(height, width, channels, dtype=dtype)
    numba_kernels()[0].output_transform(strip, products, zeros, rows, False, out, 1)
    expected = rows.to(dtype)
    assert out.isnan().any() and out.isinf().any()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.masked_fill(out.isnan(), 7), expected.masked_fill(out.isnan(), 7))


@given(
    out_channels=st.sampled_from([1, 3, 16, 40, 64, 72]),
    channels=st.sampled_from([1, 3, 8, 64, 72, 130]),
    scheme=st.sampled_from([CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_packed_kernels(
    out_channels: int, channels: int, scheme: Scheme, dtype: torch.dtype, layout: Any
) -> None:
    weight = random(out_channels, channels, 3, 3).to(dtype).contiguous(memory_format=layout)
    tiles = random(scheme.positions, 7, channels)
    right = scheme.kernel_transform(weight.double())
    expected = torch.bmm(tiles.double(), right if scheme.order is None else right[scheme.order])
    for kernels in (numba_kernels()[0], torch_kernels):
        products = torch.full((scheme.positions, 7, kernels.padded(out_channels)), nan)
        kernels.bmm(tiles, kernels.pack_kernels(scheme, weight), products, scheme.order)
        assert error(products[:, :, :out_channels], expected) < 1e-6
        changed = weight.clone()
        changed[-1, -1, 2, 2] += 1
        kernels.bmm(tiles, kernels.pack_kernels(scheme, changed), products, scheme.order)
        assert error(products[:, :, :out_channels], expected) > 1e-4


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-3, 1.0, -20.0, 86.0, -86.0, 90.0, -90.0, 1e4])
def test_silu(value: float) -> None:
    strip = Strip(CONV3X3, 4, 4, 0, 1)
    rows = torch.full((4, 4, 1), value)
    tiles = torch.empty(2, 1, 36, 1, 1)
    one = (torch.ones(1), torch.zeros(1))
    numba_kernels()[0].input_transform(strip, rows, 0, None, one, True, tiles[0])
    torch_kernels.input_transform(strip, rows, 0, None, one, True, tiles[1])
    assert torch.allclose(tiles[0], tiles[1], rtol=1e-6, atol=1e-34)


def test_sums_by_python_threads_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the way in which kernels are launched."""
    rows = random(50, 20, 8)
    expected = numba_kernels()[0].sums(rows, 4)[0]
    monkeypatch.setattr(launch, "team", lambda: launch.python_threads)
    monkeypatch.setattr(launch, "threads", lambda: 3)
    assert torch.equal(numba_kernels()[0].sums(rows, 4)[0], expected)


@pytest.mark.parametrize("kernels", [torch_kernels, numba_kernels()[0]])
def test_a_fingerprint_depends_on_every_bit_and_every_position(kernels: Kernels) -> None:
    weight = random(40, 30, 3, 3)
    before = kernels.fingerprint(weight)
    assert kernels.fingerprint(weight.clone()) == before
    last = weight.clone()
    last[-1, -1, -1, -1] = torch.nextafter(last[-1, -1, -1, -1], torch.tensor(9.0))
    swapped = weight.flip(0)
    assert len({before, kernels.fingerprint(last), kernels.fingerprint(swapped)}) == 3


@pytest.mark.parametrize("kernels", [torch_kernels, numba_kernels()[0]])
def test_a_fingerprint_depends_on_every_sign(kernels: Kernels) -> None:
    # the bits of these signs, times 1, 3, 5 and 7, add up to 0
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(2700).view(40, 30, 3, 3)
    weight = random(40, 30, 3, 3).abs() * signs
    assert kernels.fingerprint(weight) != kernels.fingerprint(-weight)


@pytest.mark.parametrize("size", [1, 2, 3, 1023, 1025, (1 << 16) + 1, (1 << 17) + 1027])
def test_a_fingerprint_depends_on_the_ends_of_every_size(size: int) -> None:
    weight, kernels = random(size), numba_kernels()[0]
    seen = {kernels.fingerprint(weight)}
    changes = {0, size // 2, size - 1}
    for index in changes:
        changed = weight.clone()
        changed[index] += 1
        seen.add(kernels.fingerprint(changed))
    assert len(seen) == 1 + len(changes)


def warning_with_torchs_kernels(folder: Path) -> str:
    """What a new process warns of that has ``folder`` before all others and computes by torch."""
    code = """
        import torch
        from sdconv.fast.cpu import torch_kernels
        from sdconv.fast.cpu.kernels import kernels_for
        assert kernels_for(torch.float32) is torch_kernels
        print(kernels_for(torch.float32).fingerprint(torch.ones(3)) != b"")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert run.stdout == "True\n"
    return run.stderr


@pytest.mark.slow
def test_with_a_broken_numba_it_warns_and_computes_by_torch(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less')")
    found = warning_with_torchs_kernels(tmp_path)
    assert "Numba needs NumPy 2.2 or less" in found
    assert "NUMBA_CACHE_DIR" in found


@pytest.mark.slow
def test_without_instructions_for_float16_it_warns_and_computes_by_torch(tmp_path: Path) -> None:
    """As if the processor had none."""
    hides = """
        from llvmlite import binding
        features = binding.get_host_cpu_features()
        features |= {"sse2": True, "f16c": False}
        binding.get_host_cpu_features = lambda: features
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hides))
    found = warning_with_torchs_kernels(tmp_path)
    assert "F16C" in found
    assert "NUMBA_CACHE_DIR" not in found
