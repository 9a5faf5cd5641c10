"""The table of variants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.slow import first_of

from sdconv.errors import InputError, MissingFileError
from sdconv.fast.cuda import choices, upsample


def test_every_operation_has_a_choice() -> None:
    assert choices.SHIPPED.keys() >= choices.VARIANTS.keys()
    for key, variant in choices.SHIPPED.items():
        assert variant in choices.VARIANTS[key.split()[0]]
    assert upsample.VARIANTS.keys() == set(choices.VARIANTS["upsample"])
    assert choices.current() == choices.SHIPPED


def test_classes_of_shapes() -> None:
    assert choices.shape_class(512, 64 * 64) == "512ch 64px"
    assert choices.shape_class(320, 64 * 65) == "512ch 128px"
    assert choices.shape_class(1280, 4096 * 4096) == ">1024ch >2048px"


def test_a_class_goes_before_the_operation() -> None:
    with choices.using({"upsample": "direct", "upsample 512ch 64px": "transposed"}):
        assert choices.choose("upsample", 512, 4096) == "transposed"
        assert choices.choose("upsample", 512, 4097) == "direct"
        with choices.using({"upsample": "subpixel"}):
            assert choices.choose("upsample", 512, 4096) == "transposed"
            assert choices.choose("upsample", 512, 4097) == "subpixel"
    assert choices.current() == choices.SHIPPED


def test_written_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    choices.write(path, {"tiling 128ch 1024px": "4096 values, 8 warps"})
    with choices.using({}):  # restores what `load` sets
        choices.load(path)
        assert choices.tiling(128, 2**20) == choices.Tiling(4096, 8)
        assert choices.tiling(128, 2**20 + 1) == choices.Tiling(2048, 4)
    assert choices.current() == choices.SHIPPED


@pytest.mark.slow
@pytest.mark.parametrize("known", first_of([True, False]))
def test_named_by_the_environment(known: bool, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    if known:
        choices.write(path, {"attention": "plain"})
    code = "from sdconv.fast.cuda import choices; print(choices.choose('attention', 512, 4096))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, choices.ENVIRONMENT: str(path)},
        capture_output=True,
        text=True,
    )
    if known:
        assert ran.stdout.strip() == "plain"
    else:
        assert "MissingFileError" in ran.stderr and choices.ENVIRONMENT in ran.stderr


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"upsampling": "direct"}, "unknown operation"),
        ({"upsample 500ch 64px": "direct"}, "unknown class of shapes"),
        ({"upsample": "winograd"}, "unknown variant"),
        ([], "not a table of choices"),
    ],
)
def test_wrong_tables(wrong: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text), choices.using(wrong):
        pass
    with pytest.raises(InputError, match=text):
        choices.write(tmp_path / "written", wrong)
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=text):
        choices.load(path)
    assert choices.current() == choices.SHIPPED


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        choices.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        choices.load(tmp_path / "broken.json")
