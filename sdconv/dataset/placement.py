"""From an image's size to the network's input: resized and cropped, or padded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdconv.errors import InputError
from sdconv.sizes import parse_size

Size = tuple[int, int]

# SDXL's aspect buckets (appendix I of its paper), landscape, in 1/16 of the base size; the rest
# are these turned upright, and the square; the paper has one of them in landscape only
_SDXL = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23),
    (11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17),
    (15, 16),
)  # fmt: skip
_LANDSCAPE_ONLY = (11, 21)
_STEP = 64  # of the sides of sd-scripts' buckets


@dataclass(frozen=True)
class Placement:
    """How an upright image becomes the network's input; all sizes are (rows, columns) in pixels.

    Attributes:
        resized: to which it is resized first.
        crop: top and left of the part of the resized image that is kept.
        size: the network's input. Where it is larger than the resized image, the last row and
            column are repeated at the bottom and on the right.
    """

    resized: Size
    crop: Size
    size: Size

    @property
    def content(self) -> Size:
        """The rows and columns of the input, from the top left, that are not padding."""
        return min(self.resized[0], self.size[0]), min(self.resized[1], self.size[1])

    def apply(self, image: Image.Image) -> np.ndarray:
        """The pixels of an upright RGB image, ``(H, W, 3)``, uint8."""
        rows, columns = self.resized
        if image.size != (columns, rows):
            image = image.resize((columns, rows), Image.Resampling.LANCZOS)
        (top, left), (height, width) = self.crop, self.content
        pixels = np.asarray(image, dtype=np.uint8)[top : top + height, left : left + width]
        return self._padded(pixels)

    def mirrored(self, pixels: np.ndarray) -> np.ndarray:
        """The input of the mirror image; padding stays on the right."""
        height, width = self.content
        return self._padded(pixels[:height, :width][:, ::-1])

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        below, right = (self.size[axis] - pixels.shape[axis] for axis in (0, 1))
        if below or right:
            pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
        return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Native:
    """Every image keeps its size and is padded to multiples of what one latent stands for."""

    grouped = False  # a shard holds images of several sizes

    def place(self, image: Size, multiple: int) -> Placement:
        """The placement of an upright image of this size."""
        rows, columns = (-(-side // multiple) * multiple for side in image)
        return Placement(image, (0, 0), (rows, columns))


@dataclass(frozen=True)
class Buckets:
    """Each image is resized and centre-cropped to the size of ``sizes`` that is nearest in aspect
    ratio (columns over rows, as sd-scripts compares them)."""

    sizes: tuple[Size, ...]
    grouped = True  # a shard holds images of one size

    def place(self, image: Size, multiple: int) -> Placement:
        """The placement of an upright image of this size."""
        ratio = image[1] / image[0]
        # of sizes with one ratio, the image's own, then the first
        size = min(self.sizes, key=lambda one: (abs(one[1] / one[0] - ratio), one != image))
        wide = ratio > size[1] / size[0]
        scale = size[0] / image[0] if wide else size[1] / image[1]
        rows, columns = (
            max(least, int(side * scale + 0.5)) for side, least in zip(image, size, strict=True)
        )
        crop = ((rows - size[0]) // 2, (columns - size[1]) // 2)
        return Placement((rows, columns), crop, size)


Sizing = Native | Buckets


def parse_sizing(text: str, multiple: int = 8) -> Sizing:
    """What ``--size`` says.

    Args:
        text: ``"512"`` or ``"512x768"`` (rows first): resized and centre-cropped to it;
            ``"buckets:1024"``: SDXL's aspect buckets, scaled to this base; ``"buckets:N:MIN:MAX"``:
            sd-scripts' buckets of at most NxN pixels with sides from MIN to MAX in steps of 64;
            ``"native"``: kept, and padded.
        multiple: of which the network's input must be.

    Raises:
        InputError: another form, or sizes that are not such multiples.
    """
    if text == "native":
        return Native()
    found = re.fullmatch(r"buckets:(\d{1,5})(?::(\d{1,5}):(\d{1,5}))?", text)
    if found is None and text.startswith("buckets"):
        raise InputError(
            "not a size",
            where="--size",
            expected="buckets:1024, or buckets:1024:256:2048 with the smallest and largest side",
            got=repr(text),
        )
    if found is None:
        sizes: Sequence[Size] = [parse_size(text)]
    elif found[2] is None:
        sizes = _sdxl_buckets(int(found[1]))
    else:
        sizes = _sd_scripts_buckets(int(found[1]), int(found[2]), int(found[3]))
    unfit = [one for one in sizes if one[0] % multiple or one[1] % multiple]
    if unfit or not sizes:
        raise InputError(
            "this network cannot take such images" if sizes else "these are no buckets",
            where="--size",
            expected=f"sides in multiples of {multiple}",
            got=f"{unfit[0][0]}x{unfit[0][1]}" if unfit else repr(text),
        )
    return Buckets(tuple(sizes))


def _sdxl_buckets(base: int) -> list[Size]:
    if base % 16 or not base:
        raise InputError(
            "not a base of SDXL's buckets",
            where="--size",
            expected="a multiple of 128, such as buckets:1024",
            got=base,
        )
    unit = base // 16
    wide = [(rows * unit, columns * unit) for rows, columns in _SDXL]
    # by columns, then rows: of two that are equally near, sd-scripts takes the first
    upright = [(b * unit, a * unit) for a, b in _SDXL if (a, b) != _LANDSCAPE_ONLY]
    every = [*wide, *upright, (base, base)]
    return sorted(every, key=lambda one: one[::-1])


def _sd_scripts_buckets(base: int, least: int, most: int) -> list[Size]:
    """``make_bucket_resolutions`` in sd-scripts' ``library/model_util.py``."""
    square = base // _STEP * _STEP
    found = {(square, square)} if square else set()
    for width in range(least, most + 1, _STEP) if least else ():
        height = min(most, base * base // width // _STEP * _STEP)
        if height >= least:
            found |= {(height, width), (width, height)}
    return sorted(found, key=lambda one: one[::-1])
