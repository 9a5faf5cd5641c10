"""The page as a file: complete, self-contained, within its size limit."""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made import DRAWING, IMAGE, maps_of, page, values
from PIL import Image

from sdconv.errors import CheckpointError, InputError
from sdconv.report.features.drawing import Box, Branch, lay_out
from sdconv.report.features.feature_maps import FeatureMap, Snapshot


def block(text: str, name: str) -> Any:
    """The content of a data block."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text)
    assert found, name
    return json.loads(found[1])


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(text))).convert("L"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page(path, maps_of(), image=IMAGE)
    return path


def without_the_largest() -> list[FeatureMap]:
    """Feature maps that are written in little time."""
    return [one for one in maps_of() if one.name != "mid"]


def test_the_result_describes_the_page(tmp_path: Path) -> None:
    maps = without_the_largest()
    written = page(tmp_path / "a.html", maps)
    assert (written.maps, written.snapshots) == (len(maps), 8 * len(maps))
    assert written.thumbnail is None
    assert written.bytes == (tmp_path / "a.html").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_it_refers_to_nothing_outside_itself(written: Path) -> None:
    text = written.read_text("utf-8")
    addresses = set(re.findall(r"\w+://[^\s\"'`<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)[^\"]", text)
    assert "default-src 'none'" in text


def test_thumbnails_and_numbers_match_the_feature_maps(written: Path) -> None:
    text = written.read_text("utf-8")
    index = block(text, "index")
    at = [listed["name"] for listed in index["maps"]].index("down.0")
    snapshot = index["maps"][at]["snapshots"][5]
    assert (snapshot["step"], snapshot["timestep"], snapshot["half"]) == (2, 301, "unconditional")
    data = block(text, snapshot["id"])
    numbers = np.frombuffer(b64decode(data["numbers"]), "<f4").reshape(6, -1)
    mean, variance, low, high, least, most = numbers
    maps = values("down.0", 2, "unconditional")
    assert mean == pytest.approx(maps.mean((1, 2)), rel=1e-4)
    assert variance == pytest.approx(maps.var((1, 2)), rel=1e-4)
    assert (least == maps.min((1, 2))).all() and (most == maps.max((1, 2))).all()
    assert (least < low).all() and (most > high).all()  # half a percent is clipped at either end
    row, column = divmod(7, data["columns"])
    tile = decoded(data["sheet"])[16 * row :, 16 * column :][:16, :16]
    back = low[7] + (high[7] - low[7]) * tile / 255
    assert np.abs(back - maps[7].clip(low[7], high[7])).max() <= (high[7] - low[7]) / 250


def test_exact_values_of_the_channels_with_the_largest_variance(written: Path) -> None:
    text = written.read_text("utf-8")
    listed = next(one for one in block(text, "index")["maps"] if one["name"] == "down.0")
    snapshot = listed["snapshots"][5]
    maps = values("down.0", 2, "unconditional")
    expected = np.argsort(-maps.var((1, 2)), kind="stable")[:16]
    assert snapshot["exact"] == expected.tolist()
    data = block(text, snapshot["id"].replace("snapshot", "exact"))
    assert list(map(int, data)) == snapshot["exact"]
    for channel in expected.tolist():
        shuffled = np.frombuffer(zlib.decompress(b64decode(data[str(channel)])), np.uint8)
        halves = shuffled.reshape(2, -1).T.copy().view("<f2").reshape(16, 16)
        assert (halves == maps[channel].astype(np.float16)).all()


def test_exact_values_that_are_too_large_for_float16_are_in_float32(tmp_path: Path) -> None:
    x = np.stack([np.linspace(0, most, 16).reshape(4, 4) for most in (65504, 7e4)])
    x = x.astype(np.float32)
    shot = Snapshot(read=lambda: x, shape=(2, 4, 4))
    page(tmp_path / "a.html", [FeatureMap(name="mid", box="mid", snapshots=[shot])])
    data = block((tmp_path / "a.html").read_text("utf-8"), "exact-0")
    assert [data[str(channel)].startswith("float32:") for channel in (0, 1)] == [False, True]
    text = data["1"].removeprefix("float32:")
    shuffled = np.frombuffer(zlib.decompress(b64decode(text)), np.uint8)
    assert (shuffled.reshape(4, -1).T.copy().view("<f4").ravel() == x[1].ravel()).all()


def test_fewer_exact_values_and_none(tmp_path: Path) -> None:
    for detailed in (0, 3):
        page(tmp_path / "a.html", maps_of(steps=False), detailed=detailed)
        for one in block((tmp_path / "a.html").read_text("utf-8"), "index")["maps"]:
            assert len(one["snapshots"][0]["exact"]) == detailed


def test_signed_feature_maps_are_marked(tmp_path: Path) -> None:
    signed = {"mid": -1.0, "down.0": 0.0, "down.1": 2.0}
    maps = []
    for name, low in signed.items():
        x = np.linspace(low, 3, 2 * 64, dtype=np.float32).reshape(2, 8, 8)
        shot = Snapshot(read=lambda x=x: x, shape=(2, 8, 8))  # type: ignore[misc]
        maps.append(FeatureMap(name=name, box=name, snapshots=[shot]))
    page(tmp_path / "a.html", maps)
    listed = block((tmp_path / "a.html").read_text("utf-8"), "index")["maps"]
    assert [one["snapshots"][0]["signed"] for one in listed] == [True, False, False]


@pytest.mark.slow
def test_a_unets_page_opens_on_a_late_step_of_its_up_path(tmp_path: Path) -> None:
    page(tmp_path / "a.html", without_the_largest())
    index = block((tmp_path / "a.html").read_text("utf-8"), "index")
    assert index["maps"][index["start"]["map"]]["name"] == "up.1"
    assert index["start"]["step"] == 3
    without = lay_out(list(DRAWING.boxes))  # no skips: not a U-Net
    page(tmp_path / "b.html", without_the_largest(), without)
    index = block((tmp_path / "b.html").read_text("utf-8"), "index")
    assert index["start"] == {"map": 0, "step": 0}


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (("down.0", "up.1:silu1", "up.1:silu2", "conv_out"), "up.1:silu2"),
        (("down.0", "up.0", "up.1:silu1", "up.1:silu2"), "up.0"),  # a whole block comes first
        (("conv_in", "down.0"), "conv_in"),
    ],
)
def test_a_unets_page_opens_on_a_late_step_of_what_was_captured(
    names: tuple[str, ...], start: str, tmp_path: Path
) -> None:
    (one,) = (one for one in maps_of() if one.name == "conv_in")
    maps = [replace(one, name=name, box=name.partition(":")[0]) for name in names]
    page(tmp_path / "a.html", maps)
    index = block((tmp_path / "a.html").read_text("utf-8"), "index")
    assert (names[index["start"]["map"]], index["start"]["step"]) == (start, 3)


def test_names_cannot_close_the_script_element(tmp_path: Path) -> None:
    name = "x</script><script>alert(1)</script>"
    one = FeatureMap(
        name=name,
        box=name,
        snapshots=[Snapshot(read=lambda: np.ones((2, 4, 4), np.float32), shape=(2, 4, 4))],
        facts={"<b>": "<i>"},
    )
    drawing = lay_out([Box(name=name, kind="conv", branch=Branch.mid, level=0)])
    page(tmp_path / "a.html", [one], drawing, title="<!--")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "alert(1)</script>" not in text
    assert block(text, "index")["maps"][0]["name"] == name


@pytest.mark.slow
def test_it_stays_within_the_size_limit(tmp_path: Path) -> None:
    def noise() -> np.ndarray:
        return np.random.default_rng(0).standard_normal((300, 64, 64)).astype(np.float32)

    maps = [
        FeatureMap(name=name, box=name, snapshots=[Snapshot(read=noise, shape=(300, 64, 64))])
        for name in ("conv_in", "down.0", "mid")
    ]
    free = page(tmp_path / "free.html", maps)
    assert free.thumbnail is None
    tight = page(tmp_path / "tight.html", maps, limit=700_000)
    assert tight.bytes <= 700_000 < free.bytes
    assert tight.thumbnail is not None and tight.thumbnail < 64
    with pytest.raises(InputError, match="too many feature maps for one page"):
        page(tmp_path / "none.html", maps, limit=130_000)
    assert not (tmp_path / "none.html").exists()


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    def broken() -> np.ndarray:
        maps = np.ones((3, 4, 4), np.float32)
        maps[1, 0, :2] = np.nan, np.inf
        return maps

    snapshot = Snapshot(read=broken, shape=(3, 4, 4))
    page(tmp_path / "a.html", [FeatureMap(name="mid", box="mid", snapshots=[snapshot])])
    (listed,) = block((tmp_path / "a.html").read_text(), "index")["maps"]
    assert listed["snapshots"][0]["notFinite"] == 2


def test_a_page_without_feature_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no feature map"):
        page(tmp_path / "a.html", [])


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        page(tmp_path / "file" / "a.html", maps_of(steps=False))

    def failing() -> np.ndarray:
        raise OSError(28, "No space left on device")

    maps = [FeatureMap(name="mid", box="mid", snapshots=[Snapshot(read=failing, shape=(1, 2, 2))])]
    with pytest.raises(CheckpointError, match="No space left"):
        page(tmp_path / "b.html", maps, DRAWING)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_progress_is_reported(tmp_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    maps = maps_of(steps=False)
    page(tmp_path / "a.html", maps, progress=lambda *now: reported.append(now))
    assert [name for name, _, _ in reported[:-1]] == [one.name for one in maps]
    assert reported[-1][1:] == (len(maps), len(maps))
