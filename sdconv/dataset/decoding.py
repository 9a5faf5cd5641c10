"""From a planned image to the pixels that the network takes."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdconv.dataset.headers import Rejected, rejection
from sdconv.dataset.plan import Planned
from sdconv.dataset.sources import open_item
from sdconv.errors import InputError
from sdconv.images import read_image_from

DRAFT = 2
"""A JPEG is decoded at a fraction of its size if that is still this many times as large as the size
to which it is resized. Lanczos resampling hides the difference: over 45 dB on photos."""


@dataclass(frozen=True)
class Decoded:
    """An image as the network takes it.

    Attributes:
        planned: which image, and how it became the input.
        pixels: ``(H, W, 3)``, uint8, RGB.
        content: SHA-256 of the image file.
        notes: what was done to the image, in words.
    """

    planned: Planned
    pixels: np.ndarray
    content: str
    notes: tuple[str, ...]

    @property
    def mirrored(self) -> np.ndarray:
        """The pixels of the mirror image, padded on the same sides."""
        return self.planned.placement.mirrored(self.pixels)


def decode(root: Path, planned: Planned, draft: bool) -> Decoded | Rejected:
    """Reads, decodes and resizes one image.

    Args:
        root: the source's.
        planned: the image.
        draft: whether a large JPEG may be decoded at a fraction of its size: see ``DRAFT``.
    """
    try:
        about = (root / planned.path).stat()
        stamp = (about.st_size, about.st_mtime_ns)
        if planned.member is not None:
            stamp = (planned.bytes, about.st_mtime_ns)
        if stamp != (planned.bytes, planned.mtime_ns):
            return Rejected("changed", "the file changed after the plan was made")
        place = (planned.path, planned.offset, planned.bytes, planned.member is not None)
        with open_item(root, *place) as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return Rejected("missing", "the file was deleted after the plan was made")
    except OSError as error:
        return Rejected("unreadable", error.strerror or str(error))
    resized = planned.resized
    try:
        loaded = read_image_from(
            io.BytesIO(data),
            planned.path,
            at_least=(DRAFT * resized[0], DRAFT * resized[1]) if draft else None,
        )
        image = loaded.image
        if (image.height, image.width) not in _sizes_of(planned.original):
            return Rejected("damaged", "its size is not the one in its header")
        pixels = planned.placement.apply(image)
    except InputError as error:
        return rejection(error)
    notes = (*_conversions(planned.mode), *loaded.notes)
    return Decoded(planned, pixels, hashlib.sha256(data).hexdigest(), notes)


def _sizes_of(original: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes at which an image may be decoded: libjpeg rounds up."""
    rows, columns = original
    return [(-(-rows // part), -(-columns // part)) for part in (1, 2, 4, 8)]


def _conversions(mode: str) -> tuple[str, ...]:
    if mode in ("RGB", "RGBA"):
        return ()
    if mode == "F" or mode.startswith("I"):
        return (f"{mode} was scaled to 8 bits",)
    return (f"{mode} was converted to RGB",)
