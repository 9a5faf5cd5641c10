"""Where images come from, and what their headers say."""

from __future__ import annotations

import errno
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
from PIL.PngImagePlugin import PngInfo
from pyarrow import parquet

from sdconv.dataset import headers, plan
from sdconv.dataset.decoding import Decoded, decode
from sdconv.dataset.headers import Header, Rejected, read_header
from sdconv.dataset.placement import parse_sizing
from sdconv.dataset.plan import extended
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


# --- odd folders, tars and lists


def test_links_in_a_circle_are_not_followed_and_others_are(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.png", 1)
    write(tmp_path / "b" / "y.png", 2)
    for link, to in (("a/up", ".."), ("self", "."), ("a/over", "../b"), ("b/over", "../a")):
        (tmp_path / link).symlink_to(to)
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    found = {item.path: item.bytes for item in find_images(tmp_path).items}
    assert set(found) == {"a/x.png", "b/y.png", "a/over/y.png", "b/over/x.png", "gone.png"}
    assert found["gone.png"] == -1


def test_a_member_that_is_there_twice_is_the_last(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{n}.png", n).read_bytes() for n in (1, 2))
    for name, data in (("one", first), ("two", second)):
        tar_of(tmp_path / f"{name}.tar", {"x.png": data})
    whole = (tmp_path / "one.tar").read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    (tmp_path / "both.tar").write_bytes(whole + (tmp_path / "two.tar").read_bytes())
    source = find_images(tmp_path / "both.tar")
    (item,) = source.items
    with open_item(source.root, item.path, item.offset, item.bytes, True) as file:
        assert file.read() == second


def test_keys_stay_below_a_folder_and_are_utf8(tmp_path: Path) -> None:
    image = write(tmp_path / "images" / "x.png", 5).read_bytes()
    tar_of(tmp_path / "a.tar", {"../up.png": image, "/root.png": image, "./here.png": image})
    names = {item.name for item in find_images(tmp_path / "a.tar").items}
    assert names == {"up", "root", "here"}
    (tmp_path / "images" / os.fsdecode(b"\xff.png")).write_bytes(image)
    assert {item.name for item in find_images(tmp_path / "images").items} == {"x", "\\xff"}
    (tmp_path / "lists" / "deep").mkdir(parents=True)
    (tmp_path / "lists" / "deep" / "list.jsonl").write_text('{"path": "../../images/x.png"}')
    (item,) = find_images(tmp_path / "lists" / "deep" / "list.jsonl").items
    assert item.name == "images/x"


@pytest.mark.parametrize("cut", ["in a file", "in a header", "another block"])
def test_a_tar_that_does_not_end_is_refused(cut: str, tmp_path: Path) -> None:
    image = write(tmp_path / "x.png", 5).read_bytes()
    path = tmp_path / "a.tar"
    tar_of(path, {"x.png": image, "y.png": image})
    whole = path.read_bytes()
    second = whole.index(b"y.png")
    if cut == "another block":
        path.write_bytes(whole[:second] + b"\xff" * 512 + whole[second + 512 :])
    else:
        path.write_bytes(whole[: second + (600 if cut == "in a file" else 100)])
    with pytest.raises(SdconvError, match=r"a\.tar: not a tar that can be read"):
        find_images(path)


def test_a_tar_without_its_last_blocks_is_read(tmp_path: Path) -> None:
    image = write(tmp_path / "x.png", 5).read_bytes()
    tar_of(tmp_path / "a.tar", {"x.png": image})
    whole = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "a.tar").write_bytes(whole + b"\0" * (-len(whole) % 512))
    assert len(find_images(tmp_path / "a.tar").items) == 1


def listed(folder: Path, *rows: object) -> list[str]:
    """The names of what a list of these entries has."""
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [item.name for item in find_images(folder / "list.jsonl").items]


def test_an_image_with_several_captions_is_there_once(tmp_path: Path) -> None:
    write(tmp_path / "x.png", 5)
    rows = [{"path": "x.png", "text": text} for text in ("one", "two")]
    assert listed(tmp_path, *rows) == ["x"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"path": "x.png", "key": "k"}, {"path": "y.png", "key": "k"}], "two images have one key"),
        ([{"path": "x.png", "key": "k"}, {"path": "x.png"}], "an image has two keys"),
        ([{"path": "x.png", "key": "../k"}], "this cannot be a key"),
        ([{"path": "x.png", "key": "k/"}], "this cannot be a key"),
        ([{"path": "x.png", "key": ""}], "this cannot be a key"),
        ([{"path": "x.png", "key": "a\nb"}], "this cannot be a key"),
        ([{"path": ".."}], "an entry has no path"),
    ],
)
def test_keys_of_lists_are_unambiguous(rows: list[object], words: str, tmp_path: Path) -> None:
    for name in "xy":
        write(tmp_path / f"{name}.png", 5)
    with pytest.raises(InputError, match=words):
        listed(tmp_path, *rows)


def test_lists_with_odd_bytes(tmp_path: Path) -> None:
    write(tmp_path / "x.png", 5)
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"path": "x.png"}\r\n{"path": "no\\u0000.png"}\n')
    assert {item.name: item.bytes < 0 for item in find_images(path).items} == {
        "x": False,
        "no\0": True,
    }
    path.write_bytes(b'{"path": "\xff.png"}')
    with pytest.raises(InputError, match="line 1: not JSON"):
        find_images(path)
    parquet.write_table(pyarrow.table({"url": ["x.png"]}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match=r"no column has paths(.|\n)*got: url"):
        find_images(tmp_path / "list.parquet")


# --- what a camera, an editor and a network's disk make of images


def test_the_preview_of_a_camera_is_not_an_animation(tmp_path: Path) -> None:
    large, small = (Image.fromarray(pixels(seed, 20, 30)) for seed in (1, 2))
    large.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small])
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("MPO", 2), "the control"
    assert header(tmp_path / "a.jpg") == Header((20, 30), 1, "RGB")
    ((planned,),) = plan(tmp_path, "16").shards
    decoded = decode(tmp_path, planned, True)
    assert isinstance(decoded, Decoded)
    assert decoded.notes == ("the first of several frames was taken",)


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["profile", "xmp", "late xmp", "other text"])
@pytest.mark.parametrize("sides", [(20, 30), (24, 24)])
def test_orientation_in_the_texts_of_a_png(
    kind: str, sides: tuple[int, int], tmp_path: Path
) -> None:
    texts = PngInfo()
    if kind == "profile":
        exif = Image.Exif()
        exif[0x0112] = 6
        data = exif.tobytes()
        texts.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    elif kind == "other text":
        texts.add_text("date:create", "2026-01-01")
    else:
        texts.add_itxt("XML:com.adobe.xmp", XMP)
    path = tmp_path / "a.png"
    Image.fromarray(pixels(1, *sides)).save(path, pnginfo=texts)
    if kind == "late xmp":
        whole = path.read_bytes()
        start, end = whole.index(b"iTXt") - 4, whole.index(b"IDAT") - 4
        last = whole.rindex(b"IEND") - 4
        path.write_bytes(whole[:start] + whole[end:last] + whole[start:end] + whole[last:])
    turned = kind != "other text"
    upright = sides[::-1] if turned else sides
    assert header(path) == Header(upright, 6 if turned else 1, "RGB")
    ((planned,),) = plan(tmp_path, "native").shards
    assert isinstance(decode(tmp_path, planned, True), Decoded)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale"), MemoryError()],
)
def test_what_may_be_over_later_is_not_damage(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the system on reading, put in by hand: the image is looked at again later."""
    write(tmp_path / "a.png", 1)
    write(tmp_path / "b.png", 2)

    def failing(root: Path, path: str, *place: object) -> object:
        if path == "a.png":
            raise error
        return open_item(root, path, *place)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(headers, "open_item", failing)
        first = plan(tmp_path, "16")
    assert [one.reason for one in first.left_out] == ["unreadable"]
    later = extended(first, find_images(tmp_path), parse_sizing("16"), 8, 4)
    assert (later.images, later.left_out) == (2, ())


def test_memory_that_is_short_at_decoding_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png", 1)
    ((planned,),) = plan(tmp_path, "16").shards

    def failing(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", failing)
    found = decode(tmp_path, planned, True)
    assert isinstance(found, Rejected)
    assert found.reason == "unreadable"


def test_an_invalid_seek_is_damage() -> None:
    error = InputError("damaged")
    for cause, reason in ((OSError(errno.EINVAL, "x"), "damaged"), (OSError("cut"), "damaged")):
        error.__cause__ = cause
        assert headers.rejection(error).reason == reason
