"""Pictures: from files to tensors in [-1, 1] and back, and how much two of them differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from sdconv.checkpoint.io.files import as_path
from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import InputError

READ_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read: pictures only, nothing that runs another program."""

WRITE_FORMATS: Mapping[str, str] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix -> Pillow's name of the formats that are written."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in RGB, and in ``notes`` what had to be done to it, in words."""

    image: Image.Image
    notes: tuple[str, ...] = ()

    def fitted(self, multiple: int, size: int | tuple[int, int] | None = None) -> Picture:
        """The same picture with sides in multiples of ``multiple`` pixels, cut around the centre.

        Args:
            multiple: how many pixels one latent stands for.
            size: pixels of the longer side, to which it is resized before; or (rows, columns),
                to which it is resized and cut around the centre; None for as it is.

        Raises:
            InputError: a side shorter than ``multiple``, or more pixels than a file may have.
        """
        image, notes = self.image, list(self.notes)
        resized = _resized(image.size, size)
        if resized != image.size:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and resized[0] * resized[1] > most:
                raise InputError(
                    "too large a picture",
                    where="size",
                    expected=f"at most {most} pixels, as of pictures that are read",
                    got=_sides(resized),
                    hint="ask for a smaller one",
                )
            how = "resized and cut around the centre" if isinstance(size, tuple) else "resized"
            notes.append(f"{how} from {_sides(image.size)} to {_sides(resized)}")
            if isinstance(size, tuple):
                image = ImageOps.fit(image, resized, Image.Resampling.LANCZOS)
            else:
                image = image.resize(resized, Image.Resampling.LANCZOS)
        width, height = (side // multiple * multiple for side in image.size)
        if not (width and height):
            raise InputError(
                "too small a picture",
                where="image",
                expected=f"at least {multiple} pixels on each side",
                got=_sides(image.size),
                hint="enlarge it: --size N sets the longer side",
            )
        if (width, height) != image.size:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            notes.append(
                f"cut around the centre from {_sides(image.size)} to {_sides((width, height))}: "
                f"sides are multiples of {multiple}"
            )
            image = image.crop((left, top, left + width, top + height))
        return Picture(image=image, notes=tuple(notes))


def read_image(path: str | Path) -> Picture:
    """A picture from a file, upright and in RGB, 8 bits for each channel.

    The camera's orientation is honoured, transparency is laid over white, 16 bits are scaled to 8,
    of an animation the first frame is taken. Colour profiles are not applied.

    Raises:
        InputError: the file is absent or out of reach, no picture of ``READ_FORMATS``, damaged,
            larger than Pillow's bound against decompression bombs, or of a mode without colours; or
            ``path`` is no path.
    """
    path = as_path(path)
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # odd metadata is not the caller's concern
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            formats = [name for name in READ_FORMATS if name in Image.OPEN]
            with Image.open(file, formats=formats) as image:
                return _upright(image, path)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            "is too large a picture",
            where=path,
            expected=f"at most {Image.MAX_IMAGE_PIXELS} pixels",
            got=str(error).partition(" exceeds")[0],  # and not of which of PIL's two limits
            hint="make it smaller with another program",
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            "is no picture that can be read",
            where=path,
            expected=", ".join(READ_FORMATS),
            hint="convert it to PNG or JPEG",
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("does not exist", where=path, hint="check the path") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(
            "cannot be opened", where=path, expected="a picture", got=error.strerror
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever they meet in a damaged file
        raise InputError(
            "is damaged, or of a kind that cannot be read",
            where=repr(str(path)) if isinstance(error, ValueError) else path,
            expected="a whole picture",
            got=error,
            hint="convert it to PNG or JPEG, or get it again",
        ) from error


def to_tensor(image: Image.Image) -> Tensor:
    """``(1, 3, H, W)`` in [-1, 1], float32, from a picture in RGB."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_image(picture: Tensor) -> Image.Image:
    """A picture in RGB from ``(3, H, W)``, nominally in [-1, 1]; what lies outside is clamped.

    Raises:
        InputError: not three channels, or NaN or infinity among the values.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InputError("no picture", expected="(3, H, W)", got=tuple(picture.shape))
    picture = picture.float().cpu()
    if not torch.isfinite(picture).all():
        raise InputError(
            "the picture came out with NaN or infinity",
            where="image",
            expected="finite numbers",
            hint="compute in a wider dtype (SDXL's VAE overflows in float16: --dtype float32), "
            "and look at the weights with `sdconv inspect --values`",
        )
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, both clamped to [-1, 1]: ``10 log10(2^2 / mean square)``.

    Infinite where they are equal.
    """
    a, b = (one.detach().double().clamp(-1, 1) for one in (picture, reference))
    error = float((a - b).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def side_by_side(
    original: Image.Image, reconstruction: Image.Image, caption: str = "reconstruction"
) -> tuple[Image.Image, int]:
    """Both pictures and their difference in a row, and by how much the difference is amplified.

    The difference is that of each channel, without its sign, black where they are equal.

    Args:
        original, reconstruction: of one size.
        caption: what stands over the second.
    """
    a, b = (np.asarray(image, dtype=np.float32) for image in (original, reconstruction))
    difference = np.abs(a - b)
    # as far as 99 of 100 values stay below white
    visible = max(float(np.quantile(difference, 0.99)), 1.0)
    amplification = 2 ** max(0, math.floor(math.log2(255 / visible)))
    shown = np.minimum(difference * amplification, 255).round().astype(np.uint8)
    panels = (
        ("original", original),
        (caption, reconstruction),
        (f"difference x{amplification}", Image.fromarray(shown)),
    )
    # small pictures are enlarged, so that the captions fit
    zoom = max(1, math.ceil(256 / original.width))
    width, height = original.width * zoom, original.height * zoom
    text, gap = max(16, width // 32), max(4, width // 64)
    strip = text + 2 * gap
    sheet = Image.new("RGB", (3 * width + 4 * gap, height + strip + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(text)
    for place, (words, image) in enumerate(panels):
        left = gap + place * (width + gap)
        draw.text((left, strip / 2), words, fill="black", font=font, anchor="lm")
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, strip))
    return sheet, amplification


def image_format(path: Path) -> str:
    """Pillow's name of the format that a path's suffix asks for.

    Raises:
        InputError: it is none of ``WRITE_FORMATS``.
    """
    if path.suffix.lower() not in WRITE_FORMATS:
        raise InputError(
            "not a picture's name",
            where=path,
            expected="a name that ends in " + ", ".join(WRITE_FORMATS),
            got=path.suffix or "no suffix",
        )
    return WRITE_FORMATS[path.suffix.lower()]


def write_image(image: Image.Image, path: str | Path) -> None:
    """Writes a picture in the format of its suffix, whole or not at all.

    Raises:
        InputError: no path, or a suffix of no format that is written. CheckpointError: it cannot be
            written.
    """
    path = as_path(path)
    form = image_format(path)
    options = {"quality": 95} if form in ("JPEG", "WEBP") else {}
    write_whole(path, lambda part: image.save(part, format=form, **options))


def _upright(image: Image.Image, path: Path) -> Picture:
    """The picture as a viewer shows it."""
    notes = []
    if getattr(image, "is_animated", False):
        notes.append("the first of several frames was taken")
    if image.mode == "F" or image.mode.startswith("I"):
        deep = np.asarray(image)
        top = 1.0 if image.mode == "F" else 65535
        if not (deep.min() >= 0 and deep.max() <= top):
            raise InputError(
                "grey values out of range",
                where=path,
                expected=f"0 to {top:g} in a picture of Pillow's mode {image.mode!r}",
                got=f"{deep.min():g} to {deep.max():g}",
                hint="scale it to 8 bits with another program",
            )
        flat = Image.fromarray(np.round(deep * (255 / top)).astype(np.uint8))
        flat.getexif().update(image.getexif())
        image = flat
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            notes.append("transparency was laid over white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Picture(image=image.convert("RGB"), notes=tuple(notes))


def _resized(sides: tuple[int, int], size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Width and height after resizing, as ``Picture.fitted`` takes ``size``."""
    if size is None:
        return sides
    if isinstance(size, tuple):
        return size[1], size[0]
    factor = size / max(sides)
    width, height = (max(1, round(side * factor)) for side in sides)
    return width, height


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
