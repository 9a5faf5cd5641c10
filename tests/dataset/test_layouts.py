"""Layouts: what sd-scripts, pyarrow, datasets and zarr read in them."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded
from helpers.photos import files_of, photos, write
from helpers.slow import first_of
from pyarrow import parquet

import sdconv
from sdconv import dataset
from sdconv.dataset import Encoder, Options, Settings
from sdconv.dataset.layouts.kohya import crop_ltrb
from sdconv.errors import InputError, SdconvError

MEAN = Settings(latents="mean", flip=True)


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = dataset.open_latents(folder)
    return {found.keys[n]: dict(found.sample(n).tensors) for n in range(len(found))}


@pytest.mark.parametrize("layout", ["webdataset", "kohya", "parquet"])
def test_every_layout_holds_the_same_and_is_verified(
    layout: str, vae: Path, folder: Path, tmp_path: Path
) -> None:
    for name, form in (("tars", "webdataset"), ("other", layout)):
        options = Options(size="16", shard_size=4, layout=form)
        dataset.encode(folder, vae, tmp_path / name, MEAN, options)
    tars, other = stored(tmp_path / "tars"), stored(tmp_path / "other")
    assert tars.keys() == other.keys()
    for key, tensors in tars.items():
        assert tensors.keys() == other[key].keys()
        assert all(torch.equal(tensors[name], other[key][name]) for name in tensors)
    found = dataset.verify(tmp_path / "other")
    assert (found.samples, found.problems) == (9, ())
    item = dataset.open_latents(tmp_path / "other")[0]
    assert item["original_size"] == (19, 21)


@pytest.mark.parametrize("layout", first_of(["kohya", "parquet"]))
def test_bytes_are_the_same_later(layout: str, vae: Path, folder: Path, tmp_path: Path) -> None:
    options = Options(size="16", shard_size=4, layout=layout)
    dataset.encode(folder, vae, tmp_path / "a", MEAN, options)
    time.sleep(2.1)  # zip files count in steps of two seconds
    dataset.encode(folder, vae, tmp_path / "b", MEAN, options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("layout", ["kohya", "parquet"])
def test_a_changed_image_is_encoded_again(
    layout: str, vae: Path, folder: Path, tmp_path: Path
) -> None:
    options = Options(size="16", shard_size=4, layout=layout)
    dataset.encode(folder, vae, tmp_path / "out", MEAN, options)
    before = stored(tmp_path / "out")
    write(folder / "photo00.png", 70, 18, 20)
    assert dataset.encode(folder, vae, tmp_path / "out", MEAN, options).changed == 1
    after = stored(tmp_path / "out")
    differing = [k for k in before if not torch.equal(before[k]["latents"], after[k]["latents"])]
    assert differing == ["photo00"]
    assert dataset.verify(tmp_path / "out").problems == ()


# --- sd-scripts


def test_sd_scripts_finds_its_names(vae: Path, tmp_path: Path) -> None:
    """The names and axes that ``LatentsCachingStrategy`` loads, next to the images."""
    folder = photos(tmp_path / "photos", 3)
    encoder = Encoder(vae, Settings(latents="sample", flip=True))
    options = Options(size="buckets:64:64:128", layout="kohya")
    dataset.encode(folder, encoder, folder, options=options)
    with np.load(folder / "cats" / "photo01.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    assert set(found) == {"latents", "latents_flipped", "original_size", "crop_ltrb"}
    assert (found["latents"].shape, found["latents"].dtype) == ((4, 16, 16), np.float32)
    assert found["original_size"].tolist() == [21, 19]  # width, height
    assert found["crop_ltrb"].tolist() == list(crop_ltrb((64, 64), (19, 21)))
    # the images themselves are found again, and their neighbours are not taken for images
    assert dataset.encode(folder, encoder, folder, options=options).encoded == 0


def test_the_crop_is_that_of_sd_scripts() -> None:
    """Computed by hand from ``get_crop_ltrb``: (width, height) 512x512 and 600x400."""
    assert crop_ltrb((512, 512), (400, 600)) == (0, 85.0, 512, 85.0 + 512 / 1.5)
    assert crop_ltrb((512, 512), (600, 400)) == (85.0, 0, 85.0 + 512 * (400 / 600), 512)
    assert crop_ltrb((512, 512), (512, 512)) == (0, 0, 512, 512)


@pytest.mark.parametrize(("family", "name"), [("sd3", "sd3"), ("flux1", "flux")])
def test_16_channels_have_names_with_sizes(family: str, name: str, tmp_path: Path) -> None:
    facts = sdconv.config.facts.VAE_FACTS[family]
    config = seeded.kl(
        (32, 32), 16, False, scaling_factor=facts.scaling_factor, shift_factor=facts.shift_factor
    )
    sdconv.save(seeded.network(config), tmp_path / "vae.safetensors")
    write(tmp_path / "in" / "a.png", 1, 20, 24)
    vae, is_scaled = tmp_path / "vae.safetensors", family == "flux1"
    options = Options(size="64", layout="kohya")
    with pytest.raises(InputError, match=f"expected: scaled: {is_scaled}"):
        other = replace(MEAN, scaled=not is_scaled)
        dataset.encode(tmp_path / "in", vae, tmp_path / "refused", other, options)
    given = replace(MEAN, scaled=is_scaled)
    dataset.encode(tmp_path / "in", vae, tmp_path / "out", given, options)
    dataset.encode(tmp_path / "in", vae, tmp_path / "raw", MEAN, Options(size="64"))
    raw = stored(tmp_path / "raw")["a"]["latents"]
    # what the trainer of FLUX.1 reads as it is, and that of SD3 scales itself
    expected = (raw - facts.shift_factor) * facts.scaling_factor if is_scaled else raw
    with np.load(tmp_path / "out" / f"a_0024x0020_{name}.npz") as arrays:
        names = {"latents", "latents_flipped", "original_size", "crop_ltrb"}
        assert set(arrays.files) == {f"{one}_32x32" for one in names}
        assert torch.equal(torch.from_numpy(arrays["latents_32x32"]), expected)
    assert dataset.open_latents(tmp_path / "out")[0]["latents"].shape == (16, 32, 32)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"latents": "moments"}, {}, "latents: moments"),
        ({"scaled": True}, {}, "scaled: True"),
        ({"dtype": "bfloat16"}, {}, "dtype: bfloat16"),
        ({}, {"size": "native"}, "got: --size native"),
    ],
)
def test_what_sd_scripts_does_not_read_is_refused(
    settings: dict[str, object],
    options: dict[str, str],
    words: str,
    vae: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    given = Settings(**{"latents": "mean", **settings})  # type: ignore[arg-type]
    chosen = Options(**{"size": "16", "layout": "kohya", **options})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        dataset.encode(folder, vae, tmp_path / "out", given, chosen)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_two_images_of_one_npz_are_refused(vae: Path, folder: Path, tmp_path: Path) -> None:
    write(folder / "photo00.bmp", 1)
    with pytest.raises(InputError, match=r"photo00\.png: two images would share one \.npz"):
        dataset.encode(folder, vae, tmp_path / "out", MEAN, Options(size="16", layout="kohya"))


# --- parquet


def test_parquet_has_plain_columns(vae: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dataset.encode(folder, vae, out, options=Options(size="16", layout="parquet"))
    table = parquet.read_table(next(out.glob("*.parquet")))
    sizes = ["original_size", "bucket", "crop", "shape"]
    assert table.column_names == ["key", "path", *sizes, "mean", "logvar", "json"]
    row = table.to_pylist()[0]
    assert (row["key"], row["shape"], len(row["mean"])) == ("cats/photo01", [4, 4, 4], 64)
    assert json.loads(row["json"])["key"] == "cats/photo01"


def test_parquet_has_no_bfloat16(vae: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="parquet has no bfloat16"):
        settings, options = Settings(dtype="bfloat16"), Options(size="16", layout="parquet")
        dataset.encode(folder, vae, tmp_path / "out", settings, options)


def test_datasets_reads_parquet_and_tars(vae: Path, folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    for layout in ("parquet", "webdataset"):
        options = Options(size="16", shard_size=4, layout=layout)
        dataset.encode(folder, vae, tmp_path / layout, options=options)
        kind = "tar" if layout == "webdataset" else layout
        files = sorted(str(path) for path in (tmp_path / layout).glob(f"*.{kind}"))
        rows = datasets.load_dataset(
            layout, data_files=files, split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(rows) == 9
        keys = {row["key"] if layout == "parquet" else row["json"]["key"] for row in rows}
        assert keys == set(stored(tmp_path / layout))


def test_an_unknown_layout(vae: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layout: unknown layout"):
        dataset.encode(folder, vae, tmp_path / "out", options=Options(size="16", layout="lmdb"))


SAMPLES = Settings(latents="sample")
NEXT_TO = Options(size="buckets:128:64:256", layout="kohya")


def test_no_latents_stay_next_to_an_image_that_has_none(vae: Path, tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        write(tmp_path / f"{name}.png", number)
    dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    first = (tmp_path / "a.npz").read_bytes()
    assert {one.name for one in tmp_path.glob("*.npz")} == {"a.npz", "b.npz", "c.npz"}
    half = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(half[: len(half) // 2])  # its header is whole
    (tmp_path / "c.png").unlink()
    options = replace(NEXT_TO, prune=True)
    assert dataset.encode(tmp_path, vae, tmp_path, SAMPLES, options).quarantined == {"damaged": 1}
    assert {one.name for one in tmp_path.glob("*.npz")} == {"a.npz"}
    assert (tmp_path / "a.npz").read_bytes() == first
    # an image of another bucket moves to another shard, under the same name
    write(tmp_path / "a.png", 5, 60, 20)
    dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    assert (tmp_path / "a.npz").read_bytes() != first
    assert dataset.verify(tmp_path).problems == ()


def test_the_cache_of_sd_scripts_is_not_overwritten(vae: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.png", 1)
    (tmp_path / "a.npz").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"a\.npz: there is a file that this run would overwrite"):
        dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    assert (tmp_path / "a.npz").read_bytes() == b"mine"
    assert not (tmp_path / "dataset.json").exists()
    dataset.encode(tmp_path, vae, tmp_path, SAMPLES, replace(NEXT_TO, force=True))
    assert dataset.verify(tmp_path).problems == ()


def test_nor_is_what_sd_scripts_writes_for_new_images(vae: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.png", 1)
    dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    write(tmp_path / "d.png", 2)
    (tmp_path / "d.npz").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"d\.npz: there is a file that this run would overwrite"):
        dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    assert (tmp_path / "d.npz").read_bytes() == b"mine"
    (tmp_path / "d.npz").unlink()
    write(tmp_path / "a.png", 3, 18, 20)
    assert dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO).encoded == 2


@pytest.mark.parametrize("lost", ["c.npz", "latents-000000.json"])
def test_no_latents_stay_where_files_or_the_record_are_lost(
    lost: str, vae: Path, tmp_path: Path
) -> None:
    """By hand, or in a run that was killed before the shard's record."""
    for number, name in enumerate("abc"):
        write(tmp_path / f"{name}.png", number)
    dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    (tmp_path / lost).unlink()
    half = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(half[: len(half) // 2])
    summary = dataset.encode(tmp_path, vae, tmp_path, SAMPLES, NEXT_TO)
    assert summary.quarantined == {"damaged": 1}
    assert {one.name for one in tmp_path.glob("*.npz")} == {"a.npz", "c.npz"}


def test_the_images_of_a_list_get_latents_next_to_them(vae: Path, tmp_path: Path) -> None:
    write(tmp_path / "photos" / "a.png", 1)
    source = tmp_path / "photos" / "list.jsonl"
    source.write_text('{"path": "a.png"}\n')
    for encoded in (1, 0):
        summary = dataset.encode(source, vae, tmp_path / "photos", SAMPLES, NEXT_TO)
        assert (summary.encoded, summary.complete) == (encoded, True)
    assert (tmp_path / "photos" / "a.npz").exists()


@pytest.mark.parametrize("layout", ["webdataset", "kohya"])
def test_a_sample_with_a_damaged_header_is_an_error_that_says_so(
    layout: str, vae: Path, tmp_path: Path
) -> None:
    write(tmp_path / "in" / "a.png", 1)
    out = tmp_path / "out"
    dataset.encode(tmp_path / "in", vae, out, SAMPLES, Options(size="16", layout=layout))
    path = out / ("a.npz" if layout == "kohya" else "latents-000000.tar")
    content = bytearray(path.read_bytes())
    if layout == "kohya":
        at = content.index(b"PK\5\6")  # the zip's last record
    else:
        record = json.loads((out / "latents-000000.json").read_text())
        at = record["samples"][0]["place"]["safetensors"][0]
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(SdconvError, match="a: a sample cannot be read"):
        dataset.open_latents(out)[0]


@pytest.mark.parametrize(
    ("layout", "package"), [("webdataset", "webdataset"), ("parquet", "pyarrow"), ("zarr", "zarr")]
)
def test_a_missing_package_is_said_before_anything_is_read(
    layout: str, package: str, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = Options(size="16", layout=layout)
    with pytest.raises(SdconvError, match=r"pip install 'sdconv\[(dataset|maps)\]'"):
        dataset.encode(tmp_path / "no such folder", vae, tmp_path / "out", MEAN, options)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(SdconvError, match="no such folder"):  # the control
        dataset.encode(tmp_path / "no such folder", vae, tmp_path / "out", MEAN, options)
