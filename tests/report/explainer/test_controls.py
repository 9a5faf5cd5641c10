"""The explainer's controls do what they say: nothing is told too early, spoken twice or lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Tab
from helpers.explainer import IDLE, READY

pytestmark = [pytest.mark.browser, pytest.mark.slow]


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
    code = tab.page.locator("#kernel .python code").last
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


def test_fingers_have_buttons_that_move_by_one_pixel(browser: Any, explainer: Path) -> None:
    phone = {"has_touch": True, "is_mobile": True, "viewport": {"width": 400, "height": 800}}
    tab = Tab(browser, explainer, "#kernel", **phone)
    tab.wait(READY)
    row, column = 35, 119
    for name, di, dj in [("up", -1, 0), ("right", 0, 1), ("down", 1, 0), ("left", 0, -1)]:
        tab.page.locator("#kernel .nudges").get_by_label(f"one pixel {name}").tap()
        row, column = row + di, column + dj
        assert f"[0, 0, {row}, {column}]" in tab.page.inner_text("#kernel .python pre:visible")
    assert tab.messages == []
    tab.context.close()


def test_a_mouse_has_no_such_buttons(tab: Tab) -> None:
    assert tab.page.locator(".nudges").count() == 3
    assert tab.page.locator(".nudges:visible").count() == 0


def test_every_map_can_be_taken_apart(tab: Tab) -> None:
    at(tab, "neuron")
    tab.wait(IDLE)
    tab.wait("document.querySelectorAll('#neuron option').length > 1")
    options = "[...document.querySelectorAll('#neuron option')].map((one) => one.value)"
    points = tab.page.evaluate("explainer.vae.points.map(({ name }) => name)")
    # the latents are the first four channels of quant_conv
    assert tab.page.evaluate(options) == [name for name in points if name != "latents"]


def test_a_part_of_the_strip_is_chosen_for_both_sections(tab: Tab) -> None:
    at(tab, "neuron")
    tab.wait(IDLE)
    tab.wait("document.querySelector('#neuron .part:last-of-type small').textContent !== ''")
    tab.page.locator("#neuron .part", has_text="up 2").click()
    chosen = "document.querySelector('#neuron select').value"
    tab.wait(f"{chosen} === 'decoder.up_blocks.2.upsamplers.0'")
    tab.page.evaluate("field.scrollIntoView()")
    tab.wait("document.querySelector('#field .part[aria-pressed=true] b')?.textContent === 'up 2'")
    # the map is the one that the strip shows
    shown = """async () => {
        const { vae } = explainer, name = "decoder.up_blocks.2.upsamplers.0";
        const { values, channels } = await vae.allPlanes(name, 32), area = values.length / channels;
        const variance = (x) => {
            const mean = x.reduce((a, b) => a + b) / area;
            return x.reduce((sum, one) => sum + (one - mean) ** 2, 0) / area;
        };
        const all = [...Array(channels).keys()].map(
            (c) => variance([...values.subarray(c * area, (c + 1) * area)]));
        return all.indexOf(Math.max(...all));
    }"""
    tab.wait("location.hash.includes('look.channel')")
    address = tab.page.evaluate("location.hash")
    assert f"look.channel={tab.page.evaluate(shown)}&" in f"{address}&"


def test_a_term_is_explained_and_back_returns(tab: Tab) -> None:
    at(tab, "neuron&look.layer=encoder.conv_in&look.channel=12")
    tab.wait("document.querySelectorAll('#neuron .steps .term').length === 2")
    term = tab.page.locator("#neuron .steps .term").first
    term.hover()
    assert "standard deviation 1" in (term.get_attribute("title") or "")
    assert not tab.page.is_visible("#word-groupnorm")
    term.click()
    assert tab.page.is_visible("#word-groupnorm")
    assert tab.page.evaluate("document.activeElement.id") == "word-groupnorm"
    tab.page.go_back()
    tab.wait("document.activeElement.id === 'neuron'")


def test_every_term_that_is_linked_is_explained(tab: Tab) -> None:
    missing = """[...document.querySelectorAll("a.term")].map((one) => one.getAttribute("href"))
        .filter((one) => !document.querySelector(`${one} + dd`))"""
    assert tab.page.locator("a.term").count() >= 2
    assert tab.page.evaluate(missing) == []


def test_of_python_the_last_statement_is_in_sight(tab: Tab) -> None:
    figures = tab.page.locator("#kernel .python, #lists .python, #cost .python").all()
    assert len(figures) == 5
    for figure in figures:
        (line,) = figure.locator("pre:visible").all_inner_texts()
        assert line.startswith("print(")
        figure.locator("summary").click()
        assert figure.locator("pre:visible").first.inner_text().startswith("import torch")
        figure.locator("summary").click()


@pytest.mark.parametrize(
    ("field", "wrong", "words"),
    [
        ("#lists .fields input >> nth=0", "1, x", "at most 9 numbers"),
        ("#lists .fields input >> nth=1", "1, 99999", "at most 9 numbers"),
        ("#cost .fields input >> nth=0", "1, 2", "4 numbers are needed"),
        ("#cost .fields input >> nth=1", "", "3 numbers are needed"),
    ],
)
def test_what_is_no_list_is_said_and_taken_back(
    field: str, wrong: str, words: str, tab: Tab
) -> None:
    at(tab, field[1:].split()[0])
    note = tab.page.locator(f"{field.split()[0]} [role=alert]")
    before = tab.page.input_value(field)
    tab.page.fill(field, wrong)
    assert words in note.inner_text()
    assert tab.page.get_attribute(field, "aria-invalid") == "true"
    tab.page.locator(field).blur()
    assert tab.page.input_value(field) == before
    assert note.inner_text() == ""
    tab.page.fill(field, before.replace(",", " ,").replace("1", "\u22121", 1))  # a true minus
    assert note.inner_text() == ""


def test_a_field_that_is_no_longer_asked_for_does_not_stay_pale(tab: Tab) -> None:
    at(tab, "field&look.layer=decoder.conv_out&look.channel=1&look.i=99&look.j=98")
    tab.wait("field.classList.contains('busy')")
    tab.page.locator("#field .toggle").first.click()
    tab.wait("!field.classList.contains('busy')", seconds=1)
    tab.page.locator("#field .toggle").first.click()
    tab.wait("field.dataset.painted === 'decoder.conv_out 1 99 98'")
    assert not tab.page.evaluate("field.classList.contains('busy')")


@pytest.mark.parametrize("layer", ["encoder.conv_in", "encoder.down_blocks.0.downsamplers.0"])
def test_the_effective_field_lies_in_the_square(layer: str, tab: Tab) -> None:
    at(tab, f"field&look.layer={layer}&look.channel=3&look.i=60&look.j=61")
    tab.wait(f"field.dataset.painted === '{layer} 3 60 61'")
    said = tab.page.inner_text("#field .verdict").replace("\u00a0", " ")
    found = re.search(r"sees (\d+) \S \d+ pixels.* (\d+) of its (\d+) pixels make up 90 % of", said)
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
    tab.page.locator("#vae .part").first.focus()
    tab.page.keyboard.press("Enter")  # too early: it does nothing
    tab.wait(IDLE)
    tab.wait("document.querySelector('#vae .waiting') === null")
    assert tab.page.get_attribute("#vae .part >> nth=0", "aria-pressed") == "false"
    tab.page.locator("#vae .part").first.press("Enter")
    assert tab.page.get_attribute("#vae .part >> nth=0", "aria-pressed") == "true"
    assert tab.messages == []
    tab.context.close()
