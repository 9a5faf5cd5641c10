"""Images of any size, and their alpha channels, through encode, decode and reconstruct."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run
from PIL import Image
from safetensors.torch import load_file, save_file

import sdconv
from sdconv.images import LoadedImage, psnr, read_image, to_tensor
from sdconv.latents import read_stored

KL = seeded.SMALL_KL  # two levels: a latent stands for 2 pixels along each side
FLUX2 = seeded.SMALL_FLUX2
ROWS, COLUMNS = 37, 51


def pixels() -> np.ndarray:
    y, x = np.mgrid[:ROWS, :COLUMNS]
    return np.stack([x * 5, y * 6, (x * y) % 256], -1).astype(np.uint8)


def alpha() -> np.ndarray:
    y, x = np.mgrid[:ROWS, :COLUMNS]
    return ((x + y) * 3 % 256).astype(np.uint8)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    Image.fromarray(pixels()).save(folder / "photo.png")
    Image.fromarray(np.dstack([pixels(), alpha()])).save(folder / "clear.png")
    sdconv.save(seeded.network(KL), folder / "vae.safetensors")
    sdconv.save(seeded.network(FLUX2), folder / "flux2.safetensors")
    return folder


def padded() -> torch.Tensor:
    """The photo with its last column and row mirrored."""
    wide = np.concatenate([pixels(), pixels()[:, -1:]], 1)
    return to_tensor(Image.fromarray(np.concatenate([wide, wide[-1:]], 0)))


@torch.no_grad()
@pytest.mark.parametrize("options", [(), ("--memory", "1GiB")])
def test_any_size_comes_back(options: tuple[str, ...], here: Path, tmp_path: Path) -> None:
    z, out = tmp_path / "z.safetensors", tmp_path / "out.png"
    model = ("-m", here / "vae.safetensors", "--backend", "reference", *options)
    said = answer("encode", here / "photo.png", *model, "-o", z)
    assert (said["width"], said["height"]) == (COLUMNS, ROWS)
    assert said["shape"] == [1, 4, 19, 26]
    assert said["notes"] == [
        "padded from 51x37 to 52x38: sides are multiples of 2; the padding is cut off again after "
        "decoding"
    ]
    latents = seeded.network(KL).encode(padded()).latent_dist.mode()
    assert torch.allclose(load_file(z)["latents"], latents, rtol=0, atol=1e-4 if options else 0)
    result = run("decode", z, *model, "-o", out)
    assert "note: the padding was cut off, from 52x38 to 51x37" in result.stderr
    assert f"{out}: 51x37 from raw latents" in result.stdout
    right = seeded.network(KL).decode(latents).sample[..., :ROWS, :COLUMNS].clamp(-1, 1)
    with Image.open(out) as image:
        assert image.size == (COLUMNS, ROWS)
        assert float((to_tensor(image) - right).abs().max()) <= 1.01 / 127.5


@torch.no_grad()
def test_reconstruct_keeps_the_size(here: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "r.png", ("-m", here / "vae.safetensors", "--backend", "reference")
    said = answer("reconstruct", here / "photo.png", *model, "-o", out)
    assert (said["width"], said["height"]) == (COLUMNS, ROWS)
    network, photo = seeded.network(KL), to_tensor(Image.fromarray(pixels()))
    back = network.decode(network.encode(padded()).latent_dist.mode()).sample
    assert said["psnr"] == pytest.approx(psnr(back[..., :ROWS, :COLUMNS], photo))
    # the control: a multiple needs no padding, and --crop is another image
    assert answer("reconstruct", here / "photo.png", *model, "-fo", out, "--size", 32)["notes"] == [
        "resized from 51x37 to 32x23",
        *(
            [
                "padded from 32x23 to 32x24: sides are multiples of 2; "
                "the padding is cut off again after decoding"
            ]
        ),
    ]
    said = answer("reconstruct", here / "photo.png", *model, "-fo", out, "--crop")
    assert (said["width"], said["height"]) == (50, 36)


@pytest.mark.parametrize("scaled", [True, False])
def test_patches_of_flux2_come_back(scaled: bool, here: Path, tmp_path: Path) -> None:
    z, out = tmp_path / "z.safetensors", tmp_path / "out.png"
    flags = ["--scaled"] if scaled else []
    said = answer("encode", here / "photo.png", "-m", here / "flux2.safetensors", "-o", z, *flags)
    assert said["shape"][2:] == ([10, 13] if scaled else [19, 26])
    said = answer("decode", z, "-m", here / "flux2.safetensors", "-o", out)
    assert (said["width"], said["height"]) == (COLUMNS, ROWS)


def test_latents_that_were_changed_are_not_cut(here: Path, tmp_path: Path) -> None:
    z, out = tmp_path / "z.safetensors", tmp_path / "out.png"
    answer("encode", here / "photo.png", "-m", here / "vae.safetensors", "-o", z)
    metadata = dict(sdconv.read_header(z).metadata)
    save_file({"latents": torch.zeros(1, 4, 40, 52)}, z, metadata=metadata)
    result = run("decode", z, "-m", here / "vae.safetensors", "-o", out)
    assert "not cut to 51x37, of which the file says it is: it is 104x80" in result.stderr
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, z, metadata={"sdconv.latents.image": "big"})
    result = run("decode", z, "-m", here / "vae.safetensors", "-o", out, "--force")
    assert result.exit_code == 2
    assert "not an image's size" in result.stderr


def test_alpha_is_kept_on_request(here: Path, tmp_path: Path) -> None:
    z, out, model = (
        tmp_path / "z.safetensors",
        tmp_path / "out.png",
        ("-m", here / "vae.safetensors"),
    )
    answer("encode", here / "clear.png", *model, "-o", z, "--alpha")
    assert np.array_equal(load_file(z)["alpha"], alpha())
    answer("decode", z, *model, "-o", out)
    with Image.open(out) as image:
        assert image.mode == "RGBA"
        assert np.array_equal(np.asarray(image)[..., 3], alpha())
        kept = np.asarray(image)[..., :3]
    # the colours are those of the same image without transparency
    plain = tmp_path / "plain.safetensors"
    answer("encode", here / "photo.png", *model, "-o", plain)
    assert torch.equal(load_file(plain)["latents"], load_file(z)["latents"])
    answer("decode", plain, *model, "-fo", out)
    with Image.open(out) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), kept)
    # a format without alpha, and the default: blended with white, said
    result = run("decode", z, *model, "-o", tmp_path / "out.jpg")
    assert "note: the alpha channel was left out: .jpg images have none" in result.stderr
    said = answer("encode", here / "clear.png", *model, "-fo", z)
    assert "transparency was blended with white" in said["notes"]
    assert set(load_file(z)) == {"latents"}
    assert read_stored(z).alpha is None


def test_alpha_in_the_sheet(here: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "sheet.png", ("-m", here / "vae.safetensors", "--alpha")
    answer("reconstruct", here / "clear.png", *model, "-o", out)
    with Image.open(out) as sheet:
        assert sheet.mode == "RGBA"
        assert 0 < np.asarray(sheet)[..., 3].mean() < 255
    answer("reconstruct", here / "photo.png", *model, "-fo", out)
    with Image.open(out) as sheet:
        assert sheet.mode == "RGB"  # an image without alpha has none to keep
    result = run("reconstruct", here / "clear.png", *model, "-o", tmp_path / "sheet.jpg")
    assert result.exit_code == 2
    assert "images in this format have no alpha channel" in result.stderr


def test_padding_mirrors_as_often_as_needed(tmp_path: Path) -> None:
    small = Image.fromarray(pixels()[:3, :5])
    done = LoadedImage(image=small).padded(16).image
    assert done.size == (16, 16)
    assert np.array_equal(np.asarray(done)[:3, :5], pixels()[:3, :5])
    assert np.array_equal(np.asarray(done)[3, :5], pixels()[2, :5])
    whole = LoadedImage(image=Image.new("RGB", (32, 16)))
    assert whole.padded(16) is whole
    small.save(tmp_path / "small.png")
    assert read_image(tmp_path / "small.png", alpha=True).image.mode == "RGB"
