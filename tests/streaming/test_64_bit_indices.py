"""Feature maps of more than 2^31 values, which need 64-bit indices.

They are sparse files, of which only the last rows are read and written.
"""

from __future__ import annotations

import mmap
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconv.streaming.buffers import AllocatedBuffers, FeatureBuffer, MemoryLayout
from sdconv.streaming.fused import WinogradConv3x3, WinogradUpsampleConv
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.layers import Conv3x3, DownsampleConv, StepContext, StreamLayer, UpsampleConv

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
WIDTH, CHANNELS = 64, 128
HEIGHT = 2**31 // (WIDTH * CHANNELS) + 24
UPSAMPLING: tuple[type[StreamLayer], ...] = (UpsampleConv, WinogradUpsampleConv)
KINDS: tuple[type[StreamLayer], ...] = (Conv3x3, DownsampleConv, WinogradConv3x3, *UPSAMPLING)


def sparse(height: int, width: int, channels: int) -> Tensor:
    """Zeros, in a file that takes no disk space until it is written to."""
    size = 4 * height * width * channels
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        block = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(block, dtype=torch.float32).view(height, width, channels)


@torch.no_grad()
def last_rows(layer: StreamLayer, source: Tensor, target: Tensor, strips: int = 2) -> Tensor:
    """The last strip's output, after ``strips`` strips of two units each."""
    stats = RunningGroupStats(source.shape[2], torch.device("cpu"))
    stats.update(torch.randn(8, 8, source.shape[2], generator=torch.Generator().manual_seed(1)))
    device = torch.device("cpu")
    context = StepContext(source, target, None, (), stats, None, device, source is target)
    units = layer.units(source.shape[0])
    runner = layer.make_runner(context, 2)
    for first in range(units - 2 * strips, units, 2):
        runner.run_strip(first, first + 2)
    top, bottom = layer.output_rows(units - 2 * strips + 2, units)
    return target[top:bottom].clone()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_rows_of_a_large_feature_map(kind: Any) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(CHANNELS, CHANNELS, 3).requires_grad_(False)
    norm = nn.GroupNorm(32, CHANNELS).requires_grad_(False)
    has_norm = kind in (Conv3x3, WinogradConv3x3)
    layer = kind(module, norm, True) if has_norm else kind(module)
    rows = torch.randn(24, WIDTH, CHANNELS)
    small = last_rows(layer, rows, torch.empty(*layer.output_size(24, WIDTH), CHANNELS))
    # an upsampled output is the larger of the two
    height = HEIGHT // 4 if kind in UPSAMPLING else HEIGHT
    source = sparse(height, WIDTH, CHANNELS)
    target = sparse(*layer.output_size(height, WIDTH), CHANNELS)
    assert max(source.numel(), target.numel()) > 2**31
    source[-24:] = rows
    assert torch.equal(last_rows(layer, source, target), small)
    assert small.abs().max() > 0.1, "the control: zeros would give less"
    assert not target[: -2 * len(rows)][:: height // 64].any(), "nothing is written elsewhere"


def test_in_place() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(CHANNELS, CHANNELS, 3).requires_grad_(False)
    rows = torch.randn(24, WIDTH, CHANNELS)
    for layer in (Conv3x3(module), WinogradConv3x3(module)):
        small = rows.clone()
        small = last_rows(layer, small, small)
        source = sparse(HEIGHT, WIDTH, CHANNELS)
        source[-24:] = rows
        assert torch.equal(last_rows(layer, source, source), small)


def test_statistics_of_more_than_2_to_the_31_values() -> None:
    """Counts beyond 2^31 are exact, and the last values are weighted correctly."""
    stats = RunningGroupStats(2, torch.device("cpu"))
    rows = torch.zeros(1, 1, 2)
    stats.update(rows)
    stats.count = 2**33
    stats.update_from_sums(
        torch.tensor([[[2.0**33, 2.0**33], [0.0, 0.0]]], dtype=torch.float64),
        torch.tensor([2.0**33], dtype=torch.float64),
    )
    assert stats.count == 2**34
    assert stats.mean.tolist() == [0.5, 0]
    assert stats.squares.tolist() == [2**32, 0]


@pytest.mark.slow
def test_the_last_rows_of_a_spilled_feature_map_are_released(tmp_path: Path) -> None:
    """The file has its full size, and its last pages leave the process's memory."""
    buffer = FeatureBuffer(HEIGHT, WIDTH, CHANNELS, torch.float32)
    if shutil.disk_usage(tmp_path).free < 2 * buffer.bytes:
        pytest.skip(f"needs {2 * buffer.bytes >> 30} GiB of free disk: set TMPDIR to a larger one")
    layout = MemoryLayout({buffer: 0}, 0, buffer.bytes)
    buffers = AllocatedBuffers(layout, torch.device("cpu"), tmp_path)
    feature_map = buffers.tensor(buffer)
    feature_map[-24:] = 1

    def resident() -> int:
        pages = Path("/proc/self/smaps").read_text().split(str(tmp_path))[1].splitlines()
        return next(int(line.split()[1]) for line in pages if line.startswith("Rss"))

    before = resident()
    assert before >= 24 * WIDTH * CHANNELS * 4 // 1024
    buffers.release_rows(buffer, HEIGHT - 24, HEIGHT)
    assert resident() < before / 8
    assert feature_map[-24:].eq(1).all() and not feature_map[-25].any()
