"""Sizes: which bucket, how much is cut off, what is padded."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.photos import pixels
from PIL import Image

from sdconv.dataset.placement import Buckets, Native, parse_sizing
from sdconv.errors import InputError


def test_one_size_is_resized_and_cropped_around_the_centre() -> None:
    placement = parse_sizing("64x96").place((100, 120), 8)
    assert (placement.resized, placement.crop, placement.size) == ((80, 96), (8, 0), (64, 96))
    image = Image.fromarray(pixels(1, 100, 120))
    expected = image.resize((96, 80), Image.Resampling.LANCZOS).crop((0, 8, 96, 72))
    assert np.array_equal(placement.apply(image), np.asarray(expected))


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = pixels(2, 64, 64)
    assert np.array_equal(
        parse_sizing("64").place((64, 64), 8).apply(Image.fromarray(image)), image
    )


def test_native_pads_by_repeating_the_edge() -> None:
    placement = Native().place((13, 16), 8)
    assert (placement.size, placement.content) == ((16, 16), (13, 16))
    image = pixels(3, 13, 16)
    padded = placement.apply(Image.fromarray(image))
    assert np.array_equal(padded[:13], image)
    assert np.array_equal(padded[13:], image[12:].repeat(3, 0))
    # the mirror image has its padding on the same side
    mirrored = placement.mirrored(padded)
    assert np.array_equal(mirrored[:13], image[:, ::-1])
    assert not np.array_equal(mirrored[:13], image), "the control"


def test_sdxl_has_the_buckets_of_its_paper() -> None:
    """PixArt-Sigma's, which diffusers has, are these twice as large."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as pixart

    expected = {
        (int(rows) // 2, int(columns) // 2)
        for rows, columns in pixart.ASPECT_RATIO_2048_BIN.values()
    }
    sizing = parse_sizing("buckets:1024")
    assert isinstance(sizing, Buckets)
    assert set(sizing.sizes) == expected
    assert len(sizing.sizes) == 40
    assert (704, 1344) in expected
    assert (1344, 704) not in expected
    halved = parse_sizing("buckets:512")
    assert isinstance(halved, Buckets)
    assert set(halved.sizes) == {(rows // 2, columns // 2) for rows, columns in expected}


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((1000, 1500), (832, 1216)),
        ((3000, 2000), (1216, 832)),
        ((500, 500), (1024, 1024)),
        ((100, 9000), (512, 2048)),
    ],
)
def test_an_image_goes_to_the_bucket_of_the_nearest_ratio(
    image: tuple[int, int], bucket: tuple[int, int]
) -> None:
    placement = parse_sizing("buckets:1024").place(image, 8)
    assert placement.size == bucket
    # one side fits exactly, and the other one covers the bucket
    rows, columns = placement.resized
    assert rows == bucket[0] or columns == bucket[1]
    assert rows >= bucket[0]
    assert columns >= bucket[1]


def test_buckets_of_sd_scripts() -> None:
    """``make_bucket_resolutions((512, 512), 256, 1024, 64)`` has these, as (width, height)."""
    sizing = parse_sizing("buckets:512:256:1024")
    assert isinstance(sizing, Buckets)
    widths = [256, 256, 256, 256, 320, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960]
    assert [columns for _, columns in sizing.sizes] == [*widths, 1024]
    assert sizing.sizes[0] == (832, 256)
    assert (512, 512) in sizing.sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("buckets", "not a size"),
        ("buckets:1024:256", "not a size"),
        ("buckets:100", "not a base of SDXL's buckets"),
        ("0", "not a size"),
        ("big", "not a size"),
        ("500", "this network cannot take such images"),
    ],
)
def test_other_sizes_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=f"--size: {words}"):
        parse_sizing(text)
