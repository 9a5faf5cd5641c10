"""What an image's header says, and why an image is left out."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from sdconv.dataset.sources import Item, open_item
from sdconv.errors import InputError
from sdconv.images import image_errors, opened_in_thread, pillow_warnings

_ORIENTATION = 0x0112  # the EXIF tag
# of a PNG's texts: those that may hold it too
_TEXTS = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")


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
    with pillow_warnings():
        return read_header_in_thread(root, item)


def read_header_in_thread(root: Path, item: Item) -> Header | Rejected:
    """As ``read_header``, for one of several threads within one ``pillow_warnings()``."""
    if item.bytes < 0:
        return Rejected("missing", "the file does not exist")
    if item.bytes == 0:
        return Rejected("empty", "the file has no bytes")
    try:
        place = (item.path, item.offset, item.bytes, item.member is not None)
        with (
            image_errors(item.full_name),
            open_item(root, *place) as file,
            opened_in_thread(file) as image,
        ):
            # cameras put a preview behind a JPEG, which makes an MPO of it
            if getattr(image, "is_animated", False) and image.format != "MPO":
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
    cause = error.__cause__
    # Pillow's own errors have no number; EINVAL may be that of a seek that a damaged file asks for
    is_systems = isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL)
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    reasons = (
        ("too large", isinstance(cause, bombs)),
        ("not an image", isinstance(cause, UnidentifiedImageError)),
        ("missing", isinstance(cause, FileNotFoundError | NotADirectoryError)),
        ("unreadable", is_systems or isinstance(cause, MemoryError)),
    )
    reason = next((name for name, holds in reasons if holds), "damaged")
    return Rejected(reason, " ".join(str(error).split()))


def _rows_and_columns(image: Image.Image) -> tuple[int, int]:
    """As they are stored: of a TIFF, newer versions of Pillow state the size of the upright one."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(image.tag_v2[257]), int(image.tag_v2[256])
    return image.height, image.width


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF's orientation, or else that of XMP, as ``ImageOps.exif_transpose`` finds it."""
    if image.format == "PNG" and not _has_late_metadata(file):
        # its own method decodes all pixels, to see what is behind them
        exif = Image.Image.getexif(image)
    else:
        exif = image.getexif()
    found = exif.get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _has_late_metadata(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels, found by stepping from chunk to chunk."""
    at, is_late = file.tell(), False
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            text = file.read(min(length, 32)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            is_metadata = kind == b"eXIf" or text.partition(b"\0")[0] in _TEXTS
            if kind == b"IEND" or (is_late and is_metadata):
                return bool(kind != b"IEND")
            is_late |= kind == b"IDAT"
            file.seek(length + 4 - len(text), 1)
        return False
    finally:
        file.seek(at)
