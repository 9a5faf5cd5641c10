"""Ended, full, shared: the folder ends up byte for byte the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.datasets import SMALL, assert_same
from helpers.paths import ROOT
from helpers.photos import files_of

from sdconv import dataset
from sdconv.dataset.run import environment_rank
from sdconv.errors import InputError, SdconvError


def test_a_second_run_does_nothing(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for encoded in (23, 0):
        summary = dataset.encode(source, vae, tmp_path, options=SMALL)
        assert summary.encoded == encoded
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("decoders", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_write_the_same_bytes(
    decoders: int, source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    options = replace(SMALL, workers=2 + decoders, decoders=decoders)
    dataset.encode(source, vae, tmp_path, options=options)
    assert_same(tmp_path, whole)


def test_static_ranks_write_the_same_bytes(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first = dataset.encode(source, vae, tmp_path, options=replace(SMALL, rank=(0, 2)))
    assert not first.complete
    assert 0 < first.done < first.shards
    second = dataset.encode(source, vae, tmp_path, options=replace(SMALL, rank=(1, 2)))
    assert second.complete
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}, (5, 8)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (3, 4),
        ),
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            (3, 6),
        ),
    ],
)
def test_ranks_of_the_environment(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert environment_rank(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "one"},
        {"SLURM_ARRAY_TASK_ID": "5"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"},
    ],
)
def test_other_ranks_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="the environment's ranks cannot be used"):
        environment_rank(environment)


# --- what an end at any moment leaves behind


def test_every_state_between_two_writes_is_completed(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    order = ["dataset.json", "plan.jsonl"]
    order += [f"latents-{n:06d}.{kind}" for n in range(6) for kind in ("tar", "json")]
    assert {*order, "quarantine.jsonl", ".lock"} == set(whole)
    host = os.uname().nodename
    for count in (0, 1, 2, 3, 6, 13):
        out = tmp_path / str(count)
        out.mkdir()
        for name in order[:count]:
            (out / name).write_bytes(whole[name])
        # half of the next file, of a process that is gone
        part = out / f".{order[count]}.{host}.{2**22 + 7}.part"
        part.write_bytes(whole[order[count]][:100])
        dataset.encode(source, vae, out, options=SMALL)
        assert_same(out, whole)


def test_a_damaged_shard_is_made_again(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name, content in whole.items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    assert dataset.verify(out).problems == ()
    flipped = bytearray(whole["latents-000001.tar"])
    flipped[2000] ^= 1
    (out / "latents-000001.tar").write_bytes(flipped)
    (out / "latents-000002.tar").write_bytes(b"short")
    found = dataset.verify(out, discard=True)
    assert [number for number, _ in found.problems] == [1, 2]
    assert dataset.encode(source, vae, out, options=SMALL).made == 2
    assert_same(out, whole)


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def test_an_image_deleted_after_the_plan(
    source: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos_here = copy_of(source, tmp_path / "in")
    out = tmp_path / "out"
    from sdconv.dataset import run

    planned = run._planned

    def then_delete(*arguments: object) -> object:
        """Deletes and changes images between plan and work."""
        found = planned(*arguments)  # type: ignore[arg-type]
        (photos_here / "photo02.jpg").unlink()
        with (photos_here / "photo04.jpg").open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(run, "_planned", then_delete)
    summary = dataset.encode(photos_here, vae, out, options=SMALL)
    assert (summary.quarantined["missing"], summary.quarantined["changed"]) == (1, 1)
    monkeypatch.setattr(run, "_planned", planned)
    summary = dataset.encode(photos_here, vae, out, options=SMALL)
    assert summary.missing == ("photo02",)
    assert "changed" not in summary.quarantined
    assert "photo04" in dataset.open_latents(out).keys
    shutil.copy2(source / "photo02.jpg", photos_here)
    dataset.encode(photos_here, vae, out, options=SMALL)
    assert "photo02" in dataset.open_latents(out).keys
    assert dataset.verify(out).problems == ()


# a program that limits the size of files (as a full disk does, but with another number)
FULL = """
import errno, sys
from sdconv import dataset
from sdconv.dataset import store

class Full:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")

write = store.Store.write
def full(self, name, content):
    is_late = name == "latents-000002.tar"
    return write(self, name, (lambda file: content(Full(file))) if is_late else content)
store.Store.write = full
dataset.encode(*sys.argv[1:], options=dataset.Options(size="16", shard_size=4))
"""


def test_a_full_disk_leaves_what_is_committed(
    source: Path, vae: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A write that fails as on a full disk, in a process of its own."""
    command = [sys.executable, "-c", FULL, source, vae, tmp_path / "out"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 1
    assert "latents-000002.tar: the disk is full" in ran.stderr
    assert "hint: make room and run it again" in ran.stderr
    assert not list((tmp_path / "out").glob(".*.part"))
    assert (dataset.status(tmp_path / "out").done, dataset.status(tmp_path / "out").shards) == (
        2,
        6,
    )
    assert dataset.verify(tmp_path / "out").problems == ()
    dataset.encode(source, vae, tmp_path / "out", options=SMALL)
    assert_same(tmp_path / "out", whole)


def test_a_file_in_the_place_of_a_folder(source: Path, vae: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SdconvError, match="cannot be written"):
        dataset.encode(source, vae, tmp_path / "file" / "out", options=SMALL)


def test_a_folder_without_permission_to_write(source: Path, vae: Path) -> None:
    """As another user where root runs the tests, whom nothing stops."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        folder.chmod(0o755)
        shutil.copytree(source, folder / "in")
        shutil.copy(vae, folder / "vae.safetensors")
        dataset.encode(folder / "in", folder / "vae.safetensors", out, options=SMALL)
        before = files_of(out)
        shutil.copy(folder / "in" / "photo00.png", folder / "in" / "new.png")
        out.chmod(0o555)
        (out / ".lock").chmod(0o666)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(SdconvError, match="cannot be written"):
                dataset.encode(folder / "in", folder / "vae.safetensors", out, options=SMALL)
        finally:
            os.seteuid(user)
            out.chmod(0o755)
        assert files_of(out) == before
        assert dataset.verify(out).problems == ()


def test_records_tell_what_made_them(whole: dict[str, bytes]) -> None:
    record = json.loads(whole["latents-000000.json"])
    made_by = record["made_by"]
    assert set(made_by) == {"sdconv", "torch", "device", "threads"}
    assert (made_by["device"], made_by["threads"]) == ("cpu", 1)
    assert [one["key"] for one in record["samples"]][:2] == ["cats/photo01", "cats/photo03"]
