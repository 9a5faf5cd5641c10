"""Where images come from, and what their headers say."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import pyarrow
import pytest
from helpers.photos import BAD, photos, pixels, spoil, write
from PIL import Image
from pyarrow import parquet

from sdconv.dataset.headers import Header, Rejected, read_header
from sdconv.dataset.sources import Item, find_images, open_item
from sdconv.errors import InputError, SdconvError


def header(path: Path) -> Header | Rejected:
    (item,) = [one for one in find_images(path.parent).items if one.path == path.name]
    return read_header(path.parent, item)


def test_a_folder_is_searched_and_sorted(folder: Path) -> None:
    (folder / "caption.txt").write_text("a cat")
    write(folder / ".hidden" / "a.png", 1)
    write(folder / ".b.png", 1)
    items = find_images(folder).items
    assert len(items) == 9
    assert [item.path for item in items] == sorted(item.path for item in items)
    assert items[0].name == "cats/photo01"
    assert items[0].bytes == (folder / "cats/photo01.jpg").stat().st_size


def test_the_output_is_not_searched(folder: Path) -> None:
    write(folder / "out" / "a.png", 1)
    assert len(find_images(folder, skip=folder / "out").items) == 9
    assert len(find_images(folder).items) == 10, "the control"


def tar_of(path: Path, files: dict[str, bytes]) -> None:
    import io

    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", ["{a,b}.tar", "", "a.tar"])
def test_tars(form: str, tmp_path: Path) -> None:
    image = write(tmp_path / "images" / "x.png", 5).read_bytes()
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in "ab":
        tar_of(shards / f"{name}.tar", {f"{name}01.cls": b"7", f"{name}01.png": image})
    source = find_images(str(shards / form) if form else shards)
    names = ["a01"] if form == "a.tar" else ["a01", "b01"]
    assert [item.name for item in source.items] == names
    for item in source.items:
        with open_item(source.root, item.path, item.offset, item.bytes, True) as file:
            assert file.read() == image
        assert read_header(source.root, item) == Header((20, 24), 1, "RGB")


def test_lists(tmp_path: Path) -> None:
    write(tmp_path / "images" / "x.png", 5)
    rows = [{"path": "images/x.png", "key": None}, {"path": "images/gone.png", "key": "other"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows])) + "\n\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    found = [find_images(tmp_path / f"list.{kind}").items for kind in ("jsonl", "parquet")]
    assert found[0] == found[1]
    by_name = {item.name: item for item in found[0]}
    assert set(by_name) == {"images/x", "other"}
    gone = read_header(tmp_path, by_name["other"])
    assert isinstance(gone, Rejected)
    assert gone.reason == "missing"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.jsonl", "{", "list.jsonl, line 1: not JSON"),
        ("list.jsonl", '{"url": "x"}', "entry 1: an entry has no path"),
        ("list.csv", "path", "not a source of images"),
        ("list.parquet", "path", "not a parquet file"),
        ("a.tar", "no tar", "not a tar that can be read"),
    ],
)
def test_what_is_not_a_source(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SdconvError, match=words):
        find_images(tmp_path / name)


def test_no_images_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no images"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        find_images(tmp_path / "nowhere")


# --- headers


def test_headers_of_planted_images(tmp_path: Path) -> None:
    spoil(photos(tmp_path, 2))
    reasons = {}
    for item in find_images(tmp_path).items:
        found = read_header(tmp_path, item)
        if isinstance(found, Rejected):
            reasons[item.path] = found.reason
    # half an image has a whole header: it is found later
    assert reasons == {name: reason for name, reason in BAD.items() if reason != "damaged"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_size_is_that_of_the_upright_image(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(pixels(1, 20, 30))
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    assert header(tmp_path / f"a.{suffix}") == Header((30, 20), 6, "RGB")


def test_exif_behind_the_pixels_of_a_png_is_found(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(pixels(1, 20, 30)).save(path)
    data = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    whole = path.read_bytes()
    end = whole.rindex(b"IEND") - 4
    path.write_bytes(whole[:end] + chunk + whole[end:])
    assert header(path) == Header((30, 20), 6, "RGB")


def test_an_image_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 480)
    path = write(tmp_path / "a.png", 1, 20, 24)
    assert header(path) == Header((20, 24), 1, "RGB")
    found = header(write(tmp_path / "b.png", 1, 20, 25))
    assert isinstance(found, Rejected)
    assert found.reason == "too large"


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 1)
    if os.geteuid() == 0:  # whom nothing stops: a folder in the file's place
        item = Item("a", "a.png", None, 0, 5, 0)
        path.unlink()
        path.mkdir()
        found = read_header(tmp_path, item)
    else:
        path.chmod(0)
        found = header(path)
    assert isinstance(found, Rejected)
    assert found.reason == "unreadable"
