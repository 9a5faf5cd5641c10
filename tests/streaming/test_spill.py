"""Maps in files: used when memory is short, and gone afterwards, however a run ends."""

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
from helpers.streamed import LINUX, open_files
from torch import Tensor

import sdconv
from sdconv.streaming import check_room, checked_folder, in_words, planner
from sdconv.streaming.maps import Layout, Map, Store

NETWORK = seeded.kl((32, 64), 4, True, layers_per_block=1)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """One that spills even small maps: its kernels are taken to need nothing."""
    monkeypatch.setattr(planner, "KERNELS", 0)
    network = seeded.network(NETWORK)
    network.enable_streaming("1800KiB", tmp_path)
    return network


def latents() -> Tensor:
    return torch.randn(2, 4, 48, 40, generator=torch.Generator().manual_seed(1))


@LINUX
@torch.no_grad()
def test_files_are_used_and_gone(network: Any, tmp_path: Path) -> None:
    z = latents()
    seen: list[tuple[list[str], list[Path]]] = []
    made = Store.tensor

    def watch(self: Store, key: Map) -> Tensor:
        tensor = made(self, key)
        seen.append((open_files(tmp_path), list(tmp_path.iterdir())))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "tensor", watch)
        streamed = network.decode(z).sample
    assert max(len(files) for files, _ in seen) >= 1, "the control: maps are in a file"
    assert all(named == [] for _, named in seen), "none has a name at any time"
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
    from sdconv.streaming.layers import Layer

    right = Layer.compute
    last = network.decoder.up_blocks[1].resnets[1].conv2

    def fails(self: Layer, *args: Any) -> Tensor:
        if self.module is last:
            assert open_files(tmp_path), "the control: there is something to leave"
            raise error
        return right(self, *args)

    monkeypatch.setattr(Layer, "compute", fails)
    with pytest.raises(error):
        network.decode(latents())
    assert open_files(tmp_path) == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Layer, "compute", right)
    assert network.decode(latents()).sample.isfinite().all(), "and it can be called again"


CHILD = """
import sys, torch, seeded
from sdconv.streaming import planner
planner.KERNELS = 0
network = seeded.network(seeded.kl((32, 64), 4, True, layers_per_block=1))
network.enable_streaming("3MiB", sys.argv[1])
print("begun", flush=True)
with torch.no_grad():
    while True:
        network.decode(torch.randn(1, 4, 64, 64))
"""


@LINUX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_nothing_is_left_by_a_process_that_was_stopped(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    places = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": places},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        mapped = Path(f"/proc/{process.pid}/maps")
        until = time.monotonic() + 60
        while str(tmp_path) not in mapped.read_text():  # until a map is in a file
            assert time.monotonic() < until
        process.send_signal(how)
        process.wait(60)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(sdconv.InputError, match="too little room") as raised:
        check_room(tmp_path, 1 << 60)
    assert "1073741824 GiB free" in str(raised.value)
    check_room(tmp_path, 1)


@torch.no_grad()
def test_the_need_is_stated_before_anything_is_computed(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdconv.streaming.layers import Layer

    computed = []
    right = Layer.begin
    monkeypatch.setattr(
        Layer, "begin", lambda self, *args: computed.append(self) or right(self, *args)
    )
    z = latents()
    need = network.streaming.plan(network, "decode", z).spilled
    full = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full._replace(free=need - 1))
    with pytest.raises(sdconv.InputError, match="too little room") as raised:
        network.decode(z)
    assert f"{in_words(need)} free" in str(raised.value) and computed == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full._replace(free=need))
    network.decode(z)
    assert computed != [], "the control"


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    """Its space is taken at once, so that the process is not ended by a signal later."""
    key = Map(1 << 20, 1 << 20, 1 << 8, torch.float32)
    layout = Layout({key: 0}, 0, key.bytes)
    with pytest.raises(sdconv.SdconvError, match="no file for feature maps"):
        Store(layout, torch.device("cpu"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["absent", "a file", 3, b"bytes"])
def test_what_is_no_folder(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    given = tmp_path / folder if isinstance(folder, str) else folder
    with pytest.raises(sdconv.InputError, match="no folder that can be written to"):
        seeded.network(NETWORK).enable_streaming(spill=given)


@torch.no_grad()
def test_a_folder_that_has_gone(network: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    network.enable_streaming("1800KiB", folder)
    folder.rmdir()
    with pytest.raises(sdconv.InputError, match="no folder that can be written to"):
        network.decode(latents())
    folder.mkdir()
    assert network.decode(latents()).sample.isfinite().all(), "the control"


@pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm, a file system in memory"
)
def test_a_folder_in_memory_is_warned_of() -> None:
    with pytest.warns(sdconv.SdconvWarning, match="keeps its files in memory"):
        checked_folder("/dev/shm")


@LINUX
@torch.no_grad()
def test_no_growth_over_many_calls(network: Any) -> None:
    network.enable_streaming("900KiB", network.streaming.spill)
    z = latents()[:, :, :16, :16]
    before = len(open_files(Path("/")))
    for _ in range(10):
        network.decode(z)
    assert len(open_files(Path("/"))) <= before + 5
