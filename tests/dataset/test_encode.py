"""Latents of data sets: equal to those of single images, and what is said about them."""

from __future__ import annotations

import gc
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from helpers import seeded
from helpers.datasets import SMALL, latents_of, one_by_one
from helpers.photos import BAD, files_of, pixels, spoil, write
from PIL import Image
from safetensors.torch import load as load_tensors
from torch import Tensor

import sdconv
from sdconv import dataset
from sdconv.dataset import Encoder, Options, Settings
from sdconv.dataset.headers import Rejected
from sdconv.errors import InputError, SdconvError
from sdconv.images import read_image, to_tensor
from sdconv.latents import scale


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


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (pixels(1, 16, 16) / 255, "not bytes"),
        (pixels(1, 16, 16).astype(int) - 1, "not bytes"),
        (np.full((16, 16, 3), np.nan), "not bytes"),
        (np.ma.masked_less(pixels(1, 16, 16), 9), "lose its mask"),
    ],
)
def test_the_encoder_as_a_function_takes_bytes(vae: Path, image: Any, words: str) -> None:
    encoder = Encoder(vae, Settings(latents="mean"))
    with pytest.raises(InputError, match=rf"a\.png(.|\n)*{words}|a\.png: .*{words}"):
        encoder({"key": ["a.png"], "image": [image]})
    whole = encoder({"key": ["a.png"], "image": [pixels(1, 16, 16).tolist()]})  # the control
    assert list(whole["error"]) == [""]
