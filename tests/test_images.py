"""Images of every kind become RGB in [-1, 1]; damaged ones raise an error."""

from __future__ import annotations

import math
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sdconv
from sdconv.images import (
    LoadedImage,
    psnr,
    read_image,
    side_by_side,
    to_image,
    to_tensor,
    write_image,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def colours(width: int = 16, height: int = 16) -> Image.Image:
    """An image in which every pixel differs from its neighbours."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([x * 15 % 256, y * 15 % 256, (x + y) * 7 % 256], -1).astype("uint8")
    )


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def pixels(loaded: LoadedImage) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert loaded.image.mode == "RGB"
    return np.asarray(loaded.image)


def test_tensors_and_back_are_exact() -> None:
    image = colours()
    x = to_tensor(image)
    assert x.shape == (1, 3, 16, 16)
    assert (x.min(), x.max()) == (-1, pytest.approx(225 / 127.5 - 1))
    assert np.array_equal(np.asarray(to_image(x[0])), np.asarray(image))
    assert to_tensor(Image.new("RGB", (1, 1), "white")).flatten().tolist() == [1, 1, 1]


def test_values_outside_are_clamped_and_nan_is_an_error() -> None:
    x = torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1)
    assert to_image(x).getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(sdconv.InputError, match="NaN"):
        to_image(x * math.nan)
    with pytest.raises(sdconv.InputError, match="not an image"):
        to_image(x[:2])


GREY = {
    "8 bits": ("L", RAMP, "png"),
    "16 bits": ("I;16", RAMP.astype(np.uint16) * 257, "png"),
    "16 bits, TIFF": ("I;16", RAMP.astype(np.uint16) * 257, "tif"),
    "floats": ("F", RAMP.astype(np.float32) / 255, "tif"),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey(kind: str, tmp_path: Path) -> None:
    _, values, suffix = GREY[kind]
    path = saved(Image.fromarray(values), tmp_path / f"grey.{suffix}")
    assert np.array_equal(pixels(read_image(path)), np.repeat(RAMP[..., None], 3, -1))


def test_black_and_white(tmp_path: Path) -> None:
    path = saved(Image.fromarray(RAMP > 100), tmp_path / "bw.png")
    assert np.array_equal(pixels(read_image(path))[..., 0] == 255, RAMP > 100)


def test_palette_cmyk_and_jpeg(tmp_path: Path) -> None:
    image = colours()
    palette = saved(image.quantize(256), tmp_path / "p.png")
    assert np.array_equal(
        pixels(read_image(palette)), np.asarray(image.quantize(256).convert("RGB"))
    )
    cmyk = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "c.jpg", quality=100)
    assert np.abs(pixels(read_image(cmyk)).astype(int) - [255, 0, 0]).max() <= 2


def test_colours_of_16_bits_are_cut_and_a_note_says_so(tmp_path: Path) -> None:
    """Pillow reads such files, but does not write them."""
    deep = np.random.default_rng(0).integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    read = read_image(tmp_path / "a.png")
    assert np.array_equal(pixels(read), (deep >> 8).astype(np.uint8))
    assert read.notes == ("of 16 bits per channel the upper 8 were taken",)
    assert read_image(saved(colours(), tmp_path / "b.png")).notes == (), "the control"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_blended_with_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image = image.quantize(4) if mode == "PA" else image.convert(mode)
    read = read_image(saved(image, tmp_path / "a.png"))
    assert read.image.getpixel((0, 0)) == (0, 0, 0)
    assert read.image.getpixel((7, 0)) == (255, 255, 255)
    assert any("white" in note for note in read.notes)


def test_opaque_alpha_leaves_no_note(tmp_path: Path) -> None:
    path = saved(colours().convert("RGBA"), tmp_path / "a.png")
    assert read_image(path).notes == ()
    assert np.array_equal(pixels(read_image(path)), np.asarray(colours()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(colours(16, 24), tmp_path / "o.png", exif=exif)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: np.rot90(a),
    }
    expected = turned[orientation](np.asarray(colours(16, 24)))
    assert np.array_equal(pixels(read_image(path)), expected)


def test_orientation_of_16_bit_grey(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(RAMP.astype(np.uint16) * 257), tmp_path / "o.png", exif=exif)
    assert np.array_equal(pixels(read_image(path))[..., 0], np.rot90(RAMP, -1))


def test_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    read = read_image(path)
    assert read.image.getpixel((0, 0)) == (255, 0, 0)
    assert any("frames" in note for note in read.notes)


@settings(max_examples=40)
@given(width=st.integers(1, 70), height=st.integers(1, 70), multiple=st.sampled_from([1, 4, 8, 16]))
def test_cropped_around_the_centre(width: int, height: int, multiple: int) -> None:
    loaded = LoadedImage(image=colours(width, height))
    if min(width, height) < multiple:
        with pytest.raises(sdconv.InputError, match="too small"):
            loaded.fitted(multiple)
        return
    fitted = loaded.fitted(multiple)
    w, h = fitted.image.size
    assert w % multiple == h % multiple == 0
    assert 0 <= width - w < multiple
    assert 0 <= height - h < multiple
    left, top = (width - w) // 2, (height - h) // 2
    assert np.array_equal(
        np.asarray(fitted.image), np.asarray(loaded.image)[top : top + h, left : left + w]
    )
    assert bool(fitted.notes) == ((w, h) != (width, height))


@pytest.mark.parametrize(("size", "sides"), [(32, (32, 16)), (16, (16, 8)), (64, (64, 32))])
def test_resized_to_the_longer_side(size: int, sides: tuple[int, int]) -> None:
    assert LoadedImage(image=colours(32, 16)).fitted(8, size).image.size == sides


def test_no_larger_than_files_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 24)
    assert LoadedImage(image=colours(32, 16)).fitted(8, 48).image.size == (48, 24)
    with pytest.raises(sdconv.InputError, match=r"too large(.|\n)*64x32"):
        LoadedImage(image=colours(32, 16)).fitted(8, 64)


def test_psnr() -> None:
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a) == math.inf
    assert psnr(a + 0.2, a) == pytest.approx(20.0)  # 10 log10(4 / 0.04)
    assert psnr(a + 7, a + 1) == math.inf  # both clamped to 1


def test_side_by_side() -> None:
    original = colours(300, 200)
    near = Image.fromarray(np.asarray(original) // 2 * 2)
    sheet, amplification = side_by_side(original, near)
    assert sheet.width > 900
    assert sheet.height > 200
    assert amplification == 128  # differences of at most 1, amplified as far as white
    _, equal = side_by_side(original, original)
    assert equal == 128
    far, once = side_by_side(original, Image.eval(original, lambda value: 255 - value))
    assert once == 1
    assert far.size == sheet.size


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "PNG"])
def test_written_and_read_again(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"deeper/a.{suffix}"
    write_image(colours(), path)
    assert read_image(path).image.size == (16, 16)
    assert list(path.parent.iterdir()) == [path]
    write_image(read_image(str(path)).image, str(path))
    assert list(path.parent.iterdir()) == [path]


def test_a_suffix_of_no_image_format(tmp_path: Path) -> None:
    with pytest.raises(sdconv.InputError, match="not the name of an image file"):
        write_image(colours(), tmp_path / "a.txt")


def encoded(form: str) -> bytes:
    buffer = BytesIO()
    colours().save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (encoded("PNG")[:60], "damaged"),
        (encoded("JPEG")[:300], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_not_an_image(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(sdconv.InputError, match=words):
        read_image(path)


@pytest.mark.parametrize("side", [10_000, 20_000])  # where Pillow warns, and where it raises
def test_decompression_bombs(side: int, tmp_path: Path) -> None:
    start = b"IHDR" + side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    path = tmp_path / "bomb.png"
    content = encoded("PNG")
    path.write_bytes(content[:12] + start + zlib.crc32(start).to_bytes(4) + content[33:])
    with pytest.raises(sdconv.InputError, match="the image is too large") as raised:
        read_image(path)
    assert f"got: Image size ({side * side} pixels)\n" in str(raised.value)


def test_paths_without_an_image(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(sdconv.InputError):
            read_image(path)
    for none in (None, 3, "", b"a.png"):
        with pytest.raises(sdconv.InputError, match="not a path"):
            read_image(none)  # type: ignore[arg-type]
        with pytest.raises(sdconv.InputError, match="not a path"):
            write_image(colours(), none)  # type: ignore[arg-type]


def test_grey_values_out_of_range(tmp_path: Path) -> None:
    path = saved(Image.fromarray(RAMP.astype(np.float32)), tmp_path / "f.tif")
    with pytest.raises(sdconv.InputError, match="out of range"):
        read_image(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), form=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"]))
def test_damaged_files_raise_one_type_of_error(
    data: st.DataObject, form: str, tmp_path: Path
) -> None:
    content = bytearray(encoded(form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert read_image(path).image.mode == "RGB"
    except sdconv.InputError:
        pass
