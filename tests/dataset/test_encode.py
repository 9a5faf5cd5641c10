"""Latents of data sets: equal to those of single images, and what is said about them."""

from __future__ import annotations

import gc
import json
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from helpers import seeded
from helpers.photos import BAD, files_of, pixels, spoil, write
from PIL import Image
from safetensors.torch import load as load_tensors
from torch import Tensor

import sdconv
from sdconv import dataset
from sdconv.dataset import Encoder, Options, Settings
from sdconv.dataset.headers import Rejected
from sdconv.dataset.store import Store
from sdconv.errors import InputError, SdconvError, SdconvWarning
from sdconv.images import read_image, to_tensor
from sdconv.latents import scale

SMALL = Options(size="16", shard_size=4)


def latents_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of each key."""
    found = dataset.open_latents(folder)
    return {found.keys[n]: dict(found.sample(n).tensors) for n in range(len(found))}


def one_by_one(vae: Path, folder: Path, path: str, mirrored: bool = False) -> Any:
    """The posterior of an image of 16 rows, by diffusers' own calls."""
    network = sdconv.load(vae)
    image = read_image(folder / path).image
    rows, columns = image.height, image.width
    factor = max(16 / rows, 16 / columns)
    size = (max(16, int(columns * factor + 0.5)), max(16, int(rows * factor + 0.5)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    x = to_tensor(image.crop((left, top, left + 16, top + 16)))
    with torch.inference_mode():
        return network.encode(x.flip(3) if mirrored else x).latent_dist


def test_moments_equal_those_of_each_image_alone(vae: Path, folder: Path, tmp_path: Path) -> None:
    summary = dataset.encode(folder, vae, tmp_path / "out", Settings(flip=True), SMALL)
    assert (summary.images, summary.encoded, summary.shards, summary.done) == (9, 9, 3, 3)
    found = latents_of(tmp_path / "out")
    assert len(found) == 9
    for path in ("photo00.png", "cats/photo01.jpg", "photo08.jpg"):
        tensors = found[path.rpartition(".")[0]]
        for end, mirrored in (("", False), ("_flipped", True)):
            posterior = one_by_one(vae, folder, path, mirrored)
            assert torch.equal(tensors["mean" + end], posterior.mean[0])
            assert torch.equal(tensors["logvar" + end], posterior.logvar[0])
        assert not torch.equal(tensors["mean"], tensors["mean_flipped"].flip(2)), "the control"


@pytest.mark.parametrize("latents", ["mean", "sample"])
@pytest.mark.parametrize("scaled", [False, True])
def test_mean_and_sample(
    latents: str, scaled: bool, vae: Path, folder: Path, tmp_path: Path
) -> None:
    settings = Settings(latents=latents, scaled=scaled, seed=7)
    dataset.encode(folder, vae, tmp_path / "out", settings, SMALL)
    found = latents_of(tmp_path / "out")["cats/photo01"]["latents"]
    posterior = one_by_one(vae, folder, "cats/photo01.jpg")
    expected = posterior.mean
    if latents == "sample":
        generator = sdconv.dataset.encoder.generator_for(7, "cats/photo01")
        expected = posterior.sample(generator)
        assert not torch.equal(expected, posterior.mean)
    if scaled:
        expected = scale(sdconv.load(vae), expected)
    assert torch.equal(found, expected[0])


def test_noise_follows_from_seed_and_key() -> None:
    from sdconv.dataset.encoder import generator_for

    def drawn(seed: int, key: str) -> Tensor:
        return torch.randn(4, generator=generator_for(seed, key))

    assert torch.equal(drawn(1, "a"), drawn(1, "a"))
    assert not torch.equal(drawn(1, "a"), drawn(2, "a"))
    assert not torch.equal(drawn(1, "a"), drawn(1, "b"))


@pytest.mark.parametrize("kind", ["sd1", "flux2"])
def test_scaled_moments_are_the_moments_of_scaled_latents(kind: str, tmp_path: Path) -> None:
    configs = {"sd1": seeded.kl((32, 32), 4, True, scaling_factor=0.2), "flux2": seeded.SMALL_FLUX2}
    network = seeded.network(configs[kind])
    sdconv.save(network, tmp_path / "vae.safetensors")
    write(tmp_path / "images" / "a.png", 1)
    for name, scaled in (("raw", False), ("scaled", True)):
        settings, options = Settings(scaled=scaled), Options(size="32")
        dataset.encode(
            tmp_path / "images", tmp_path / "vae.safetensors", tmp_path / name, settings, options
        )
    raw, made = (latents_of(tmp_path / name)["a"] for name in ("raw", "scaled"))
    assert torch.equal(made["mean"], scale(network, raw["mean"][None])[0])
    # a step of one standard deviation from the mean, scaled
    step = scale(network, (raw["mean"] + torch.exp(raw["logvar"] / 2))[None])[0] - made["mean"]
    assert torch.allclose(torch.exp(made["logvar"] / 2), step.abs(), rtol=1e-4, atol=1e-5)


def test_dtypes_are_rounded_from_float32(vae: Path, folder: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        settings = Settings(latents="mean", dtype=dtype)
        dataset.encode(folder, vae, tmp_path / dtype, settings, SMALL)
    wide, narrow = (latents_of(tmp_path / one) for one in ("float32", "bfloat16"))
    for key, tensors in narrow.items():
        assert torch.equal(tensors["latents"], wide[key]["latents"].bfloat16())


def test_webdataset_reads_the_shards(vae: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(folder / "photo.v2%.png", 3)
    dataset.encode(folder, vae, out, options=SMALL)
    tars = sorted(str(path) for path in out.glob("*.tar"))
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves closing to the collector
        for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
            about = json.loads(sample["json"])
            found[about["key"]] = load_tensors(sample["safetensors"])["mean"]
        gc.collect()
    assert set(found) == set(latents_of(out))
    assert "photo.v2%" in found
    for key, tensors in latents_of(out).items():
        assert torch.equal(found[key], tensors["mean"])


def test_a_sample_says_what_it_is(vae: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    rgba = np.concatenate([pixels(1), np.full((20, 24, 1), 128, np.uint8)], 2)
    Image.fromarray(rgba).save(tmp_path / "in" / "alpha.png")
    Image.fromarray(pixels(2)).convert("CMYK").save(tmp_path / "in" / "cmyk.jpg")
    Image.fromarray(pixels(3)).quantize(16).save(tmp_path / "in" / "palette.png")
    deep = pixels(4)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "in" / "sixteen.png")
    Image.fromarray(pixels(5)).save(tmp_path / "in" / "turned.jpg", exif=exif)
    dataset.encode(tmp_path / "in", vae, tmp_path / "out", options=SMALL)
    found = dataset.open_latents(tmp_path / "out")
    about = {found.keys[n]: found.sample(n).about for n in range(len(found))}
    with Image.open(tmp_path / "in" / "sixteen.png") as image:
        sixteen = image.mode  # "I" before Pillow 11
    assert {key: (one["mode"], one["notes"]) for key, one in about.items()} == {
        "alpha": ("RGBA", ["transparency was blended with white"]),
        "cmyk": ("CMYK", ["CMYK was converted to RGB"]),
        "palette": ("P", ["P was converted to RGB"]),
        "sixteen": (sixteen, [f"{sixteen} was scaled to 8 bits"]),
        "turned": ("RGB", []),
    }
    turned = about["turned"]
    assert turned["orientation"] == 6
    assert turned["original_size"] == [24, 20]
    assert (turned["resized"], turned["crop"], turned["bucket"]) == ([19, 16], [1, 0], [16, 16])
    assert (turned["latents"], turned["scaled"], turned["shape"]) == ("moments", False, [4, 4, 4])
    # the same pixels as `sdconv encode` reads
    pixels_read = to_tensor(read_image(tmp_path / "in" / "sixteen.png").image)
    assert pixels_read.shape == (1, 3, 20, 24)


def test_large_jpegs_are_decoded_at_a_fraction_and_nearly_the_same(
    vae: Path, tmp_path: Path
) -> None:
    from sdconv.dataset.decoding import Decoded, decode
    from sdconv.images import psnr

    write(tmp_path / "in" / "a.jpg", 1, 400, 420)
    ((planned,),) = dataset.plan(tmp_path / "in", "64").shards
    drafted, whole = (decode(tmp_path / "in", planned, draft) for draft in (True, False))
    assert isinstance(drafted, Decoded)
    assert isinstance(whole, Decoded)
    assert drafted.notes == ("decoded at 210x200 instead of 420x400",)
    assert whole.notes == ()
    a, b = (to_tensor(Image.fromarray(one.pixels)) for one in (drafted, whole))
    assert 45 < psnr(a, b) < 90
    # twice the size is not enough for it
    ((small,),) = dataset.plan(tmp_path / "in", "128").shards
    decoded = decode(tmp_path / "in", small, True)
    assert isinstance(decoded, Decoded)
    assert decoded.notes == ()


def test_exactly_the_planted_images_are_in_quarantine(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    spoil(folder)
    summary = dataset.encode(folder, vae, tmp_path / "out", options=SMALL)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert {one["path"]: one["reason"] for one in map(json.loads, lines)} == BAD
    assert summary.quarantined == {reason: 1 for reason in sorted(BAD.values())}
    assert len(latents_of(tmp_path / "out")) == 9
    with pytest.raises(SdconvError, match=r"cannot be encoded: (damaged|empty|not an|animated)"):
        dataset.encode(
            folder, vae, tmp_path / "strict", options=Options(size="16", on_error="fail")
        )


def test_latents_that_are_not_finite_are_in_quarantine(tmp_path: Path) -> None:
    network = seeded.network(seeded.SMALL_KL)
    weight = network.encoder.conv_out.weight.detach().clone()
    network.encoder.conv_out.weight.data = weight.fill_(float("nan"))
    sdconv.save(network, tmp_path / "vae.safetensors")
    write(tmp_path / "in" / "a.png", 1)
    summary = dataset.encode(
        tmp_path / "in", tmp_path / "vae.safetensors", tmp_path / "out", options=SMALL
    )
    assert summary.quarantined == {"not finite": 1}
    assert not list((tmp_path / "out").glob("*.tar"))
    assert dataset.verify(tmp_path / "out").problems == ()


# --- what is refused


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"size": "24"}, 'preprocessing.size: "24"'),
        ({"latents": "mean"}, 'latents.latents: "mean"'),
        ({"flip": True}, "latents.flip: true"),
        ({"layout": "parquet"}, 'layout: "parquet"'),
        ({"model": True}, "model.sha256: "),
    ],
)
def test_another_way_is_refused_with_the_line_that_differs(
    change: dict[str, Any], line: str, vae: Path, folder: Path, tmp_path: Path
) -> None:
    dataset.encode(folder, vae, tmp_path / "out", options=SMALL)
    before = files_of(tmp_path / "out")
    if change.pop("model", False):
        other = seeded.network(sdconv.load(vae).config, seed=1)
        vae = tmp_path / "other.safetensors"
        sdconv.save(other, vae)
    settings = Settings(**{n: v for n, v in change.items() if n in ("latents", "flip")})
    options = {n: v for n, v in change.items() if n in ("size", "layout")}
    with pytest.raises(InputError) as raised:
        dataset.encode(folder, vae, tmp_path / "out", settings, Options(**{"size": "16"} | options))
    (got,) = [one for one in str(raised.value).splitlines() if "got: " in one]
    assert got.startswith(f"  got: {line}")
    assert ";" not in got, "only the line that differs"
    assert files_of(tmp_path / "out") == before


def test_force_starts_anew(vae: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dataset.encode(folder, vae, out, options=SMALL)
    (out / "notes.txt").write_text("mine")
    dataset.encode(
        folder, vae, out, Settings(latents="mean"), Options(size="24", layout="parquet", force=True)
    )
    assert not list(out.glob("*.tar"))
    assert dataset.status(out).about["preprocessing"]["size"] == "24"
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_of_others_is_refused(vae: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="the folder is not empty"):
        dataset.encode(folder, vae, tmp_path, options=SMALL)


def test_a_tiny_autoencoder_has_a_mean_only(folder: Path, tmp_path: Path) -> None:
    sdconv.save(seeded.network(seeded.SMALL_TINY), tmp_path / "tiny.safetensors")
    with pytest.raises(InputError, match="a tiny autoencoder has no posterior"):
        dataset.encode(folder, tmp_path / "tiny.safetensors", tmp_path / "out", options=SMALL)
    settings = Settings(latents="mean")
    dataset.encode(folder, tmp_path / "tiny.safetensors", tmp_path / "out", settings, SMALL)
    assert dataset.status(tmp_path / "out").about["latents"]["scaled"] is True


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Settings(latents="median"), "latents: unknown latents"),
        (lambda: Settings(dtype="int8"), "dtype: unknown dtype"),
        (lambda: Settings(batch=0), "batch: not a batch"),
        (lambda: Options(engine="slurm"), "engine: unknown engine"),
        (lambda: Options(on_error="ignore"), "on_error: unknown on_error"),
        (lambda: Options(workers=0), "workers: not a number of processes"),
    ],
)
def test_options_that_do_not_exist(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


# --- what changes later


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


# --- the encoder as a function of a batch


def test_the_encoder_can_be_pickled_and_called(vae: Path) -> None:
    encoder = Encoder(vae, Settings(latents="mean"))
    assert encoder.multiple == 4
    images = [pixels(1, 16, 16), pixels(2, 16, 24), pixels(3, 1, 1)]
    batch = {"key": np.array(["a", "b", "c"]), "image": images, "label": np.arange(3)}
    out = pickle.loads(pickle.dumps(encoder))(batch)
    assert set(out) == {"key", "label", "latents", "error"}
    assert [one.shape for one in out["latents"][:2]] == [(4, 4, 4), (4, 4, 6)]
    assert list(out["error"][:2]) == ["", ""]
    assert out["latents"][2] is None
    assert out["error"][2]
    x = to_tensor(Image.fromarray(images[1]))
    with torch.inference_mode():
        expected = sdconv.load(vae).encode(x).latent_dist.mean[0]
    assert np.array_equal(out["latents"][1], expected.numpy())


def test_stopping_at_the_first_error_takes_headers_for_errors_too(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "empty.png").write_bytes(b"")
    strict = Options(size="16", shard_size=4, on_error="fail")
    with pytest.raises(SdconvError, match=r"empty\.png: an image cannot be encoded: empty"):
        dataset.encode(folder, vae, tmp_path / "out", options=strict)
    (folder / "empty.png").unlink()
    assert dataset.encode(folder, vae, tmp_path / "other", options=strict).complete


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


def test_files_of_others_in_the_source_are_not_overwritten(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "latents-000000.tar").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"not empty(.|\n)*latents-000000\.tar"):
        dataset.encode(folder, vae, folder, options=SMALL)
    (folder / "latents-000000.tar").rename(folder / "mine.tar")
    assert dataset.encode(folder, vae, folder, options=SMALL).complete
    assert (folder / "mine.tar").read_bytes() == b"mine"


def test_keys_that_no_tar_or_column_likes(vae: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number, name in enumerate(
        ["a.png", "a.v2.png", "b\nc.png", f"{'x' * 240}.png", "日本.png"]
    ):
        write(source / name, number)
    (source / os.fsdecode(b"d\xff.png")).write_bytes((source / "a.png").read_bytes())
    keys = {"a", "a.v2", "b\nc", "x" * 240, "日本", "d\\xff"}
    for layout in ("webdataset", "parquet"):
        options = Options(size="16", layout=layout)
        dataset.encode(source, vae, tmp_path / layout, Settings(latents="sample"), options)
        assert set(latents_of(tmp_path / layout)) == keys
        assert dataset.verify(tmp_path / layout).problems == ()
    tars = [str(path) for path in (tmp_path / "webdataset").glob("*.tar")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves closing to the collector
        read = {one["__key__"] for one in webdataset.WebDataset(tars, shardshuffle=False)}
        gc.collect()
    assert read == keys - {"a.v2", "b\nc"} | {"a%2Ev2", "b%0Ac"}


def test_several_ranks_do_not_start_anew(vae: Path, folder: Path, tmp_path: Path) -> None:
    dataset.encode(folder, vae, tmp_path / "out", options=SMALL)
    before = files_of(tmp_path / "out")
    with pytest.raises(InputError, match="several ranks cannot start anew"):
        dataset.encode(
            folder, vae, tmp_path / "out", options=Options(size="16", force=True, rank=(1, 2))
        )
    assert files_of(tmp_path / "out") == before


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


# --- mirror images


class LostMirror(Encoder):
    """Finds that the mirror image of one image has no finite latents."""

    seen = 0

    def encode(self, pixels: np.ndarray, keys: Any) -> list[dict[str, Tensor] | Rejected]:
        self.seen += keys[0] == "photo00"
        if keys[0] == "photo00" and self.seen == 2:
            return [Rejected("not finite", "put in by hand")]
        return super().encode(pixels, keys)


def test_an_image_without_its_mirror_image_is_left_out(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    encoder = LostMirror(vae, Settings(flip=True))
    summary = dataset.encode(folder, encoder, tmp_path / "out", options=SMALL)
    assert summary.quarantined == {"not finite": 1}
    found = dataset.open_latents(tmp_path / "out", flip=1.0)
    assert len([found[n]["latents"] for n in range(len(found))]) == 8


def test_the_encoder_as_a_function_has_mirror_images(vae: Path) -> None:
    image = pixels(2, 16, 24)
    flipping, plain = (Encoder(vae, Settings(latents="mean", flip=flip)) for flip in (True, False))
    out = flipping({"key": ["a"], "image": [image]})
    mirrored = plain({"key": ["a"], "image": [np.ascontiguousarray(image[:, ::-1])]})
    assert set(out) == {"key", "latents", "latents_flipped", "error"}
    assert np.array_equal(out["latents_flipped"][0], mirrored["latents"][0])
