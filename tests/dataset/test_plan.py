"""Plans: from headers alone, always the same, and extended by what is new."""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
from pathlib import Path

import pytest
from helpers.photos import photos, write
from PIL import Image

from sdconv.dataset import Plan, plan
from sdconv.dataset.placement import parse_sizing
from sdconv.dataset.plan import Planned, extended, shard_digest
from sdconv.dataset.sources import find_images
from sdconv.errors import InputError, SdconvError


def keys(found: Plan) -> list[list[str]]:
    return [[one.key for one in shard] for shard in found.shards]


def again(old: Plan, folder: Path, contents: dict[str, str | None], **how: bool) -> Plan:
    """The plan extended by what is in the folder now."""
    source = find_images(folder)
    return extended(old, source, parse_sizing("16"), 8, 4, lambda: contents, **how)


def test_shards_are_cut_from_sorted_images(folder: Path) -> None:
    found = plan(folder, "16", shard_size=4)
    flat = [key for shard in keys(found) for key in shard]
    assert flat == sorted(flat)
    assert [len(shard) for shard in found.shards] == [4, 4, 1]
    assert found == plan(folder, "16", shard_size=4)
    one = found.shards[0][0]
    assert (one.key, one.path, one.original) == ("cats/photo01", "cats/photo01.jpg", (19, 21))
    assert (one.resized, one.crop, one.size) == ((16, 18), (0, 1), (16, 16))


def test_a_shard_has_images_of_one_bucket(tmp_path: Path) -> None:
    for number, sides in enumerate([(30, 30), (20, 30), (30, 30), (30, 20)]):
        write(tmp_path / f"{number}.png", number, *sides)
    found = plan(tmp_path, "buckets:128")
    assert keys(found) == [["1"], ["0", "2"], ["3"]]
    assert keys(plan(tmp_path, "native")) == [["1", "3", "0", "2"]]


def test_a_plan_is_read_as_it_was_written(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    found = plan(folder, "16", shard_size=4)
    path = folder / "plan.jsonl"
    path.write_text("".join(found.lines()))
    assert Plan.read(path) == found
    path.write_text("{}\n")
    with pytest.raises(SdconvError, match=r"plan.jsonl: the plan cannot be read"):
        Plan.read(path)


def test_images_of_one_name_get_keys_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 1)
    first = plan(tmp_path, "16")
    write(tmp_path / "a.bmp", 2)
    write(tmp_path / "a.v2.png", 3)
    assert keys(plan(tmp_path, "16")) == [["a", "a.png", "a.v2"]]
    # the key of a planned image does not change
    later = again(first, tmp_path, {})
    assert keys(later) == [["a"], ["a.bmp", "a.v2"]]
    assert later.shards[0][0].path == "a.png"


def test_new_images_make_new_shards(folder: Path) -> None:
    first = plan(folder, "16", shard_size=4)
    photos(folder, 2, start=20)
    later = again(first, folder, {})
    assert later.shards[:3] == first.shards
    assert keys(later)[3:] == [["cats/photo21", "photo20"]]
    assert later.new == 2


def content_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_touched_image_is_the_same_and_a_changed_one_another(folder: Path) -> None:
    first = plan(folder, "16", shard_size=4)
    contents: dict[str, str | None] = {
        one.key: content_of(folder / one.path) for shard in first.shards for one in shard
    }
    assert again(first, folder, contents) == first
    digests = [shard_digest(shard) for shard in first.shards]
    touched = folder / "photo00.png"
    os.utime(touched, (2e9, 2e9))
    later = again(first, folder, contents)
    assert [shard_digest(shard) for shard in later.shards] == digests
    assert (later.changed, later.new) == (0, 0)
    write(touched, 77, 18, 20)
    os.utime(touched, (2e9, 2e9))
    later = again(first, folder, contents)
    assert later.changed == 1
    changed = [digest != shard_digest(later.shards[n]) for n, digest in enumerate(digests)]
    assert changed == ["photo00" in shard for shard in keys(first)]
    (one,) = [one for shard in later.shards for one in shard if one.key == "photo00"]
    assert one.revision == 1


def test_a_change_that_keeps_length_and_date_is_found_by_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bmp", 1)
    first = plan(tmp_path, "16")
    contents: dict[str, str | None] = {"a": content_of(path)}
    write(path, 2)
    assert again(first, tmp_path, contents).changed == 0
    assert again(first, tmp_path, contents, rehash=True).changed == 1


def test_an_image_that_changes_its_bucket_moves_to_a_new_shard(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.png", number, 30, 30)
    sizing = parse_sizing("buckets:128")
    first = plan(tmp_path, "buckets:128")
    write(tmp_path / "1.png", 9, 20, 40)
    later = extended(first, find_images(tmp_path), sizing, 8, 4, lambda: {"1": "other"})
    assert keys(later) == [["0", "2"], ["1"]]


def test_images_that_are_gone_stay_unless_they_are_pruned(folder: Path) -> None:
    first = plan(folder, "16", shard_size=4)
    (folder / "photo08.jpg").unlink()
    later = again(first, folder, {})
    assert (later.missing, later) == (("photo08",), first)
    pruned = again(first, folder, {}, prune=True)
    assert keys(pruned) == [*keys(first)[:2], []]


def test_another_source_is_refused(folder: Path, tmp_path: Path) -> None:
    other = photos(tmp_path / "other", 3, start=50)
    with pytest.raises(InputError, match="this is another source"):
        again(plan(folder, "16"), other, {})


def test_what_was_left_out_is_looked_at_again_when_it_changes(tmp_path: Path) -> None:
    photos(tmp_path, 1)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    first = plan(tmp_path, "16")
    assert [one.key for one in first.left_out] == ["bad"]
    assert again(first, tmp_path, {}) == first
    write(bad, 1)
    later = again(first, tmp_path, {})
    assert (keys(later), later.left_out) == ([["photo00"], ["bad"]], ())


def test_digests_differ_where_samples_do(folder: Path) -> None:
    one, other = plan(folder, "16").shards[0][:2]
    assert one.digest != other.digest
    moved = Planned(**{**vars(one), "offset": 5, "mtime_ns": 7, "bytes": 9})
    assert moved.digest == one.digest


def test_a_shard_needs_room(folder: Path) -> None:
    with pytest.raises(InputError, match="shard_size: not a size"):
        plan(folder, "16", shard_size=0)


def test_keys_are_found_for_names_that_are_all_taken(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.bmp.jpg"):
        write(tmp_path / name, 1)
    first = plan(tmp_path, "16")
    assert keys(first) == [["a", "a.bmp"]]
    write(tmp_path / "a.bmp", 2)
    assert keys(again(first, tmp_path, {})) == [["a", "a.bmp"], ["a.bmp.2"]]


def test_filters_of_warnings_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads are held within Pillow at once; the one that came in last leaves last."""
    photos(tmp_path, 9)
    second, openings, lock = threading.Event(), itertools.count(), threading.Lock()
    opened = Image.open

    def held(*arguments: object, **options: object) -> object:
        with lock:
            number = next(openings)
        if number == 0:
            second.wait(10)
        elif number == 1:
            second.set()
            time.sleep(0.2)
        return opened(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", held)
    before = list(warnings.filters)
    assert plan(tmp_path, "16").images == 9
    assert warnings.filters == before
