"""The torch data set: items, buckets, processes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers.photos import write
from torch.utils.data import DataLoader

from sdconv import dataset
from sdconv.dataset import Options, Settings
from sdconv.errors import InputError, SdconvError


@pytest.fixture(scope="module")
def out(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three buckets."""
    folder = tmp_path_factory.mktemp("reading")
    for number in range(9):
        write(folder / "in" / f"{number}.png", number, *[(20, 20), (20, 30), (30, 20)][number % 3])
    options = Options(size="buckets:128", shard_size=2)
    dataset.encode(folder / "in", vae, folder / "out", Settings(flip=True), options)
    return folder / "out"


def test_batches_are_of_one_bucket_and_hold_everything_once(out: Path) -> None:
    found = dataset.open_latents(out)
    loader = DataLoader(found, batch_sampler=found.batches(2, seed=3))
    keys: list[str] = []
    for batch in loader:
        keys += batch["key"]
        assert batch["latents"].ndim == 4
    assert sorted(keys) == sorted(found.keys)
    assert len(loader) == 6
    assert len(list(found.batches(2, drop_last=True))) == 3


def test_epochs_are_mixed_anew_and_repeatable(out: Path) -> None:
    found = dataset.open_latents(out)
    sampler = found.batches(2, seed=3)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert list(found.batches(2, seed=3)) == first
    assert list(found.batches(3, shuffle=False)) == list(found.batches(3, shuffle=False))


def test_processes_read_it(out: Path) -> None:
    found = dataset.open_latents(out)
    again = pickle.loads(pickle.dumps(found))
    loader = DataLoader(again, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for index, item in enumerate(loader):
        assert item["key"] == found.keys[index]
        assert torch.equal(item["mean"], found[index]["mean"])


def test_means_samples_and_mirror_images(out: Path) -> None:
    mean, sample = dataset.open_latents(out), dataset.open_latents(out, draw="sample")
    assert torch.equal(mean[0]["latents"], mean[0]["mean"])
    torch.manual_seed(1)
    drawn = sample[0]["latents"]
    torch.manual_seed(1)
    item = mean[0]
    expected = item["mean"] + torch.exp(item["logvar"] / 2) * torch.randn(item["mean"].shape)
    assert torch.equal(drawn, expected)
    mirrored = dataset.open_latents(out, flip=1.0)[0]
    assert torch.equal(mirrored["mean"], mean.sample(0).tensors["mean_flipped"])


def test_errors(out: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a data set of sdconv"):
        dataset.open_latents(tmp_path)
    with pytest.raises(InputError, match="draw: unknown draw"):
        dataset.open_latents(out, draw="mode")
    with pytest.raises(InputError, match="batch_size: not a batch"):
        dataset.open_latents(out).batches(0)
    write(tmp_path / "in" / "a.png", 1)
    dataset.encode(tmp_path / "in", vae, tmp_path / "out", options=Options(size="16"))
    with pytest.raises(InputError, match="this data set has no mirror images"):
        dataset.open_latents(tmp_path / "out", flip=0.5)
    found = dataset.open_latents(tmp_path / "out")
    (tmp_path / "out" / "latents-000000.tar").write_bytes(b"")
    with pytest.raises(SdconvError, match=r"a: a sample cannot be read"):
        found[0]


def test_latents_of_an_edited_image_are_not_read(vae: Path, folder: Path, tmp_path: Path) -> None:
    """Between the plan that notices the edit and the run that encodes the image again."""
    options = Options(size="16", shard_size=4)
    dataset.encode(folder, vae, tmp_path / "out", options=options)
    assert "photo02" in dataset.open_latents(tmp_path / "out").keys
    write(folder / "photo02.jpg", 77)
    os.utime(folder / "photo02.jpg", (2e9, 2e9))

    def stop(what: str, done: int, total: int) -> None:
        if what == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.encode(folder, vae, tmp_path / "out", options=options, progress=stop)
    found = dataset.open_latents(tmp_path / "out")
    assert "photo02" not in found.keys
    assert len(found) == 8
    dataset.encode(folder, vae, tmp_path / "out", options=options)
    assert len(dataset.open_latents(tmp_path / "out")) == 9
