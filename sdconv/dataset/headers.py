"""What an image's header says, and why an image is left out."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from sdconv.dataset.sources import Item, open_item
from sdconv.errors import InputError
from sdconv.images import image_errors, opened

_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Header:
    """``size``: rows and columns once it is upright. ``orientation``: EXIF's, 1 to 8, where 1 is
    upright. ``mode``: Pillow's, such as RGB, CMYK or I;16."""

    size: tuple[int, int]
    orientation: int
    mode: str


@dataclass(frozen=True)
class Rejected:
    """Why an image is left out.

    ``reason``: ``missing``, ``unreadable``, ``empty``, ``not an image``, ``damaged``, ``too
    large``, ``too small``, ``animated``, ``changed`` or ``not finite``. ``detail``: in words.
    """

    reason: str
    detail: str


RETRIED = ("missing", "unreadable", "changed")
"""The reasons that may be over when the file is looked at again, though it is the same file."""


def read_header(root: Path, item: Item) -> Header | Rejected:
    """The header of an image, without decoding the image."""
    if item.bytes < 0:
        return Rejected("missing", "the file does not exist")
    if item.bytes == 0:
        return Rejected("empty", "the file has no bytes")
    try:
        place = (item.path, item.offset, item.bytes, item.member is not None)
        with image_errors(item.full_name), open_item(root, *place) as file, opened(file) as image:
            if getattr(image, "is_animated", False):
                return Rejected("animated", f"{getattr(image, 'n_frames', 'several')} frames")
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels exceeds")
            orientation = _orientation(image, file)
            size = _rows_and_columns(image)
            return Header(size if orientation < 5 else size[::-1], orientation, image.mode)
    except InputError as error:
        return rejection(error)


def rejection(error: InputError) -> Rejected:
    """The reason behind an error of reading or encoding an image."""
    cause, detail = error.__cause__, " ".join(str(error).split())
    reasons: tuple[tuple[str, tuple[type[BaseException], ...]], ...] = (
        ("too large", (Image.DecompressionBombError, Image.DecompressionBombWarning)),
        ("not an image", (UnidentifiedImageError,)),
        ("missing", (FileNotFoundError, NotADirectoryError)),
        ("unreadable", (PermissionError, IsADirectoryError)),
    )
    found = (name for name, kinds in reasons if isinstance(cause, kinds))
    return Rejected(next(found, "damaged"), detail)


def _rows_and_columns(image: Image.Image) -> tuple[int, int]:
    """As they are stored: of a TIFF, newer versions of Pillow state the size of the upright one."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(image.tag_v2[257]), int(image.tag_v2[256])
    return image.height, image.width


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF's orientation; Pillow would decode a whole PNG to look behind its pixels."""
    if image.format == "PNG" and "exif" not in image.info and not _late_exif(file):
        return 1
    found = image.getexif().get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _late_exif(file: BinaryIO) -> bool:
    """Whether a PNG has an ``eXIf`` chunk, found by stepping from chunk to chunk."""
    at = file.tell()
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"eXIf", b"IEND"):
                return bool(kind == b"eXIf")
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(at)
