"""Data sets that change: images that are new, edited or gone, and runs that meet or were killed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.datasets import SMALL, latents_of, one_by_one
from helpers.photos import files_of, write

import sdconv
from sdconv import dataset
from sdconv.dataset import Encoder, Options
from sdconv.dataset.store import Store
from sdconv.errors import SdconvError, SdconvWarning


def test_new_and_changed_images(vae: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dataset.encode(folder, vae, out, options=SMALL)
    before = files_of(out)
    write(folder / "new.png", 40)
    write(folder / "photo00.png", 41, 18, 20)
    summary = dataset.encode(folder, vae, out, options=SMALL)
    # the images of the changed shard are looked at, but only one of them is encoded again
    assert (summary.new, summary.changed, summary.made) == (1, 1, 2)
    after = files_of(out)
    (changed,) = [name for name in before if name.endswith(".tar") and after[name] != before[name]]
    assert [name for name in after if name not in before] == [
        "latents-000003.json",
        "latents-000003.tar",
    ]
    found = latents_of(out)
    assert len(found) == 10
    assert torch.equal(found["photo00"]["mean"], one_by_one(vae, folder, "photo00.png").mean[0])
    # the shard is the one that a fresh run would have made, apart from the count of changes
    (folder / "new.png").unlink()
    dataset.encode(folder, vae, tmp_path / "fresh", options=SMALL)
    assert (tmp_path / "fresh" / changed).read_bytes() == after[changed]


def test_pruned_images(vae: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dataset.encode(folder, vae, out, options=SMALL)
    for name in ("photo08.jpg", "photo00.png"):
        (folder / name).unlink()
    summary = dataset.encode(folder, vae, out, options=SMALL)
    assert (summary.missing, summary.made, summary.complete) == (("photo00", "photo08"), 0, True)
    dataset.encode(folder, vae, out, options=Options(size="16", shard_size=4, prune=True))
    assert len(latents_of(out)) == 7
    assert dataset.status(out).complete
    assert not (out / "latents-000002.tar").exists()
    assert dataset.verify(out).problems == ()


# --- runs that meet, or that were killed while images changed


def stop(what: str, done: int, total: int) -> None:
    """Ends a run once it is planned."""
    if what == "encoding":
        raise KeyboardInterrupt


def test_a_killed_rehash_goes_on_as_one_that_was_not(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    write(folder / "x.bmp", 50)
    for name in ("whole", "killed"):
        dataset.encode(folder, vae, tmp_path / name, options=SMALL)
    write(folder / "x.bmp", 51)  # of the same length and date
    rehash = replace(SMALL, rehash=True)
    assert dataset.encode(folder, vae, tmp_path / "whole", options=rehash).changed == 1
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            dataset.encode(folder, vae, tmp_path / "killed", options=rehash, progress=stop)
    dataset.encode(folder, vae, tmp_path / "killed", options=rehash)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_killed_retry_goes_on_as_one_that_was_not(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    late = folder / "photo00.png"
    content = late.read_bytes()

    def delete(what: str, done: int, total: int) -> None:
        if (what, done) == ("planning", total):
            late.unlink()

    for name in ("whole", "killed"):
        summary = dataset.encode(folder, vae, tmp_path / name, options=SMALL, progress=delete)
        assert summary.quarantined == {"missing": 1}
        late.write_bytes(content)
        os.utime(late, (1e9, 1e9))
    assert dataset.encode(folder, vae, tmp_path / "whole", options=SMALL).quarantined == {}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            dataset.encode(folder, vae, tmp_path / "killed", options=SMALL, progress=stop)
    dataset.encode(folder, vae, tmp_path / "killed", options=SMALL)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_ranks_that_plan_a_change_agree(vae: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(folder / "x.bmp", 50)
    dataset.encode(folder, vae, out, options=SMALL)
    write(folder / "x.bmp", 51)
    rehash = replace(SMALL, rehash=True)
    others: list[int] = []

    def other(what: str, done: int, total: int) -> None:
        """Another rank plans before the shard is made again."""
        if what == "encoding" and not others:
            others.append(1)
            dataset.encode(folder, vae, out, options=replace(rehash, rank=(1, 2)))

    summary = dataset.encode(folder, vae, out, options=replace(rehash, rank=(0, 2)), progress=other)
    assert others
    assert summary.complete
    assert torch.equal(latents_of(out)["x"]["mean"], one_by_one(vae, folder, "x.bmp").mean[0])


def test_an_image_that_is_restored_after_a_kill(vae: Path, folder: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", folder / "photo00.png"
    dataset.encode(folder, vae, out, options=SMALL)
    before, content = latents_of(out), path.read_bytes()
    write(path, 60, 40, 50)
    with pytest.raises(KeyboardInterrupt):
        dataset.encode(folder, vae, out, options=SMALL, progress=stop)
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    summary = dataset.encode(folder, vae, out, options=SMALL)
    assert (summary.quarantined, summary.complete) == ({}, True)
    assert torch.equal(latents_of(out)["photo00"]["mean"], before["photo00"]["mean"])


def test_a_long_run_keeps_the_quarantine_of_a_later_one(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def later(what: str, done: int, total: int) -> None:
        if what == "encoding" and not (folder / "empty.png").exists():
            (folder / "empty.png").write_bytes(b"")
            dataset.encode(folder, vae, out, options=SMALL)

    assert dataset.encode(folder, vae, out, options=SMALL, progress=later).quarantined == {
        "empty": 1
    }
    assert "empty.png" in (out / "quarantine.jsonl").read_text()


def test_files_of_one_run_do_not_count_with_the_record_of_another(
    vae: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has read an image before it was edited is killed while it commits, after one that
    has read it since: its record is the write that does not happen."""
    out, edited = tmp_path / "out", folder / "cats" / "photo01.jpg"
    killed = False
    write_json = Store.write_json

    def then_killed(store: Store, name: str, content: Any) -> None:
        if killed:
            raise KeyboardInterrupt
        write_json(store, name, content)

    def edit(what: str, done: int, total: int) -> None:
        nonlocal killed
        if (what, done) == ("encoding", 4) and not killed:
            write(edited, 61, 19, 21)
            os.utime(edited, (2e9, 2e9))
            dataset.encode(folder, vae, out, options=SMALL)
            killed = True

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", then_killed)
        with pytest.raises(KeyboardInterrupt):
            dataset.encode(folder, vae, out, options=SMALL, progress=edit)
    assert killed
    assert dataset.encode(folder, vae, out, options=SMALL).complete
    mean = one_by_one(vae, folder, "cats/photo01.jpg").mean[0]
    assert torch.equal(latents_of(out)["cats/photo01"]["mean"], mean)


def test_force_removes_what_no_plan_or_record_lists(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dataset.encode(folder, vae, out, options=SMALL)
    (out / "plan.jsonl").write_text("{}\n")
    (out / "latents-000002.json").unlink()  # killed before its record
    (out / "latents-000002.txt").write_text("mine")
    with pytest.raises(SdconvError, match="the plan cannot be read"):
        dataset.encode(folder, vae, out, options=SMALL)
    forced = Options(size="16", shard_size=9, force=True)
    assert dataset.encode(folder, vae, out, options=forced).complete
    assert [path.name for path in out.glob("*.tar")] == ["latents-000000.tar"]
    assert (out / "latents-000002.txt").read_text() == "mine"


def test_shards_of_another_model_do_not_count(vae: Path, folder: Path, tmp_path: Path) -> None:
    """As a run leaves them that still writes while another one starts anew."""
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    sdconv.save(seeded.network(sdconv.load(vae).config, seed=1), other)
    dataset.encode(folder, vae, out, options=SMALL)
    late = {name: data for name, data in files_of(out).items() if "000001" in name}
    forced = Options(size="16", shard_size=4, force=True)
    dataset.encode(folder, other, out, options=forced)
    whole = files_of(out)
    for name, data in late.items():
        assert whole[name] != data, "the control"
        (out / name).write_bytes(data)
    assert dataset.status(out).done == 2
    assert len(dataset.open_latents(out)) == 5
    assert dataset.encode(folder, other, out, options=SMALL).made == 1
    assert files_of(out) == whole


def test_a_run_ends_when_another_one_starts_anew(vae: Path, folder: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    sdconv.save(seeded.network(sdconv.load(vae).config, seed=1), other)
    forced = Options(size="16", shard_size=4, force=True)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "encoding" and done == 1 and not dataset.status(out).done:
            dataset.encode(folder, other, out, options=forced)

    with pytest.raises(SdconvError, match="another process has started this data set anew"):
        dataset.encode(folder, vae, out, options=SMALL, progress=interrupt)
    dataset.encode(folder, other, tmp_path / "whole", options=SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_stopping_at_errors_takes_those_of_earlier_runs_too(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    path = write(folder / "cut.jpg", 99, 64, 64)
    path.write_bytes(path.read_bytes()[:-300])
    assert dataset.encode(folder, vae, tmp_path / "out", options=SMALL).quarantined == {
        "damaged": 1
    }
    with pytest.raises(SdconvError, match=r"cut\.jpg: an image cannot be encoded: damaged"):
        dataset.encode(folder, vae, tmp_path / "out", options=replace(SMALL, on_error="fail"))


def test_shards_of_other_threads_are_a_warning(vae: Path, folder: Path, tmp_path: Path) -> None:
    first, rest = (replace(SMALL, rank=(rank, 2)) for rank in (0, 1))
    dataset.encode(folder, Encoder(vae, threads=1), tmp_path / "out", options=first)
    with pytest.warns(SdconvWarning, match=r"threads 1, and more are made with .*threads 2"):
        dataset.encode(folder, Encoder(vae, threads=2), tmp_path / "out", options=rest)
