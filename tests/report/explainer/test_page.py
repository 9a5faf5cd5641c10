"""The explainer's file: whole, small, with the weights' own bytes, and written like all outputs."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import answer, run
from helpers.paths import ROOT
from PIL import Image

from sdconv.images import read_image
from sdconv.report.explainer.kernels import kernels
from sdconv.report.explainer.page import LIMIT, explainer
from sdconv.report.explainer.wasm import leb, signed_leb

SECTIONS = ["lists", "kernel", "padding", "neuron", "field", "shift", "blocks", "vae", "cost"]


@pytest.fixture(scope="module")
def html() -> str:
    return explainer()


def block(html: str, name: str) -> str:
    found = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert found, name
    return found[1]


def test_it_is_at_most_six_megabytes(html: str) -> None:
    assert len(html.encode()) <= LIMIT == 6_000_000


def test_the_weights_are_the_files_own_bytes(html: str) -> None:
    inside = b64decode(block(html, "weights"))
    assert inside == (ROOT / "weights" / "tiny-vae.safetensors").read_bytes()


def test_the_photo_has_the_pixels_that_python_reads(html: str) -> None:
    data = b64decode(block(html, "photo").removeprefix("data:image/png;base64,"))
    photo = read_image(ROOT / "weights" / "photo.jpg").image
    assert np.array_equal(np.asarray(Image.open(BytesIO(data))), np.asarray(photo))


def test_it_loads_nothing(html: str) -> None:
    assert re.findall(r"(?:src|href)=\"?(?:https?:)?//[^\s>]+", html) == []
    assert "default-src 'none'" in html
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|importScripts)\(", html)


def test_every_part_is_filled_in(html: str) -> None:
    template = (ROOT / "sdconv/report/explainer/page/index.html").read_text()
    for name in re.findall(r"/\*([\w-]+)\*/", template):
        assert f"/*{name}*/" not in html


def test_the_kernels_are_webassembly(html: str) -> None:
    for name, fused in (("kernels", False), ("kernels-fused", True)):
        assert b64decode(block(html, name)) == kernels(fused)
        assert kernels(fused)[:8] == b"\x00asm\x01\x00\x00\x00"


@pytest.mark.parametrize(
    ("number", "bytes_"), [(0, "00"), (127, "7f"), (128, "8001"), (624485, "e58e26")]
)
def test_leb_is_that_of_the_specification(number: int, bytes_: str) -> None:
    assert leb(number).hex() == bytes_


@pytest.mark.parametrize(("number", "bytes_"), [(2, "02"), (64, "c000"), (-123456, "c0bb78")])
def test_signed_leb_is_that_of_the_specification(number: int, bytes_: str) -> None:
    assert signed_leb(number).hex() == bytes_


def test_each_idea_of_the_text_links_to_its_section() -> None:
    text = (ROOT / "docs" / "convolutions.md").read_text()
    linked = re.findall(r"\(explainer/index\.html#(\w+)\)", text)
    assert set(linked) == set(SECTIONS)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    said = answer("explain-page", "--out", tmp_path / "page.html")
    written = tmp_path / "page.html"
    assert said == {"page": str(written), "bytes": written.stat().st_size}
    assert written.read_text(encoding="utf-8") == explainer()


def test_the_command_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    refused = run("explain-page", "--out", tmp_path / "page.html")
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    assert (tmp_path / "page.html").read_text() == "mine"
