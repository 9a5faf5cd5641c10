"""The explainer's controls do what they say: nothing is told too early, spoken twice or lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Tab

pytestmark = [pytest.mark.browser, pytest.mark.slow]

READY = "document.documentElement.dataset.ready === 'true'"
IDLE = "explainer.vae.version > 0 && !explainer.vae.running"


@pytest.fixture(scope="module")
def tab(browser: Any, explainer: Path) -> Iterator[Tab]:
    opened = Tab(browser, explainer)
    opened.wait(READY)
    yield opened
    assert opened.messages == []
    opened.context.close()


def at(tab: Tab, fragment: str) -> None:
    tab.page.evaluate(f"location.hash = {fragment!r}")
    section = fragment.split("&")[0]
    tab.page.evaluate(f"document.getElementById({section!r}).scrollIntoView()")
    tab.page.wait_for_timeout(200)


@pytest.mark.parametrize("moved", ["shift.x=1", "shift.x=32&shift.y=-32", "shift.x=-20&shift.y=4"])
def test_a_dense_layer_never_follows_and_stride_one_always(moved: str, tab: Tab) -> None:
    at(tab, f"shift&{moved}")
    tab.wait("Boolean(document.querySelector('#shift').dataset.differences)")
    tab.page.wait_for_timeout(200)
    words = tab.page.locator("#shift .four figcaption").all_inner_texts()
    assert words[1] == "stride 1: follows exactly"
    assert words[3].startswith("dense layer: off by up to")


def test_the_address_does_not_tell_which_run_is_wrong(browser: Any, explainer: Path) -> None:
    wrong = set()
    for run in range(1, 9):
        tab = Tab(browser, explainer, f"#padding&padding.run={run}&padding.answer=A")
        tab.wait(READY)
        tab.wait("Boolean(padding.dataset.bug)")
        wrong.add(tab.page.get_attribute("#padding", "data-bug"))
        tab.context.close()
        if len(wrong) == 2:
            break
    assert wrong == {"found", "missed"}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("padding.size=7", None),  # all seven are read, only the zero is not
        ("padding.size=8&padding.kind=valid", "Never read: number 8."),
        ("padding.kernel=1&padding.stride=3&padding.kind=valid", "numbers 2, 3, 5, 6, 8."),
    ],
)
def test_numbers_that_are_never_read_are_named(state: str, words: str | None, tab: Tab) -> None:
    at(tab, f"padding&padding.shown=true&{state}")
    said = tab.page.inner_text("#padding .verdict >> nth=0")
    assert ("Never read" in said) == (words is not None)
    assert (words or "") in said


def test_only_the_section_in_use_is_spoken(tab: Tab) -> None:
    speaking = """() => [...new Set([...document.querySelectorAll("main [role=status]")]
        .filter((one) => one.ariaLive !== "off").map((one) => one.closest("section")?.id))]"""
    outputs = "[...document.querySelectorAll('output')].every((one) => one.ariaLive === 'off')"
    tab.page.evaluate("document.activeElement.blur()")
    assert tab.page.evaluate(speaking) == []
    tab.page.locator("#lists .slider input").focus()
    assert tab.page.evaluate(speaking) == ["lists"]
    tab.page.locator("#cost .slider input").first.focus()
    assert tab.page.evaluate(speaking) == ["cost"]
    assert tab.page.evaluate(outputs)


def test_a_click_holds_what_the_mouse_hovers_over(tab: Tab) -> None:
    at(tab, "kernel")
    picture = tab.page.locator("#kernel .picker").first
    picture.scroll_into_view_if_needed()
    code = tab.page.locator("#kernel .python code")
    picture.hover(position={"x": 50, "y": 50})
    first = code.text_content()
    picture.click(position={"x": 90, "y": 60})
    held = code.text_content()
    assert held != first
    picture.hover(position={"x": 150, "y": 100})
    assert code.text_content() == held
    picture.click(position={"x": 120, "y": 100})
    picture.hover(position={"x": 50, "y": 50})
    assert code.text_content() == first


def test_a_finger_can_scroll_over_a_picture(tab: Tab) -> None:
    actions = """[...document.querySelectorAll("main .picker")].map(
        (one) => [one.closest("section").id, getComputedStyle(one).touchAction])"""
    for section, action in tab.page.evaluate(actions):
        assert action == ("none" if section == "shift" else "pan-y"), section


def test_every_map_can_be_taken_apart(tab: Tab) -> None:
    at(tab, "neuron")
    tab.wait(IDLE)
    tab.wait("document.querySelectorAll('#neuron option').length > 1")
    options = "[...document.querySelectorAll('#neuron option')].map((one) => one.value)"
    points = tab.page.evaluate("explainer.vae.points.map(({ name }) => name)")
    # the latents are the first four channels of quant_conv
    assert tab.page.evaluate(options) == [name for name in points if name != "latents"]


@pytest.mark.parametrize("layer", ["encoder.conv_in", "encoder.down_blocks.0.downsamplers.0"])
def test_the_effective_field_lies_in_the_square(layer: str, tab: Tab) -> None:
    at(tab, f"field&look.layer={layer}&look.channel=3&look.i=60&look.j=61")
    tab.wait(f"field.dataset.painted === '{layer} 3 60 61'")
    said = tab.page.inner_text("#field .verdict").replace("\u00a0", " ")
    found = re.search(r"sees (\d+) \S \d+ pixels.* (\d+) of its (\d+) pixels make 90 % of", said)
    assert found, said
    side, counted, of = map(int, found.groups())
    assert of == side**2
    assert 0.3 * of < counted < of
    assert "Computing" not in said


def test_numbers_in_the_address_are_whole(tab: Tab) -> None:
    at(tab, "cost&cost.inputs=1.5&cost.outputs=5")
    values = tab.page.locator("#cost .slider output").all_inner_texts()
    assert values[:2] == ["64", "5"]


def test_reset_brings_the_photo_back_and_can_be_undone(
    browser: Any, explainer: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    tab = Tab(browser, explainer, "#lists&lists.n=4")
    tab.wait(READY)
    tab.page.set_input_files("#kernel input[type=file]", tmp_path / "red.png")
    tab.wait("explainer.photo.own === true")
    tab.page.click("#reset")
    tab.wait("explainer.photo.own === false")
    tab.wait("!location.hash.includes('lists.n')")
    tab.page.go_back()
    tab.wait("location.hash.includes('lists.n=4')")
    tab.wait("document.querySelector('#lists .slider output').innerText === '4'")
    assert tab.messages == []
    tab.context.close()


def test_a_section_that_waits_for_the_network_says_so(browser: Any, explainer: Path) -> None:
    tab = Tab(browser, explainer, "#vae")
    tab.wait(READY)
    note = tab.page.inner_text("#vae .waiting")
    assert note.startswith("The network computes its maps for the first time")
    assert "waits" in (tab.page.get_attribute("#vae .body", "class") or "")
    tab.page.locator("#vae .station").first.focus()
    tab.page.keyboard.press("Enter")  # too early: it does nothing
    tab.wait(IDLE)
    tab.wait("document.querySelector('#vae .waiting') === null")
    assert tab.page.get_attribute("#vae .station >> nth=0", "aria-pressed") == "false"
    tab.page.locator("#vae .station").first.press("Enter")
    assert tab.page.get_attribute("#vae .station >> nth=0", "aria-pressed") == "true"
    assert tab.messages == []
    tab.context.close()
