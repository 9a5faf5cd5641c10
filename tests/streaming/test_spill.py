"""Spilled feature maps: their files are used beyond the limit, and gone however a run ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.paths import ROOT
from helpers.slow import first_of
from helpers.streamed import LINUX, open_files
from torch import Tensor

import sdconv
from sdconv.sizes import format_bytes
from sdconv.streaming import check_disk_space, planner, spill_folder
from sdconv.streaming.buffers import AllocatedBuffers, FeatureBuffer, MemoryLayout
from sdconv.streaming.layers import StreamLayer

NETWORK = seeded.kl((32, 64), 4, True, layers_per_block=1)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A network that spills even small feature maps: the plan leaves nothing for kernels."""
    monkeypatch.setattr(planner, "KERNEL_OVERHEAD", 0)
    network = seeded.network(NETWORK)
    network.enable_streaming("1800KiB", tmp_path)
    return network


def latents() -> Tensor:
    return torch.randn(2, 4, 48, 40, generator=torch.Generator().manual_seed(1))


@LINUX
@torch.no_grad()
def test_files_are_used_and_removed(network: Any, tmp_path: Path) -> None:
    z = latents()
    seen: list[tuple[list[str], list[Path]]] = []
    tensor_of = AllocatedBuffers.tensor

    def watch(self: AllocatedBuffers, buffer: FeatureBuffer) -> Tensor:
        tensor = tensor_of(self, buffer)
        seen.append((open_files(tmp_path), list(tmp_path.iterdir())))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllocatedBuffers, "tensor", watch)
        streamed = network.decode(z).sample
    assert max(len(files) for files, _ in seen) >= 1, "the control: buffers are in a file"
    assert all(named == [] for _, named in seen), "the file never has a name"
    assert open_files(tmp_path) == []
    network.disable_streaming()
    whole = network.decode(z).sample
    assert (streamed - whole).abs().max() < 1e-5 * whole.abs().max()


@LINUX
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@torch.no_grad()
def test_nothing_is_left_after_an_error(
    error: type[BaseException], network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StreamLayer.compute
    last = network.decoder.up_blocks[1].resnets[1].conv2

    def fails(self: StreamLayer, *args: Any) -> Tensor:
        if self.module is last:
            assert open_files(tmp_path), "the control: there is something to leave"
            raise error
        return right(self, *args)

    monkeypatch.setattr(StreamLayer, "compute", fails)
    with pytest.raises(error):
        network.decode(latents())
    assert open_files(tmp_path) == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(StreamLayer, "compute", right)
    assert network.decode(latents()).sample.isfinite().all(), "and it can be called again"


CHILD = """
import sys, torch
from helpers import seeded
from sdconv.streaming import planner
planner.KERNEL_OVERHEAD = 0
network = seeded.network(seeded.kl((32, 64), 4, True, layers_per_block=1))
network.enable_streaming("3MiB", sys.argv[1])
print("begun", flush=True)
with torch.no_grad():
    while True:
        network.decode(torch.randn(1, 4, 64, 64))
"""


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("how", first_of([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]), ids=str)
def test_nothing_is_left_by_a_process_that_was_stopped(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    import_path = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": import_path},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        mapped = Path(f"/proc/{process.pid}/maps")
        until = time.monotonic() + 60
        while str(tmp_path) not in mapped.read_text():  # until a buffer is in a file
            assert time.monotonic() < until
        process.send_signal(how)
        process.wait(60)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_an_error_beforehand(tmp_path: Path) -> None:
    with pytest.raises(sdconv.InputError, match="not enough disk space") as raised:
        check_disk_space(tmp_path, 1 << 60)
    assert "1073741824 GiB free" in str(raised.value)
    check_disk_space(tmp_path, 1)


@torch.no_grad()
def test_disk_space_is_checked_before_anything_is_computed(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    right = StreamLayer.make_runner
    monkeypatch.setattr(
        StreamLayer, "make_runner", lambda self, *args: computed.append(self) or right(self, *args)
    )
    z = latents()
    need = network.streaming.plan(network, "decode", z).spilled
    full = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full._replace(free=need - 1))
    with pytest.raises(sdconv.InputError, match="not enough disk space") as raised:
        network.decode(z)
    assert f"{format_bytes(need)} free" in str(raised.value) and computed == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full._replace(free=need))
    network.decode(z)
    assert computed != [], "the control"


def test_a_file_that_cannot_be_created(tmp_path: Path) -> None:
    """Its space is reserved at once, so that no signal can end the process later."""
    buffer = FeatureBuffer(1 << 20, 1 << 20, 1 << 8, torch.float32)
    layout = MemoryLayout({buffer: 0}, 0, buffer.bytes)
    with pytest.raises(sdconv.SdconvError, match="cannot create a file for feature maps"):
        AllocatedBuffers(layout, torch.device("cpu"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["absent", "a file", 3, b"bytes"])
def test_not_a_writable_folder(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    given = tmp_path / folder if isinstance(folder, str) else folder
    with pytest.raises(sdconv.InputError, match="not a writable folder"):
        seeded.network(NETWORK).enable_streaming(spill=given)


@torch.no_grad()
def test_a_folder_that_was_removed(network: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    network.enable_streaming("1800KiB", folder)
    folder.rmdir()
    with pytest.raises(sdconv.InputError, match="not a writable folder"):
        network.decode(latents())
    folder.mkdir()
    assert network.decode(latents()).sample.isfinite().all(), "the control"


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm, a file system in memory"
)
def test_a_warning_for_a_folder_in_memory() -> None:
    with pytest.warns(sdconv.SdconvWarning, match="keeps its files in memory"):
        spill_folder("/dev/shm")


@pytest.mark.slow
@LINUX
@torch.no_grad()
def test_no_growth_over_many_calls(network: Any) -> None:
    network.enable_streaming("900KiB", network.streaming.spill)
    z = latents()[:, :, :16, :16]
    before = len(open_files(Path("/")))
    for _ in range(10):
        network.decode(z)
    assert len(open_files(Path("/"))) <= before + 5
