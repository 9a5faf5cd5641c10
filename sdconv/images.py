"""Images: from files to tensors in [-1, 1] and back, and how much two of them differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from sdconv.checkpoint.io.files import as_path
from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import InputError
from sdconv.hub.shipped import shipped

READ_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""The formats that are read, by Pillow's names: none of them runs another program."""

WRITE_FORMATS: Mapping[str, str] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""The formats that are written: suffix -> Pillow's name."""

_ORIENTATION = 0x0112  # the EXIF tag: 5 to 8 exchange rows and columns


HAVE_ALPHA = frozenset({"PNG", "WEBP", "TIFF"})
"""Those that can have an alpha channel."""


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """An RGB image, or an RGBA one if its alpha channel is kept.

    Attributes:
        image: the pixels.
        notes: changes that were made to the original, in words.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()

    def resized(self, size: int | tuple[int, int] | None) -> LoadedImage:
        """The image in another size.

        Args:
            size: pixels of the longer side; or (rows, columns), to which it is resized and cropped
                around its centre; None leaves it as it is.

        Raises:
            InputError: it would have more pixels than a file may have.
        """
        sides = _resized(self.image.size, size)
        if sides == self.image.size:
            return self
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and sides[0] * sides[1] > most:
            raise InputError(
                "the image is too large",
                where="size",
                expected=f"at most {most} pixels, as in a file",
                got=_sides(sides),
                hint="ask for a smaller size",
            )
        how = "resized and cropped around the centre" if isinstance(size, tuple) else "resized"
        note = f"{how} from {_sides(self.image.size)} to {_sides(sides)}"
        if isinstance(size, tuple):
            image = ImageOps.fit(self.image, sides, Image.Resampling.LANCZOS)
        else:
            image = self.image.resize(sides, Image.Resampling.LANCZOS)
        return LoadedImage(image=image, notes=(*self.notes, note))

    def padded(self, multiple: int) -> LoadedImage:
        """The image, mirrored at its right and its bottom edge until its sides are multiples of
        ``multiple``; the original is its upper left part."""
        width, height = self.image.size
        right, below = -width % multiple, -height % multiple
        if not (right or below):
            return self
        pixels = np.pad(np.asarray(self.image), ((0, below), (0, right), (0, 0)), "symmetric")
        sides = (width + right, height + below)
        note = (
            f"padded from {_sides(self.image.size)} to {_sides(sides)}: sides are multiples of "
            f"{multiple}; the padding is cut off again after decoding"
        )
        return LoadedImage(image=Image.fromarray(pixels), notes=(*self.notes, note))

    def fitted(self, multiple: int, size: int | tuple[int, int] | None = None) -> LoadedImage:
        """The image cropped around its centre, so that its sides are multiples of ``multiple``.

        Args:
            multiple: pixels that one latent stands for, along each side.
            size: pixels of the longer side, to which it is resized first; or (rows, columns), to
                which it is resized and cropped; None for no resizing.

        Raises:
            InputError: a side is shorter than ``multiple``, or it would have more pixels than a
                file may have.
        """
        resized = self.resized(size)
        image, notes = resized.image, list(resized.notes)
        width, height = (side // multiple * multiple for side in image.size)
        if not (width and height):
            raise InputError(
                "the image is too small",
                where="image",
                expected=f"at least {multiple} pixels on each side",
                got=_sides(image.size),
                hint="enlarge it: --size N sets the longer side",
            )
        if (width, height) != image.size:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            notes.append(
                f"cropped around the centre from {_sides(image.size)} to "
                f"{_sides((width, height))}: sides are multiples of {multiple}"
            )
            image = image.crop((left, top, left + width, top + height))
        return LoadedImage(image=image, notes=tuple(notes))


def read_image(path: str | Path, *, alpha: bool = False) -> LoadedImage:
    """Reads an image file as upright RGB with 8 bits per channel.

    The camera's orientation is applied, transparency is blended with white, 16 bits are scaled to
    8, and of an animation the first frame is read. Colour profiles are not applied.

    Args:
        path: the file.
        alpha: keep the alpha channel of an image that has one, which is then RGBA, with colours
            that are not blended.

    Raises:
        InputError: the file does not exist, cannot be opened, is damaged, has none of the
            ``READ_FORMATS``, exceeds Pillow's limit against decompression bombs, or has values out
            of range; or ``path`` is not a path.
    """
    path = as_path(path)
    with image_errors(path), path.open("rb") as file, opened(file) as image:
        return _as_displayed(image, path, alpha)


def read_image_from(
    file: BinaryIO, where: object, *, at_least: tuple[int, int] | None = None
) -> LoadedImage:
    """Reads an image from an open file, as ``read_image`` does from a path.

    Args:
        file: readable and seekable.
        where: the image's name, for errors.
        at_least: rows and columns of the upright image that are enough. A JPEG that is at least
            twice as large along both sides is decoded at 1/2, 1/4 or 1/8 of its size, which saves
            most of the time; a note says so.

    Raises:
        InputError: as ``read_image``.
    """
    with image_errors(where), opened(file) as image:
        full, notes = image.size, tuple[str, ...]()
        if at_least is not None:
            rows, columns = at_least
            lies = image.getexif().get(_ORIENTATION, 1) >= 5
            image.draft(None, (rows, columns) if lies else (columns, rows))
        if image.size != full:
            notes = (f"decoded at {_sides(image.size)} instead of {_sides(full)}",)
        loaded = _as_displayed(image, where)
        return LoadedImage(image=loaded.image, notes=notes + loaded.notes)


@contextmanager
def opened(file: BinaryIO) -> Iterator[Image.Image]:
    """An image file opened by Pillow in one of the ``READ_FORMATS``, its header read only.

    Pillow's exceptions are not translated: see ``image_errors``.
    """
    with pillow_warnings(), opened_in_thread(file) as image:
        yield image


@contextmanager
def opened_in_thread(file: BinaryIO) -> Iterator[Image.Image]:
    """As ``opened``, for one of several threads, all of them within one ``pillow_warnings()``."""
    Image.init()
    formats = [name for name in READ_FORMATS if name in Image.OPEN]
    with Image.open(file, formats=formats) as image:
        yield image


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Hides Pillow's warnings about metadata that is not used, and makes an error of that about too
    many pixels. It changes what holds for all threads, so that only one of them may enter it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def image_errors(where: object) -> Iterator[None]:
    """Translates what reading an image raises into an InputError about ``where``."""
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            "the image is too large",
            where=where,
            expected=f"at most {Image.MAX_IMAGE_PIXELS} pixels",
            got=str(error).partition(" exceeds")[0],  # without which of Pillow's two limits
            hint="resize it with another program",
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            "not an image that can be read",
            where=where,
            expected=", ".join(READ_FORMATS),
            hint="convert it to PNG or JPEG",
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("does not exist", where=where, hint="check the path") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(
            "cannot be opened", where=where, expected="an image", got=error.strerror
        ) from error
    except Exception as error:  # on damaged files Pillow's decoders raise exceptions of all types
        raise InputError(
            "a damaged image, or of an unsupported kind",
            where=repr(str(where)) if isinstance(error, ValueError) else where,
            expected="a complete image",
            got=error,
            hint="convert it to PNG or JPEG, or download it again",
        ) from error


def example_image() -> Image.Image:
    """The photo that ships with sdconv: 256x256, RGB; ``weights/README.md`` says where it is
    from."""
    return read_image(shipped("photo.jpg")).image


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as ``(1, 3, H, W)`` in [-1, 1], float32; an alpha channel is left out."""
    return pixels_to_tensor(np.asarray(image.convert("RGB")))


def pixels_to_tensor(pixels: np.ndarray[Any, Any]) -> Tensor:
    """Pixels ``(H, W, 3)`` in 8 bits as ``(1, 3, H, W)`` in [-1, 1], float32."""
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_image(x: Tensor) -> Image.Image:
    """The RGB image of ``x``, ``(3, H, W)``, nominally in [-1, 1]; values outside are clamped.

    Raises:
        InputError: it has not three channels, or holds NaN or infinity.
    """
    if x.ndim != 3 or x.shape[0] != 3:
        raise InputError("not an image", expected="(3, H, W)", got=tuple(x.shape))
    x = x.float().cpu()
    if not torch.isfinite(x).all():
        raise InputError(
            "the image has NaN or infinity",
            where="image",
            expected="finite numbers",
            hint="compute in a wider dtype (SDXL's VAE overflows in float16: --dtype float32), "
            "and look at the weights with `sdconv inspect --values`",
        )
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def alpha_of(image: Image.Image) -> Tensor | None:
    """The alpha channel of an image, ``(rows, columns)`` in uint8; None if it has none."""
    if image.mode != "RGBA":
        return None
    return torch.from_numpy(np.array(image.getchannel("A"), dtype=np.uint8))


def with_alpha(image: Image.Image, alpha: Tensor) -> Image.Image:
    """An RGB image with an alpha channel, ``(rows, columns)`` in uint8 and of the same size."""
    result = image.copy()
    result.putalpha(Image.fromarray(alpha.numpy()))
    return result


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images clamped to [-1, 1]: ``10 log10(2^2 / mean
    squared error)``; infinite if they are equal."""
    a, b = (x.detach().double().clamp(-1, 1) for x in (image, reference))
    error = float((a - b).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def side_by_side(
    original: Image.Image, reconstruction: Image.Image, caption: str = "reconstruction"
) -> tuple[Image.Image, int]:
    """Both images and their difference in a row, and the factor that amplifies the difference.

    The difference is the absolute one of each channel: black means equal.

    Args:
        original: the first image, RGB or RGBA.
        reconstruction: the second, of the same size; with an alpha channel if the first has one.
        caption: text above the second.
    """
    colours = (image.convert("RGB") for image in (original, reconstruction))
    a, b = (np.asarray(image, dtype=np.float32) for image in colours)
    difference = np.abs(a - b)
    # amplified as far as 99 of 100 values stay below white
    visible = max(float(np.quantile(difference, 0.99)), 1.0)
    amplification = 2 ** max(0, math.floor(math.log2(255 / visible)))
    shown = np.minimum(difference * amplification, 255).round().astype(np.uint8)
    panels = (
        ("original", original),
        (caption, reconstruction),
        (f"difference x{amplification}", Image.fromarray(shown)),
    )
    # small images are enlarged, so that the captions fit
    zoom = max(1, math.ceil(256 / original.width))
    width, height = original.width * zoom, original.height * zoom
    text, gap = max(16, width // 32), max(4, width // 64)
    strip = text + 2 * gap
    sheet = Image.new(original.mode, (3 * width + 4 * gap, height + strip + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(text)
    for column, (words, image) in enumerate(panels):
        left = gap + column * (width + gap)
        draw.text((left, strip / 2), words, fill="black", font=font, anchor="lm")
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, strip))
    return sheet, amplification


def image_format(path: Path) -> str:
    """Pillow's name for the format of a path's suffix.

    Raises:
        InputError: the suffix is not in ``WRITE_FORMATS``.
    """
    if path.suffix.lower() not in WRITE_FORMATS:
        raise InputError(
            "not the name of an image file",
            where=path,
            expected="a name ending in " + ", ".join(WRITE_FORMATS),
            got=path.suffix or "no suffix",
        )
    return WRITE_FORMATS[path.suffix.lower()]


def write_image(image: Image.Image, path: str | Path) -> None:
    """Writes an image, completely or not at all, in the format of the path's suffix.

    Raises:
        InputError: ``path`` is not a path, or its suffix is not in ``WRITE_FORMATS``.
        CheckpointError: the file cannot be written.
    """
    path = as_path(path)
    form = image_format(path)
    options = {"quality": 95} if form in ("JPEG", "WEBP") else {}
    write_whole(path, lambda part: image.save(part, format=form, **options))


def _as_displayed(image: Image.Image, where: object, alpha: bool = False) -> LoadedImage:
    """The image as a viewer shows it: upright, opaque unless ``alpha`` is kept, RGB or RGBA."""
    notes = []
    if not image.mode.startswith("I") and any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    ):
        notes.append("of 16 bits per channel the upper 8 were taken")
    if getattr(image, "is_animated", False):
        notes.append("the first of several frames was taken")
    if image.mode == "F" or image.mode.startswith("I"):
        deep = np.asarray(image)
        top = 1.0 if image.mode == "F" else 65535
        if not (deep.min() >= 0 and deep.max() <= top):
            raise InputError(
                "grey values out of range",
                where=where,
                expected=f"0 to {top:g} in an image of Pillow's mode {image.mode!r}",
                got=f"{deep.min():g} to {deep.max():g}",
                hint="scale it to 8 bits with another program",
            )
        flat = Image.fromarray(np.round(deep * (255 / top)).astype(np.uint8))
        flat.getexif().update(image.getexif())
        image = flat
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if alpha:
            return LoadedImage(image=image, notes=tuple(notes))
        if np.asarray(image.getchannel("A")).min() < 255:
            notes.append("transparency was blended with white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return LoadedImage(image=image.convert("RGB"), notes=tuple(notes))


def _resized(sides: tuple[int, int], size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Width and height after resizing, as ``LoadedImage.fitted`` takes ``size``."""
    if size is None:
        return sides
    if isinstance(size, tuple):
        return size[1], size[0]
    factor = size / max(sides)
    width, height = (max(1, round(side * factor)) for side in sides)
    return width, height


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
