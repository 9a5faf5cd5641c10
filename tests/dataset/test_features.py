"""Features of data sets: equal to those that capture reads, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from helpers import seeded
from helpers.paths import TINY_VAE, WEIGHTS
from helpers.photos import files_of, photos, pixels, write
from PIL import Image

import sdconv
from sdconv import dataset
from sdconv.dataset import FeatureExtractor, FeatureSettings, Options
from sdconv.dataset.encoder import generator_for, threads
from sdconv.dataset.patches import top_patches
from sdconv.dataset.principal import PrincipalAxes
from sdconv.errors import InputError, SdconvError
from sdconv.features.conditions import conditions
from sdconv.features.reduction import pool
from sdconv.images import to_tensor
from sdconv.integrations.schedule import Schedule
from sdconv.latents import encode, scale

SMALL = Options(size="16", shard_size=4)
POINTS = ("encoder.down_blocks.0.resnets.0", "encoder.mid_block")


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = dataset.Samples(folder)
    return {found.keys[n]: dict(found.sample(n).tensors) for n in range(len(found))}


def test_features_equal_those_that_capture_reads(vae: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png", 1, 16, 16)
    points = (*POINTS, "decoder.conv_in")
    for reduce in (None, "mean", "pool:2"):
        settings = FeatureSettings(points=points, reduce=reduce, dtype="float32")
        out = tmp_path / str(reduce)
        dataset.features(tmp_path / "in", FeatureExtractor(vae, settings), out, SMALL)
        network = sdconv.load(vae)
        x = to_tensor(Image.fromarray(pixels(1, 16, 16)))
        captured = sdconv.capture(network, points, reduce=reduce)
        with torch.inference_mode(), threads(1), captured as maps:
            network.decode(network.encode(x).latent_dist.mode())
        found = stored(out)["a"]
        assert set(found) == set(points) == set(maps)
        for name in points:
            assert torch.equal(found[name], maps[name][0])  # type: ignore[index]
        assert dataset.verify(out).problems == ()


def test_features_of_a_unet(tmp_path: Path) -> None:
    photos(tmp_path / "in", 2)
    settings = FeatureSettings(
        points=("mid_block",), timesteps=(1, 500), reduce="pool:2", seed=3, dtype="float32"
    )
    extractor = FeatureExtractor(WEIGHTS / "tiny-unet.safetensors", settings, vae=TINY_VAE)
    options = Options(size="64")
    dataset.features(tmp_path / "in", extractor, tmp_path / "out", options)
    found = stored(tmp_path / "out")
    assert set(found["photo00"]) == {"mid_block@1", "mid_block@500"}
    # by hand
    unet, network = sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32), None
    network = sdconv.load(TINY_VAE, dtype=torch.float32)
    ((planned, _),) = dataset.plan(tmp_path / "in", "64").shards
    from sdconv.dataset.decoding import Decoded, decode

    image = decode(tmp_path / "in", planned, True)
    assert isinstance(image, Decoded)
    with torch.inference_mode(), threads(1):
        z = scale(network, encode(network, to_tensor(Image.fromarray(image.pixels))))
        noise = torch.randn(z.shape, generator=generator_for(3, planned.key))
        arguments, _ = conditions(unet, (8, 8), 3)
        noisy = Schedule(1).add_noise(z, noise, 500)
        with sdconv.capture(unet, "mid_block") as maps:
            unet(noisy, 500, *arguments[2:])
    expected = pool(2)(maps["mid_block"])[0]  # type: ignore[arg-type]
    assert torch.equal(found[planned.key]["mid_block@500"], expected)
    assert not torch.equal(found[planned.key]["mid_block@1"], expected), "the control"


def test_pca_has_the_same_axes_for_all_images(vae: Path, folder: Path, tmp_path: Path) -> None:
    point = POINTS[0]
    for name, rank in (("a", (0, 1)), ("b", (1, 2)), ("b", (0, 2))):
        settings = FeatureSettings(points=(point,), reduce="pca:2", dtype="float32")
        options = Options(size="16", shard_size=4, rank=rank)
        dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / name, options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    settings = FeatureSettings(points=(point,), reduce=None, dtype="float32")
    dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / "whole", SMALL)
    whole, reduced = stored(tmp_path / "whole"), stored(tmp_path / "a")
    rows = torch.cat([one[point].flatten(1).T for one in whole.values()]).double()
    _, _, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for key, one in whole.items():
        flat = one[point].flatten(1).T.double() - rows.mean(0)
        expected = (flat @ axes[:2].T).T.reshape(2, 16, 16)
        found = reduced[key][point].double()
        # an axis may point the other way
        signs = (found * expected).sum((1, 2)).sign()[:, None, None]
        assert torch.allclose(found, expected * signs, atol=1e-3 * float(expected.abs().max()))


def test_zarr(vae: Path, folder: Path, tmp_path: Path) -> None:
    settings = FeatureSettings(points=POINTS, reduce="pool:2")
    for name in "ab":
        options = Options(size="16", shard_size=4, layout="zarr", workers=1)
        dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / name, options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / "tars", SMALL)
    tars, arrays = stored(tmp_path / "tars"), stored(tmp_path / "a")
    for key, tensors in tars.items():
        assert all(torch.equal(tensors[name], arrays[key][name]) for name in POINTS)
    with zarr.storage.ZipStore(tmp_path / "a" / "features-000000.zarr.zip", mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert group[POINTS[1]].shape == (4, 32, 2, 2)
        assert [one["key"] for one in group.attrs["samples"]] == list(tars)[:4]


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_top_patches(layout: str, vae: Path, folder: Path, tmp_path: Path) -> None:
    settings = FeatureSettings(points=POINTS, top=True)
    extractor = FeatureExtractor(vae, settings)
    options = Options(size="16", shard_size=4, layout=layout)
    dataset.features(folder, extractor, tmp_path / "out", options)
    found = top_patches(tmp_path / "out", folder, extractor, 3)
    assert list(found.channels) == extractor.names, "in the order of a run"
    assert set(found.channels) == set(POINTS)
    assert found.images == 9
    # by hand, over whole feature maps
    settings = FeatureSettings(points=POINTS, reduce=None, dtype="float32")
    dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / "whole", SMALL)
    whole = stored(tmp_path / "whole")
    point = POINTS[0]
    for channel in (0, 5, 31):
        largest = {key: float(one[point][channel].max()) for key, one in whole.items()}
        expected = sorted(largest, key=lambda key: -largest[key])[:3]
        patches = found.channels[point][channel]
        assert [patch.key for patch in patches] == expected
        assert [patch.value for patch in patches] == [largest[key] for key in expected]
        # conv_in and two convolutions: 7x7, around the place
        place = int(whole[expected[0]][point][channel].argmax())
        row, column = divmod(place, 16)
        top, left, bottom, right = patches[0].box
        assert (top, bottom) == (max(0, row - 3), min(16, row + 4))
        assert (left, right) == (max(0, column - 3), min(16, column + 4))
        assert patches[0].pixels.shape == (bottom - top, right - left, 3)
    assert found.fields[point] == (7, 7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"points": ("nothing",)}, "nothing"),
        ({"points": POINTS, "timesteps": (1,)}, "timesteps: an autoencoder takes no timesteps"),
        ({"points": POINTS, "timesteps": (1000,)}, "timesteps: not a timestep"),
        ({"points": POINTS, "reduce": "median"}, "reduce: unknown reduction"),
        ({"points": POINTS, "dtype": "int8"}, "dtype: unknown dtype"),
        ({"points": POINTS, "batch": 0}, "batch: not a batch"),
    ],
)
def test_what_is_refused(
    settings: dict[str, object], words: str, vae: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        extractor = FeatureExtractor(vae, FeatureSettings(**settings))  # type: ignore[arg-type]
        dataset.features(folder, extractor, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_unet_needs_timesteps_and_a_vae(folder: Path, tmp_path: Path) -> None:
    settings = FeatureSettings(points=("mid_block",))
    extractor = FeatureExtractor(WEIGHTS / "tiny-unet.safetensors", settings)
    with pytest.raises(InputError, match="a U-Net needs timesteps"):
        dataset.features(folder, extractor, tmp_path / "out", SMALL)


def test_features_are_not_latents(vae: Path, folder: Path, tmp_path: Path) -> None:
    settings = FeatureSettings(points=POINTS)
    dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / "out", SMALL)
    with pytest.raises(InputError, match="this data set has no latents"):
        dataset.open_latents(tmp_path / "out")
    with pytest.raises(InputError, match="made in another way"):
        dataset.encode(folder, vae, tmp_path / "out", options=SMALL)


def test_axes_go_with_the_data_set_that_they_were_found_for(
    vae: Path, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    sdconv.save(seeded.network(sdconv.load(vae).config, seed=1), other)
    settings = FeatureSettings(points=(POINTS[0],), reduce="pca:2", dtype="float32")
    for model, out, force in ((vae, "a", False), (other, "a", True), (other, "b", False)):
        options = Options(size="16", shard_size=4, force=force)
        dataset.features(folder, FeatureExtractor(model, settings), tmp_path / out, options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_axes_are_found_from_images_that_can_be_decoded(vae: Path, tmp_path: Path) -> None:
    """Every second one is damaged: those that are looked at first."""
    for number in range(PrincipalAxes.IMAGES + 6):
        path = write(tmp_path / "in" / f"{number:03d}.jpg", number, 64, 64)
        if number % 2 == 0:
            path.write_bytes(path.read_bytes()[:-900])
    settings = FeatureSettings(points=(POINTS[0],), reduce="pca:2", dtype="float32")
    extractor = FeatureExtractor(vae, settings)
    summary = dataset.features(tmp_path / "in", extractor, tmp_path / "out", SMALL)
    assert summary.quarantined == {"damaged": 35}
    shapes = {tuple(one[POINTS[0]].shape) for one in stored(tmp_path / "out").values()}
    assert shapes == {(2, 16, 16)}


@pytest.mark.parametrize("how", [{"reduce": "pool:2"}, {"reduce": "mean", "top": True}])
def test_a_point_that_cannot_be_reduced_ends_the_run(
    how: dict[str, Any], vae: Path, folder: Path, tmp_path: Path
) -> None:
    """Its images are not to blame."""
    settings = FeatureSettings(points=("encoder.mid_block.attentions.0.to_q",), **how)
    with pytest.raises(SdconvError, match=r"to_q: its feature maps cannot be reduced in this way"):
        dataset.features(folder, FeatureExtractor(vae, settings), tmp_path / "out", SMALL)


def test_features_do_not_fit_parquet(vae: Path, folder: Path, tmp_path: Path) -> None:
    extractor = FeatureExtractor(vae, FeatureSettings(points=POINTS))
    options = Options(size="16", layout="parquet")
    with pytest.raises(InputError, match="layout: parquet files hold latents only"):
        dataset.features(folder, extractor, tmp_path / "out", options)
    assert not (tmp_path / "out" / "dataset.json").exists()
