"""Maps of more than 2^31 numbers: every index into them is one of 64 bits.

The maps are files full of holes, of which only the last rows are read and written.
"""

from __future__ import annotations

import mmap
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconv.streaming.fused import DoubledWinograd, Winograd
from sdconv.streaming.layers import Doubled, Halved, Layer, Same
from sdconv.streaming.maps import Layout, Map, Store
from sdconv.streaming.moments import Moments
from sdconv.streaming.passes import Ground

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes")
WIDTH, CHANNELS = 64, 128
HEIGHT = 2**31 // (WIDTH * CHANNELS) + 24
KINDS: list[Callable[[nn.Conv2d], Layer]] = [Same, Doubled, Halved, Winograd, DoubledWinograd]


def sparse(height: int, width: int, channels: int) -> Tensor:
    """Zeros, in a file that takes no room until it is written to."""
    size = 4 * height * width * channels
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        block = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(block, dtype=torch.float32).view(height, width, channels)


@torch.no_grad()
def last_rows(layer: Layer, source: Tensor, target: Tensor, strips: int = 2) -> Tensor:
    """What the last strips of two units each make."""
    moments = Moments(source.shape[2], torch.device("cpu"))
    moments.add(torch.randn(8, 8, source.shape[2], generator=torch.Generator().manual_seed(1)))
    ground = Ground(source, target, None, (), moments, None, torch.device("cpu"))
    units = layer.units(source.shape[0])
    under_way = layer.begin(ground, 2)
    for first in range(units - 2 * strips, units, 2):
        under_way.strip(first, first + 2)
    top, bottom = layer.outputs(units - 2 * strips + 2, units)
    return target[top:bottom].clone()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_rows_of_a_wide_map(kind: Any) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(CHANNELS, CHANNELS, 3).requires_grad_(False)
    norm = nn.GroupNorm(32, CHANNELS).requires_grad_(False)
    layer = kind(module) if kind in (Doubled, DoubledWinograd, Halved) else kind(module, norm, True)
    rows = torch.randn(24, WIDTH, CHANNELS)
    small = last_rows(layer, rows, torch.empty(*layer.output_size(24, WIDTH), CHANNELS))
    # where the output is the wider one, it alone is as wide as that
    height = HEIGHT // 4 if kind in (Doubled, DoubledWinograd) else HEIGHT
    source = sparse(height, WIDTH, CHANNELS)
    target = sparse(*layer.output_size(height, WIDTH), CHANNELS)
    assert max(source.numel(), target.numel()) > 2**31
    source[-24:] = rows
    assert torch.equal(last_rows(layer, source, target), small)
    assert small.abs().max() > 0.1, "the control: holes would give less"
    assert not target[: -2 * len(rows)][:: height // 64].any(), "nothing is written elsewhere"


def test_over_the_map_itself() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(CHANNELS, CHANNELS, 3).requires_grad_(False)
    rows = torch.randn(24, WIDTH, CHANNELS)
    for layer in (Same(module), Winograd(module)):
        small = rows.clone()
        small = last_rows(layer, small, small)
        source = sparse(HEIGHT, WIDTH, CHANNELS)
        source[-24:] = rows
        assert torch.equal(last_rows(layer, source, source), small)


def test_statistics_of_as_many_values() -> None:
    """Counts go beyond 2^31 and what is added last still counts for what it is."""
    moments = Moments(2, torch.device("cpu"))
    rows = torch.zeros(1, 1, 2)
    moments.add(rows)
    moments.count = 2**33
    moments.take(
        torch.tensor([[[2.0**33, 2.0**33], [0.0, 0.0]]], dtype=torch.float64),
        torch.tensor([2.0**33], dtype=torch.float64),
    )
    assert moments.count == 2**34
    assert moments.mean.tolist() == [0.5, 0]
    assert moments.squares.tolist() == [2**32, 0]


@pytest.mark.slow
def test_the_last_rows_of_a_spilled_map_rest(tmp_path: Path) -> None:
    """In a file of its full size, whose last pages leave the process when they rest."""
    key = Map(HEIGHT, WIDTH, CHANNELS, torch.float32)
    if shutil.disk_usage(tmp_path).free < 2 * key.bytes:
        pytest.skip(f"needs {2 * key.bytes >> 30} GiB of free disk: set TMPDIR to a larger one")
    store = Store(Layout({key: 0}, 0, key.bytes), torch.device("cpu"), tmp_path)
    map_ = store.tensor(key)
    map_[-24:] = 1

    def resident() -> int:
        pages = Path("/proc/self/smaps").read_text().split(str(tmp_path))[1].splitlines()
        return next(int(line.split()[1]) for line in pages if line.startswith("Rss"))

    before = resident()
    assert before >= 24 * WIDTH * CHANNELS * 4 // 1024
    store.rest(key, HEIGHT - 24, HEIGHT)
    assert resident() < before / 8
    assert map_[-24:].eq(1).all() and not map_[-25].any()
