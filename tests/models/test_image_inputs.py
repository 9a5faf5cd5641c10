"""Images of Pillow's and numpy's as input of an autoencoder, and as its output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from PIL import Image

import sdconv
from sdconv.images import example_image, to_image, to_tensor

PHOTO = example_image().resize((48, 32))
PIXELS = np.asarray(PHOTO)
KL = seeded.kl((32, 32), 4, True, layers_per_block=1)


@pytest.fixture(scope="module")
def vae() -> Any:
    return seeded.network(KL)


def latents(vae: Any, images: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = vae.encode(images).latent_dist.mode()
    return found


def test_an_image_is_encoded_as_its_tensor_is(vae: Any) -> None:
    expected = latents(vae, to_tensor(PHOTO))
    assert torch.equal(latents(vae, PHOTO), expected)
    assert torch.equal(latents(vae, PIXELS), expected)
    assert torch.equal(latents(vae, PIXELS[None]), expected)
    assert not torch.equal(latents(vae, PHOTO.rotate(180)), expected)
    scaled = PIXELS.astype(np.float64) / 255
    torch.testing.assert_close(latents(vae, scaled), expected, atol=1e-5, rtol=1e-4)


def test_a_batch_of_images(vae: Any) -> None:
    upside_down = PHOTO.rotate(180)
    expected = torch.cat([latents(vae, PHOTO), latents(vae, upside_down)])
    for batch in (
        [PHOTO, upside_down],
        (PIXELS, upside_down),
        np.stack([PIXELS, np.asarray(upside_down)]),
    ):
        torch.testing.assert_close(latents(vae, batch), expected, atol=1e-5, rtol=1e-4)


def test_arrays_may_lie_in_memory_in_any_way(vae: Any, tmp_path: Path) -> None:
    expected = latents(vae, PIXELS)
    reversed_ = np.ascontiguousarray(PIXELS[::-1, :, ::-1])[::-1, :, ::-1]  # as BGR to RGB
    assert min(reversed_.strides) < 0
    assert torch.equal(latents(vae, reversed_), expected)
    PIXELS.tofile(tmp_path / "pixels")
    mapped = np.memmap(tmp_path / "pixels", mode="r", shape=PIXELS.shape)
    assert torch.equal(latents(vae, mapped), expected)
    scaled = PIXELS.astype(np.float32) / 255
    expected = latents(vae, scaled).contiguous()  # the memory layout changes rounding
    for images in (np.ascontiguousarray(scaled[::-1])[::-1], scaled.astype(">f4")):
        assert torch.equal(latents(vae, images), expected)
    with torch.inference_mode():
        image = vae.decode(expected).sample
        for z in (expected.flip(-1).numpy()[..., ::-1], expected.numpy().astype(">f4")):
            assert torch.equal(vae.decode(z).sample, image)


def test_grey_becomes_rgb(vae: Any) -> None:
    grey = PHOTO.convert("L")
    assert torch.equal(latents(vae, grey), latents(vae, grey.convert("RGB")))


def test_the_input_gets_the_networks_dtype() -> None:
    vae = seeded.network(KL).to(torch.float64)
    assert latents(vae, PHOTO).dtype == torch.float64


def test_a_tiny_autoencoder_takes_images_too() -> None:
    tiny = seeded.network(seeded.SMALL_TINY)
    with torch.inference_mode():
        assert torch.equal(tiny.encode(PHOTO).latents, tiny.encode(to_tensor(PHOTO)).latents)


def test_images_come_out(vae: Any) -> None:
    z = latents(vae, PHOTO)
    with torch.inference_mode():
        out = vae.decode(z)
        assert torch.equal(vae.decode(z.numpy()).sample, out.sample)
    (image,) = out.to_pil()
    assert image == to_image(out.sample[0])
    array = out.to_numpy()
    assert (array.shape, array.dtype) == ((1, 32, 48, 3), np.float32)
    assert 0 <= array.min() <= array.max() <= 1
    difference = array[0] * 255 - np.asarray(image, dtype=np.float32)
    assert np.abs(difference).max() <= 0.51


FLOATS = PIXELS.astype(np.float32)


@pytest.mark.parametrize(
    ("images", "what", "hint"),
    [
        (FLOATS, "values out of range", "divide by 255"),
        (FLOATS / 127.5 - 1, "values out of range", r"\(array \+ 1\) / 2"),
        (FLOATS / 10 - 10, "values out of range", "scale the values"),
        (FLOATS * np.nan, "values out of range", "NaN"),
        (PIXELS.astype(np.int64), "wrong dtype", "scale the values"),
        (PIXELS.transpose(2, 0, 1), "wrong shape", r"np\.moveaxis"),
        (PIXELS[..., 0], "wrong shape", "np.stack"),
        (np.dstack([PIXELS, PIXELS[..., 0]]), "wrong shape", r"array\[\.\.\., :3\]"),
        (np.ma.masked_less(PIXELS, 9), "would lose its mask", r"array\.filled"),
        (np.ma.masked_less(PIXELS, 9) / 255, "would lose its mask", r"array\.filled"),
        (PHOTO.convert("RGBA"), "unclear how this image is to become RGB", "convert"),
        (PHOTO.convert("CMYK"), "unclear how this image is to become RGB", "convert"),
        ([PHOTO, PHOTO.resize((24, 32))], "different sizes", "one by one"),
        ([], "must be a tensor", None),
        ([PHOTO, None], "must be a tensor", None),
        ("photo.jpg", "must be a tensor", None),
    ],
)
def test_what_is_ambiguous_is_refused(vae: Any, images: Any, what: str, hint: str | None) -> None:
    with pytest.raises(sdconv.InputError, match=what) as caught:
        vae.encode(images)
    if hint is not None:
        assert re.search(hint, str(caught.value))


def test_latents_are_floating_point(vae: Any) -> None:
    with pytest.raises(sdconv.InputError, match="latents must be floating-point"):
        vae.decode(np.zeros((1, 4, 4, 4), dtype=np.uint8))
    with pytest.raises(sdconv.InputError, match="would lose its mask"):
        vae.decode(np.ma.masked_less(np.zeros((1, 4, 4, 4), dtype=np.float32), -1))
    with pytest.raises(sdconv.InputError, match="latents must be a tensor"):
        vae.decode(Image.new("RGB", (8, 8)))


def test_torch_dtype_is_dtype() -> None:
    assert sdconv.load("tiny-vae", torch_dtype=torch.float16).dtype == torch.float16
    assert sdconv.load("tiny-vae", dtype=torch.float32, torch_dtype=torch.float32).dtype.is_signed
    with pytest.raises(sdconv.InputError, match="dtype and torch_dtype are the same argument"):
        sdconv.load("tiny-vae", dtype=torch.float32, torch_dtype=torch.float16)
