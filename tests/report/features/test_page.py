"""The page as a file: whole, by itself, within its size."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made import CHANNELS, DRAWING, PICTURE, maps_of, page, values
from PIL import Image

from sdconv.errors import CheckpointError, InputError
from sdconv.report.features.drawing import Arm, Block, drawn
from sdconv.report.features.views import FeatureMap, Shot


def block(text: str, name: str) -> Any:
    """What a data block holds."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text)
    assert found, name
    return json.loads(found[1])


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(text))).convert("L"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page(path, maps_of(), picture=PICTURE)
    return path


def test_it_says_what_it_wrote(tmp_path: Path) -> None:
    told = page(tmp_path / "a.html", maps_of())
    assert (told.maps, told.shots, told.thumbnail) == (len(CHANNELS), 8 * len(CHANNELS), None)
    assert told.bytes == (tmp_path / "a.html").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_it_names_nothing_outside_itself(written: Path) -> None:
    text = written.read_text("utf-8")
    addresses = set(re.findall(r"\w+://[^\s\"'`<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)[^\"]", text)
    assert "default-src 'none'" in text


def test_its_thumbnails_are_the_maps(written: Path) -> None:
    text = written.read_text("utf-8")
    index = block(text, "index")
    at = [listed["name"] for listed in index["maps"]].index("down.0")
    shot = index["maps"][at]["shots"][5]
    assert (shot["step"], shot["timestep"], shot["half"]) == (2, 301, "unconditional")
    data = block(text, shot["id"])
    mean, variance, low, high = np.frombuffer(b64decode(data["numbers"]), "<f4").reshape(4, -1)
    maps = values("down.0", 2, "unconditional")
    assert mean == pytest.approx(maps.mean((1, 2)), rel=1e-4)
    assert variance == pytest.approx(maps.var((1, 2)), rel=1e-4)
    row, column = divmod(7, data["columns"])
    tile = decoded(data["sheet"])[16 * row :, 16 * column :][:16, :16]
    back = low[7] + (high[7] - low[7]) * tile / 255
    assert np.abs(back - maps[7].clip(low[7], high[7])).max() <= (high[7] - low[7]) / 250


def test_names_cannot_end_its_script(tmp_path: Path) -> None:
    name = "x</script><script>alert(1)</script>"
    one = FeatureMap(
        name=name,
        block=name,
        shots=[Shot(read=lambda: np.ones((2, 4, 4), np.float32), shape=(2, 4, 4))],
        facts={"<b>": "<i>"},
    )
    drawing = drawn([Block(name=name, kind="conv", arm=Arm.base, level=0)])
    page(tmp_path / "a.html", [one], drawing, title="<!--")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "alert(1)</script>" not in text
    assert block(text, "index")["maps"][0]["name"] == name


def test_it_keeps_within_its_size(tmp_path: Path) -> None:
    def noise() -> np.ndarray:
        return np.random.default_rng(0).standard_normal((300, 64, 64)).astype(np.float32)

    maps = [
        FeatureMap(name=name, block=name, shots=[Shot(read=noise, shape=(300, 64, 64))])
        for name in ("conv_in", "down.0", "mid")
    ]
    free = page(tmp_path / "free.html", maps)
    assert free.thumbnail is None
    tight = page(tmp_path / "tight.html", maps, limit=700_000)
    assert tight.bytes <= 700_000 < free.bytes
    assert tight.thumbnail is not None and tight.thumbnail < 64
    with pytest.raises(InputError, match="too many maps for one page"):
        page(tmp_path / "none.html", maps, limit=130_000)
    assert not (tmp_path / "none.html").exists()


def test_not_finite_values_are_told(tmp_path: Path) -> None:
    def broken() -> np.ndarray:
        maps = np.ones((3, 4, 4), np.float32)
        maps[1, 0, :2] = np.nan, np.inf
        return maps

    maps = [FeatureMap(name="mid", block="mid", shots=[Shot(read=broken, shape=(3, 4, 4))])]
    page(tmp_path / "a.html", maps)
    assert block((tmp_path / "a.html").read_text(), "index")["maps"][0]["shots"][0]["bad"] == 2


def test_no_map_makes_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no map"):
        page(tmp_path / "a.html", [])


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        page(tmp_path / "file" / "a.html", maps_of(steps=False))

    def failing() -> np.ndarray:
        raise OSError(28, "No space left on device")

    shot = Shot(read=failing, shape=(1, 2, 2))
    with pytest.raises(CheckpointError, match="No space left"):
        page(tmp_path / "b.html", [FeatureMap(name="mid", block="mid", shots=[shot])], DRAWING)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    maps = maps_of(steps=False)
    page(tmp_path / "a.html", maps, progress=lambda *now: told.append(now))
    assert [name for name, _, _ in told[:-1]] == [one.name for one in maps]
    assert told[-1][1:] == (len(maps), len(maps))
