"""The compiled loops against the plain operations, and the ways to run them on several threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cpu import kernels as engines
from sdconv.fast.cpu.group_stats import combined
from sdconv.fast.cpu.numba import launch as launching
from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.winograd import DOUBLED, PLAIN, Scheme

pytest.importorskip("numba", reason="the compiled loops need numba: pip install sdconv[fast]")


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).abs().max() <= 2e-6 * b.abs().max())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(
    height=st.integers(1, 25),
    width=st.integers(1, 70),
    channels=st.sampled_from([4, 64, 72]),
    scheme=st.sampled_from([PLAIN, DOUBLED]),
    data=st.data(),
)
@settings(max_examples=60)
def test_load_and_store(
    height: int, width: int, channels: int, scheme: Scheme, data: st.DataObject
) -> None:
    rows, affine = random(height, width, channels), (random(channels), random(channels))
    height, width = height * 4 // scheme.step, width * 4 // scheme.step
    whole = -(-height // 4)
    first = data.draw(st.integers(0, whole - 1))
    strip = Strip(height, width, first, data.draw(st.integers(1, whole - first)))
    affine = data.draw(st.sampled_from([affine, None]))
    row, end = strip.reads(scheme)
    above = None
    if strip.first and scheme is PLAIN and data.draw(st.booleans()):
        above = random(width, channels)
    bias, residual = random(channels), random(strip.end - strip.first, width, channels)
    tiles, outs, sums = [], [], []
    # by plain operations in float64: in float32 their own transforms lose more
    for engine, dtype in ((engines.compiled()[0], None), (engines.plain(), torch.float64)):
        one, over, own_bias, beside = (
            None if t is None else t.to(dtype) for t in (rows, above, bias, residual)
        )
        own_affine = None if affine is None else tuple(t.to(dtype) for t in affine)
        loaded = torch.empty(scheme.places, strip.tiles, channels, dtype=dtype)
        engine.load(scheme, one[row:end], row, over, strip, own_affine, True, loaded)
        out = torch.empty_like(beside)
        sums.append(combined(*engine.store(scheme, loaded, strip, own_bias, beside, out, 4)))
        tiles.append(loaded)
        outs.append(out)
    assert close(*tiles)
    assert close(*outs)
    assert close(*sums)


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-3, 1.0, -20.0, 86.0, -86.0, 90.0, -90.0, 1e4])
def test_silu(value: float) -> None:
    # by the middle tap of a tile: B^T leaves the sum of what it reads in known places
    strip = Strip(4, 4, 0, 1)
    rows = torch.full((4, 4, 1), value)
    tiles = torch.empty(2, 36, 1, 1)
    one = (torch.ones(1), torch.zeros(1))
    engines.compiled()[0].load(PLAIN, rows, 0, None, strip, one, True, tiles[0])
    engines.plain().load(PLAIN, rows, 0, None, strip, one, True, tiles[1])
    assert torch.allclose(tiles[0], tiles[1], rtol=1e-6, atol=1e-34)


def test_sums_by_python_threads_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random(50, 20, 8)
    expected = engines.compiled()[0].sums(rows, 4)[0]
    monkeypatch.setattr(launching, "team", lambda: launching.python_threads)
    monkeypatch.setattr(launching, "threads", lambda: 3)
    assert torch.equal(engines.compiled()[0].sums(rows, 4)[0], expected)


@pytest.mark.parametrize("engine", [engines.plain(), engines.compiled()[0]])
def test_a_fingerprint_sees_every_bit_and_every_place(engine: engines.Engine) -> None:
    weight = random(40, 30, 3, 3)
    before = engine.fingerprint(weight)
    assert engine.fingerprint(weight.clone()) == before
    last = weight.clone()
    last[-1, -1, -1, -1] = torch.nextafter(last[-1, -1, -1, -1], torch.tensor(9.0))
    swapped = weight.flip(0)
    assert len({before, engine.fingerprint(last), engine.fingerprint(swapped)}) == 3


@pytest.mark.parametrize("engine", [engines.plain(), engines.compiled()[0]])
def test_a_fingerprint_sees_every_sign(engine: engines.Engine) -> None:
    # the bits of such signs, times 1, 3, 5 and 7, add up to nothing
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(2700).view(40, 30, 3, 3)
    weight = random(40, 30, 3, 3).abs() * signs
    assert engine.fingerprint(weight) != engine.fingerprint(-weight)


@pytest.mark.parametrize("size", [1, 2, 3, 1023, 1025, (1 << 16) + 1, (1 << 17) + 1027])
def test_a_fingerprint_sees_the_ends_of_every_size(size: int) -> None:
    weight, engine = random(size), engines.compiled()[0]
    seen = {engine.fingerprint(weight)}
    places = {0, size // 2, size - 1}
    for place in places:
        changed = weight.clone()
        changed[place] += 1
        seen.add(engine.fingerprint(changed))
    assert len(seen) == 1 + len(places)


def test_a_broken_numba_is_told_and_not_needed(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less')")
    code = """
        import torch
        from sdconv.fast.cpu import kernels as engines
        assert engines.compiled()[0] is engines.plain()
        print(engines.of(torch.float32).fingerprint(torch.ones(3)) != b"")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert run.stdout == "True\n"
    assert "Numba needs NumPy 2.2 or less" in run.stderr
    assert "NUMBA_CACHE_DIR" in run.stderr
