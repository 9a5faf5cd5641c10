"""Maps on the disk are those captured, however the run that writes them ends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pipelines, seeded
from helpers.paths import ROOT
from helpers.slow import first_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sdconv
from sdconv.features import Maps

pytest.importorskip("zarr", reason="maps on the disk need zarr: pip install 'sdconv[maps]'")

CONFIG = seeded.kl((32, 32), 4, True, layers_per_block=1)
NAME = "decoder.mid_block.resnets.0"
# the first is one that NumPy lacks
DTYPES = [torch.bfloat16, None, torch.float16, torch.float64, torch.float8_e4m3fn]


@cache
def vae() -> Any:
    return seeded.network(CONFIG)


def image(rows: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, rows, 8, generator=torch.Generator().manual_seed(seed))


def entries(maps: Maps) -> Iterator[tuple[object, ...]]:
    for name in maps:
        for entry in maps.series(name):
            yield name, entry.call, entry.timestep, entry.network_call.guided, entry.tensor


def assert_same(found: Maps, expected: Maps) -> None:
    assert found.pipeline == expected.pipeline
    pairs = list(zip(entries(found), entries(expected), strict=True))
    for (*one, x), (*other, y) in pairs:
        assert one == other
        assert isinstance(x, Tensor) and isinstance(y, Tensor)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        # torch cannot compare 8-bit floats
        assert torch.equal(x.float(), y.float()) if x.itemsize == 1 else torch.equal(x, y)
    assert pairs


@pytest.mark.parametrize("dtype", first_of(DTYPES))
def test_maps_are_the_same_after_saving_and_opening(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    with torch.no_grad(), sdconv.capture(vae(), "*", dtype=dtype) as maps:
        vae()(image())
    path = tmp_path / "new folder" / "maps.zarr"
    maps.save(path)
    assert_same(sdconv.open_maps(path), maps)
    assert [one.name for one in path.parent.iterdir()] == ["maps.zarr"]
    assert isinstance(sdconv.open_maps(str(path))[NAME], Tensor)


def test_the_zarr_package_alone_reads_it(tmp_path: Path) -> None:
    import zarr

    with torch.no_grad(), sdconv.capture(vae(), [NAME, "encoder"], store=tmp_path / "maps") as maps:
        vae()(image())
    group = zarr.open_group(tmp_path / "maps", mode="r")
    assert {name for name, _ in group.groups()} == set(maps)
    assert (group[NAME]["0"][0] == maps[NAME].numpy()).all()
    # a folder that is not a group is skipped, with a warning
    (tmp_path / "maps" / NAME / "zarr.json").unlink()
    with pytest.warns(match="not recognized"):
        assert {name for name, _ in group.groups()} == {"encoder"}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_dtype_that_cannot_be_written(tmp_path: Path) -> None:
    half = torch.complex32
    with torch.no_grad(), sdconv.capture(vae(), NAME, dtype=half) as maps:
        vae()(image())
    with pytest.raises(sdconv.SdconvError, match="maps: cannot be written"):
        maps.save(tmp_path / "maps")
    assert list(tmp_path.iterdir()) == []


def test_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad(), sdconv.capture(vae(), NAME, store="maps") as maps:
        vae()(image())
    opened = sdconv.open_maps("maps")
    monkeypatch.chdir("/")
    assert_same(opened, maps)


def test_a_pipelines_maps_on_the_disk(tmp_path: Path) -> None:
    pipe = pipelines.pipeline("text")
    patterns = ["unet.*.resnets.0", "vae.decoder.conv_in"]
    with sdconv.capture(pipe, patterns) as maps:
        pipelines.run(pipe, "text")
    path = tmp_path / "maps"
    with sdconv.capture(pipe, patterns, store=path) as stored:
        pipelines.run(pipe, "text")
    assert_same(stored, maps)
    assert_same(sdconv.open_maps(path), maps)
    stored.save(tmp_path / "again")
    assert_same(sdconv.open_maps(tmp_path / "again"), maps)


def test_maps_of_several_shapes_and_numbers(tmp_path: Path) -> None:
    def run(**options: Any) -> Maps:
        with torch.no_grad(), sdconv.capture(vae(), ["encoder", NAME], **options) as maps:
            for rows in (8, 8, 16, 8):
                vae()(image(rows))
        return maps

    plain = run()
    assert_same(run(store=tmp_path / "a"), plain)
    assert_same(sdconv.open_maps(tmp_path / "a"), plain)
    # some stay in memory too; all are written
    assert_same(run(store=tmp_path / "b", max_memory=20_000), plain)
    assert_same(sdconv.open_maps(tmp_path / "b"), plain)
    shutil.rmtree(tmp_path / "a" / NAME)
    assert list(sdconv.open_maps(tmp_path / "a")) == ["encoder"]


def test_memory_is_used_up_to_the_limit(tmp_path: Path) -> None:
    with (
        torch.no_grad(),
        sdconv.capture(vae(), ["encoder", NAME], store=tmp_path / "a", max_memory=1024) as maps,
    ):
        vae()(image())
    shutil.rmtree(tmp_path / "a")
    first = maps["encoder"]
    assert isinstance(first, Tensor) and first.nbytes == 1024  # (2, 8, 4, 4)
    with pytest.raises(sdconv.SdconvError, match="cannot be read"):
        _ = maps[NAME]


def test_reduced_maps_with_few_axes(tmp_path: Path) -> None:
    reductions = ["mean", lambda x: x.sum(), lambda x: x.argmax(1), lambda x: x > 0]
    for number, reduce in enumerate(reductions):
        path = tmp_path / str(number)
        with torch.no_grad(), sdconv.capture(vae(), NAME, reduce=reduce) as maps:
            vae()(image())
        maps.save(path)
        assert_same(sdconv.open_maps(path), maps)


@pytest.mark.parametrize("what", ["file", "folder", "maps"])
def test_an_existing_path_is_not_touched(what: str, tmp_path: Path) -> None:
    with torch.no_grad(), sdconv.capture(vae(), NAME) as maps:
        vae()(image())
    path = tmp_path / "taken"
    if what == "file":
        path.write_text("mine")
    elif what == "folder":
        path.mkdir()
    else:
        maps.save(path)
    before = sorted((one, one.stat().st_mtime_ns) for one in tmp_path.rglob("*"))
    with pytest.raises(sdconv.SdconvError, match="overwrite nothing"):
        maps.save(path)
    ran: list[int] = []
    with (
        pytest.raises(sdconv.SdconvError, match="overwrite nothing"),
        sdconv.capture(vae(), NAME, store=path),
    ):
        ran.append(1)
    assert ran == []
    assert sorted((one, one.stat().st_mtime_ns) for one in tmp_path.rglob("*")) == before
    assert not any(module._forward_hooks for module in vae().modules())


def test_nothing_captured_leaves_no_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(sdconv.SdconvError, match="reached"),
        sdconv.capture(vae(), NAME, store=tmp_path / "maps"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


HEAD = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, sdconv
from helpers import seeded
torch.set_num_threads({torch.get_num_threads()})  # it decides how sums are rounded
torch.set_grad_enabled(False)
network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
NAME, folder = {NAME!r}, sys.argv[1]
def image(rows=8, seed=1):
    return torch.randn(2, 3, rows, 8, generator=torch.Generator().manual_seed(seed))
"""


def command(code: str, folder: Path) -> list[str]:
    """The command that runs ``code`` in its own process, on the network of these tests."""
    return [sys.executable, "-c", HEAD + textwrap.dedent(code), str(folder)]


@pytest.mark.slow
def test_a_killed_run_leaves_complete_maps(tmp_path: Path) -> None:
    code = """
        calls = []
        def kill(*_):
            calls.append(1)
            if len(calls) == 3:  # in the third call, between the two layers
                os.kill(os.getpid(), signal.SIGKILL)
        network.decoder.mid_block.resnets[1].register_forward_hook(kill)
        with sdconv.capture(network, [NAME, "decoder.conv_out"], store=folder + "/maps"):
            for seed in range(9):
                network(image(seed=seed))
        """
    ran = subprocess.run(command(code, tmp_path), capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    found = sdconv.open_maps(tmp_path / "maps")
    assert found.series(NAME).calls == (0, 1, 2)
    assert found.series("decoder.conv_out").calls == (0, 1)
    with torch.no_grad(), sdconv.capture(vae(), [NAME, "decoder.conv_out"]) as maps:
        for seed in range(3):
            vae()(image(seed=seed))
    for name, count in ((NAME, 3), ("decoder.conv_out", 2)):
        pairs = zip(found.series(name), maps.series(name)[:count], strict=True)
        assert all(torch.equal(one.tensor, other.tensor) for one, other in pairs)


@pytest.mark.slow
def test_a_run_killed_at_any_moment(tmp_path: Path) -> None:
    """Each map that is listed is complete, no matter what was being written."""
    code = """
        with sdconv.capture(network, [NAME, "encoder"], store=folder + "/maps"):
            print("begun", flush=True)
            while True:
                network(image())
        """
    with subprocess.Popen(command(code, tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        while len(list(tmp_path.glob(f"maps/{NAME}/0/c/*"))) < 5:
            assert process.poll() is None
        process.kill()
    with torch.no_grad(), sdconv.capture(vae(), [NAME, "encoder"]) as maps:
        vae()(image())
    found = sdconv.open_maps(tmp_path / "maps")
    assert len(found.series(NAME)) >= 3
    for name in ("encoder", NAME):
        assert all(torch.equal(x, maps[name]) for x in found.series(name).tensors)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_full_disk_keeps_complete_maps(tmp_path: Path) -> None:
    # files of more than 12 kB, such as the second map's, cannot be written
    code = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        try:
            with sdconv.capture(network, NAME, store=folder + "/maps") as maps:
                network(image(8))
                network(image(64))
        except sdconv.SdconvError as error:
            print(error)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        print(len(maps.series(NAME)), maps[NAME].shape[2])
        with sdconv.capture(network, NAME) as maps:
            network(image(64))
        try:
            maps.save(folder + "/saved")
        except sdconv.SdconvError as error:
            print(error)
        """
    ran = subprocess.run(command(code, tmp_path), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("cannot be written") == 2
    assert f"{tmp_path}/saved: cannot be written" in ran.stdout
    assert "File too large" in ran.stdout
    assert "1 4" in ran.stdout
    # the complete map is intact, and the failed save has left nothing
    assert [one.name for one in tmp_path.iterdir()] == ["maps"]
    with torch.no_grad(), sdconv.capture(vae(), NAME) as maps:
        vae()(image(8))
    assert torch.equal(sdconv.open_maps(tmp_path / "maps")[NAME], maps[NAME])  # type: ignore[arg-type]


def test_an_unfinished_array(tmp_path: Path) -> None:
    path = saved(tmp_path / "maps")
    (path / NAME / "1").mkdir()
    (path / "encoder" / "0").mkdir(parents=True)
    assert list(sdconv.open_maps(path)) == [NAME]


def saved(path: Path) -> Path:
    with torch.no_grad(), sdconv.capture(vae(), NAME) as maps:
        vae()(image())
    maps.save(path)
    return path


@pytest.mark.parametrize("what", ["nothing", "empty", "file", "other zarr", "torn"])
def test_folders_that_hold_no_maps(what: str, tmp_path: Path) -> None:
    import zarr

    path = tmp_path / "maps"
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_bytes(b"PK")
    elif what == "other zarr":
        zarr.create_group(path, zarr_format=3)
    elif what == "torn":
        text = (saved(path) / "zarr.json").read_text()
        (path / "zarr.json").write_text(text[:-20])
    with pytest.raises(sdconv.SdconvError, match="not a folder of feature maps"):
        sdconv.open_maps(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("template") / "maps")


@settings(max_examples=30)
@given(data=st.data())
def test_damaged_attributes_and_chunks(data: st.DataObject, template: Path) -> None:
    path = template.with_name("spoiled")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template, path)
    about = path / NAME / "0" / "zarr.json"
    if data.draw(st.booleans()):
        content = json.loads(about.read_text())
        entry = content["attributes"] if data.draw(st.booleans()) else content
        key = data.draw(st.sampled_from(sorted(entry)))
        values = st.none() | st.integers(-1, 10**15) | st.text(max_size=5) | st.just([[]])
        entry[key] = data.draw(values | st.lists(st.integers(-1, 2**40), max_size=5))
        about.write_text(json.dumps(content))
    else:
        (chunk,) = (one for one in about.parent.glob("c/**/*") if one.is_file())
        chunk.write_bytes(data.draw(st.binary(max_size=40)))
    try:
        found = sdconv.open_maps(path)
        for name in found:
            assert isinstance(found.series(name)[0].tensor, Tensor)
    except sdconv.SdconvError:
        pass


def test_without_zarr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with (
        pytest.raises(sdconv.SdconvError, match=r"sdconv\[maps\]"),
        sdconv.capture(vae(), NAME, store=tmp_path / "maps"),
    ):
        pass
    with pytest.raises(sdconv.SdconvError, match=r"sdconv\[maps\]"):
        sdconv.open_maps(tmp_path)
    with torch.no_grad(), sdconv.capture(vae(), NAME) as maps:  # captures in memory still work
        vae()(image())
    assert NAME in maps
