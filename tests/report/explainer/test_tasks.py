"""Five tasks of a learner, from the page's opening, with what one sees: links, controls, words.

Each takes less than two minutes: the words that one reads until it is done, at 200 a minute, and
four seconds for each thing that one does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import Tab
from helpers.explainer import IDLE, READY
from helpers.paths import ROOT

import sdconv
from sdconv.convolution.geometry import ReceptiveField
from sdconv.images import read_image, to_tensor

pytestmark = [pytest.mark.browser, pytest.mark.slow]


class Learner:
    """Someone who reads and clicks, and how long that takes."""

    def __init__(self, tab: Tab) -> None:
        self.tab, self.page, self.seconds = tab, tab.page, 0.0

    def read(self, selector: str) -> str:
        text: str = self.page.locator(selector).first.inner_text()
        self.seconds += len(text.split()) / 200 * 60
        return text

    def go(self, section: str) -> None:
        """By the list of contents; then its title and the words below it."""
        self.did(self.page.locator(f".contents a[href='#{section}']").click)
        self.read(f"#{section} > h2")
        self.read(f"#{section} > p")

    def did(self, action: Any, *given: Any, **more: Any) -> None:
        action(*given, **more)
        self.seconds += 4


@pytest.fixture
def learner(browser: Any, explainer: Path) -> Iterator[Learner]:
    tab = Tab(browser, explainer)
    tab.wait(READY)
    someone = Learner(tab)
    yield someone
    assert someone.seconds < 120
    assert tab.messages == []
    tab.context.close()


def test_predict_a_size(learner: Learner) -> None:
    learner.go("padding")
    page = learner.page
    for _ in range(2):
        learner.did(page.get_by_label("numbers in").press, "ArrowRight")
    learner.did(page.locator("#padding").get_by_label("symmetric: both ends").check)
    learner.did(page.get_by_label("How many numbers come out?").fill, "6")
    learner.did(page.locator("#padding").get_by_role("button", name="Check").click)
    assert learner.read("#padding .verdict").startswith("No, not 6: 5")
    learner.did(page.get_by_label("How many numbers come out?").fill, "5")
    learner.did(page.locator("#padding").get_by_role("button", name="Check").click)
    assert learner.read("#padding .verdict").startswith("Yes, 5")


def test_find_a_padding_bug(learner: Learner) -> None:
    learner.go("padding")
    learner.read("#padding h3:has-text('bug') + p")
    learner.did(learner.page.get_by_role("button", name="Run the network both ways").click)
    enabled = """[...padding.querySelectorAll("button")].some(
        (one) => one.innerText === "A pads wrongly" && !one.disabled)"""
    learner.tab.wait(enabled)
    # what the eye does: which picture is further from the photo?
    errors = learner.page.evaluate(
        """() => {
            const [photo, a, b] = [...padding.querySelectorAll('.trio canvas')].map((canvas) =>
                canvas.getContext('2d').getImageData(0, 0, 256, 256).data);
            const off = (x) => x.reduce((sum, value, at) => sum + Math.abs(value - photo[at]), 0);
            return [off(a), off(b)];
        }"""
    )
    assert abs(errors[0] - errors[1]) > 0.1 * min(errors), errors
    worse = "A" if errors[0] > errors[1] else "B"
    learner.did(learner.page.get_by_role("button", name=f"{worse} pads wrongly").click)
    assert learner.read("#padding .verdict >> nth=1").startswith("Right: run " + worse)


def test_say_why_a_pixel_is_bright(learner: Learner) -> None:
    learner.go("neuron")
    learner.tab.wait(IDLE)
    learner.tab.wait("Boolean(neuron.dataset.sum)")
    before = learner.page.inner_text("#neuron figcaption")
    picture = learner.page.locator("#neuron .picker")
    learner.did(picture.click, position={"x": 120, "y": 40})
    learner.tab.wait(f"neuron.querySelector('figcaption').innerText !== {before!r}")
    learner.tab.wait("location.hash.includes('look.j')")
    caption = learner.read("#neuron figcaption")
    i, j = (int(x) for x in re.findall(r"row (\d+), column (\d+)", caption)[0])
    learner.page.wait_for_timeout(500)
    words = learner.read("#neuron .verdict")
    vae = sdconv.load(ROOT / "weights" / "tiny-vae.safetensors", dtype=torch.float32)
    photo = to_tensor(read_image(ROOT / "weights" / "photo.jpg").image)
    patch = photo[0, :, i - 1 : i + 2, j - 1 : j + 2]
    products = (patch * vae.encoder.conv_in.weight[12].detach()).flatten()
    strongest = int(products.abs().argmax())
    assert ("red", "green", "blue")[strongest // 9] in words
    assert f"{products[strongest]:.3f}".replace("-", "\u2212") in words


def test_trace_a_receptive_field(learner: Learner) -> None:
    learner.go("field")
    learner.tab.wait(IDLE)
    learner.did(learner.page.locator("#field").get_by_label("a stride of 2").check)
    learner.tab.wait("Boolean(field.dataset.painted?.startsWith('encoder.down'))")
    learner.did(learner.page.locator("#field .picker").click)  # in the middle
    field = ReceptiveField()
    for _ in range(5):
        field = field.through(3, 1, (1, 1))
    field = field.through(3, 2, (0, 1))
    learner.tab.wait("field.dataset.painted.endsWith('64')")
    caption = learner.read("#field figcaption")
    (row,) = re.findall(r"row (\d+)", caption)
    words = learner.read("#field .verdict")
    first, last = field.span(int(row))
    assert f"{field.size} \u00d7 {field.size} pixels, rows {first} to {last}" in words
    assert "90\u00a0% of the effect" in words


def test_explain_a_checkerboard(learner: Learner) -> None:
    learner.go("blocks")
    learner.read("#blocks h3:has-text('checkerboards') + p")
    page, verdict = learner.page, "#blocks .verdict"
    assert "Neighbours get 1, 2 or 4: even a flat input comes out as a checkerboard" in (
        learner.read(verdict)
    )
    learner.did(page.get_by_label("kernel of the transposed one").press, "ArrowRight")
    assert "every pixel gets 4: the map stays even" in learner.read(verdict)
    learner.did(page.locator("#blocks").get_by_label("nearest, then 3 \u00d7 3").check)
    assert "every pixel gets 9: the map stays even" in learner.read(verdict)
