"""The page of feature maps in a real browser, opened from the disk."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made import CHANNELS, IMAGE, TIMESTEPS, maps_of, page, values
from helpers.slow import first_of
from PIL import Image
from torch import nn

from sdconv.report.features.feature_maps import FeatureMap, Snapshot
from sdconv.report.features.kernels import Kernels

pytestmark = pytest.mark.browser

NAMES = list(CHANNELS)

# texts that do not fit their element, and elements that stick out of the window
CUT = """[...document.querySelectorAll("main *, header *")].filter(one => one.offsetParent
    && !one.closest(".scroll, .sr, .skip, svg, select") && one.tagName !== "INPUT"
    && (one.getBoundingClientRect().right > innerWidth + 1
        || (one.scrollWidth > one.clientWidth + 1 && !one.children.length
            && getComputedStyle(one).display !== "inline" && one.innerText)))
    .map(one => (one.id || one.className || one.tagName) + ": " + one.innerText.slice(0, 30))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # the sandbox cannot be set up by root
        started = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    page(path, maps_of(), image=IMAGE, kernels=KERNELS, store="maps.zarr")
    return path


torch.manual_seed(0)
FACTS = {"kernel": "3 \u00d7 3", "stride": "1", "padding": "1", "true stride": "1"}
KERNELS = [
    Kernels(name=name, box=box, module=nn.Conv2d(*sides, padding=1), facts=FACTS)
    for name, box, sides in (
        ("conv_in", "conv_in", (3, 4, 3)),
        ("down.0.conv1", "down.0", (4, 24, 3)),
        ("down.0.conv2", "down.0", (24, 24, 1)),
    )
]


class Tab:
    """The page in a tab, with its console messages and its requests."""

    def __init__(self, browser: Any, path: Path, fragment: str = "", **options: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(
            **{"viewport": {"width": 1400, "height": 900}, **options}
        )
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self.messages.append(said.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + fragment)
        self.wait("document.documentElement.dataset.shown")

    def wait(self, condition: str) -> None:
        """Wait until a condition holds; it is polled, because the page forbids ``eval``."""
        end = time.monotonic() + 60
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(20)

    def shows(self, name: str, step: int = 0, sort: str = "number") -> None:
        """Wait until this feature map is in view."""
        self.wait(f"document.documentElement.dataset.shown === '{name} {step} {sort}'")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def address(self, part: str) -> None:
        """Wait until the address contains ``part``."""
        self.wait(f"location.hash.includes({part!r})")

    def channels(self) -> list[int]:
        return [
            int(number)
            for number in self.page.eval_on_selector_all(
                "#grid > .tile", "tiles => tiles.map(tile => tile.dataset.channel)"
            )
        ]


FIRST = "#map=conv_in&step=0"


@pytest.fixture
def tab(browser: Any, report: Path) -> Iterator[Tab]:
    opened = Tab(browser, report, FIRST)
    yield opened
    assert opened.messages == []
    assert {re.match(r"\w+:", url)[0] for url in opened.requests} <= {"file:", "blob:", "data:"}  # type: ignore[index]
    opened.context.close()


def test_it_opens_on_a_late_step_of_the_up_path(browser: Any, report: Path) -> None:
    opened = Tab(browser, report)
    opened.shows("up.1", 3)
    assert opened.text("#step-words") == "call 3, t = 1"
    opened.context.close()


def test_a_feature_map(tab: Tab) -> None:
    tab.shows("conv_in")
    assert tab.text("#name") == "conv_in"
    assert tab.page.title() == "conv_in \u00b7 A network"
    assert "4 \u00d7 16 \u00d7 16" in tab.text("#about-map")
    assert tab.page.locator(".tile").count() == 4
    assert tab.page.locator("#image").is_visible()
    for name in ("pca", "mean", "std", "one"):
        assert tab.page.evaluate(f"document.getElementById('{name}').width") == 16
    assert tab.page.locator("#histogram rect").count() == 64


def test_the_drawing_stays_in_view_while_scrolling(browser: Any, report: Path) -> None:
    opened = Tab(browser, report, viewport={"width": 1400, "height": 800})
    for part in ("#grid", ".list"):  # as with many channels and many feature maps
        opened.page.evaluate(f"document.querySelector('{part}').style.minHeight = '3000px'")
    opened.page.evaluate("window.scrollTo(0, 9999)")
    bar, about = (
        opened.page.evaluate(f"document.querySelector('{name}').getBoundingClientRect().toJSON()")
        for name in (".bar", ".about")
    )
    assert about["top"] >= bar["bottom"]
    opened.context.close()


def test_errors_and_requests_of_a_page_are_noticed(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<html data-shown=1><script>nothing()</script><img src='http://localhost:9/x.png'>"
    )
    opened = Tab(browser, tmp_path / "bad.html")
    assert any("nothing is not defined" in words for words in opened.messages)
    assert any(url.startswith("http:") for url in opened.requests)
    opened.context.close()


def test_a_click_on_a_block_shows_its_feature_maps(tab: Tab) -> None:
    tab.page.click('[data-block="down.1"]')
    tab.shows("down.1")
    assert tab.page.locator(".tile").count() == 48
    assert tab.page.get_attribute('[data-block="down.1"]', "aria-current") == "true"
    assert tab.page.is_disabled('[data-block="up.0"]')  # was not captured
    tab.address("map=down.1")
    tab.page.go_back()
    tab.shows("conv_in")


def test_hook_points_in_a_block_are_listed(tab: Tab) -> None:
    tab.page.click('[data-block="down.0"]')
    tab.shows("down.0")
    assert tab.page.locator("#points button").all_inner_texts() == ["output", "silu1"]
    tab.page.click("#points button:text-is('silu1')")
    tab.shows("down.0:silu1")


def test_the_slider_goes_over_timesteps(tab: Tab) -> None:
    assert tab.text("#step-words") == "call 0, t = 901"
    tab.page.focus("#step")
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowRight")
    tab.shows("conv_in", 2)
    assert tab.text("#step-words") == f"call 2, t = {TIMESTEPS[2]:.0f}"
    tab.address("step=2")
    # the values that the made-up maps have at that step, around 2
    low, high = (
        float(re.sub("[\u2264\u2265 ]", "", t).replace("\u2212", "-"))
        for t in tab.page.locator("#mean-scale span").all_inner_texts()
    )
    assert low < 2 < high
    tab.page.click('[data-block="down.1"]')
    tab.shows("down.1", 2)  # the timestep stays


def test_the_halves_of_the_batch(tab: Tab) -> None:
    before = tab.text("#one-note")
    tab.page.click("#halves button:text-is('unconditional')")
    tab.wait(f"document.getElementById('one-note').innerText !== {before!r}")
    tab.address("half=unconditional")


def test_channels_sort_by_variance(tab: Tab) -> None:
    tab.page.click('[data-block="down.1"]')
    tab.shows("down.1")
    assert tab.channels() == list(range(48))
    tab.page.click("#sort button:text-is('variance')")
    tab.shows("down.1", 0, "variance")
    order = tab.channels()
    assert sorted(order) == list(range(48))
    labels = tab.page.eval_on_selector_all(
        ".tile", "tiles => tiles.map(tile => parseFloat(tile.ariaLabel.split('variance ')[1]))"
    )
    assert labels == sorted(labels, reverse=True)
    assert order[0] > 24  # the made-up maps vary more towards the last channels


def test_search_finds_and_opens(tab: Tab) -> None:
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("resnet up")
    tab.wait("document.getElementById('found').innerText === '1 of 6 feature maps'")
    assert tab.page.locator("#list a:visible").all_inner_texts()[0].startswith("up.1")
    assert "dim" in tab.page.get_attribute('[data-block="mid"]', "class")
    tab.page.keyboard.press("Enter")
    tab.shows("up.1")
    tab.page.keyboard.press("Escape")
    tab.wait("document.getElementById('found').innerText === '6 feature maps'")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("d*0:sil")
    tab.wait("document.getElementById('found').innerText === '1 of 6 feature maps'")
    tab.page.keyboard.type("((")
    tab.wait("document.getElementById('found').innerText === '0 of 6 feature maps'")


def test_keys_in_quick_succession_are_all_handled(tab: Tab) -> None:
    """The browser reports a new address late, when the state has changed again."""
    tab.page.evaluate(
        "for (const key of ['j', 'k', ']', 's']) document.dispatchEvent("
        "new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}))"
    )
    tab.page.wait_for_timeout(500)
    tab.shows(NAMES[0], 1, "variance")
    tab.address("step=1")


def test_it_can_be_used_with_the_keyboard(tab: Tab) -> None:
    press = tab.page.keyboard.press
    press("j")
    tab.shows(NAMES[1])
    press("k")
    tab.shows(NAMES[0])
    press("k")  # there is none before
    press("]")
    tab.shows(NAMES[0], 1)
    press("[")
    tab.shows(NAMES[0], 0)
    press("s")
    tab.shows(NAMES[0], 0, "variance")
    press("?")
    assert tab.page.locator("#keys").is_visible()
    press("Escape")
    assert not tab.page.locator("#keys").is_visible()
    press("t")
    assert tab.page.get_attribute("html", "data-theme") == "light"
    press("t")
    assert tab.page.get_attribute("html", "data-theme") == "dark"
    press("c")
    tab.address("colormap=diverging")
    press("p")
    tab.wait("document.getElementById('play').ariaPressed === 'true'")
    tab.shows(NAMES[0], 1, "variance")
    press("p")


def test_arrows_move_among_blocks_and_channels(tab: Tab) -> None:
    tab.page.focus('[data-block="conv_in"]')
    tab.page.keyboard.press("ArrowRight")
    tab.shows("down.0")
    focused = "document.activeElement.dataset"
    assert tab.page.evaluate(f"{focused}.block") == "down.0"
    tab.page.keyboard.press("ArrowDown")
    tab.shows("down.1")
    chosen = int(tab.page.get_attribute('.tile[tabindex="0"]', "data-channel"))
    tab.page.focus('.tile[tabindex="0"]')
    tab.page.keyboard.press("ArrowLeft")
    assert int(tab.page.evaluate(f"{focused}.channel")) == chosen - 1
    tab.page.keyboard.press("Home")
    tab.page.keyboard.press("Enter")
    tab.wait("document.getElementById('one-title').innerText === 'Channel 0'")
    tab.address("channel=0")


def test_an_address_is_a_view(browser: Any, report: Path) -> None:
    fragment = "#map=down.0:silu1&step=3&half=unconditional&sort=variance&channel=5&search=down"
    opened = Tab(browser, report, fragment)
    opened.shows("down.0:silu1", 3, "variance")
    assert opened.text("#one-title") == "Channel 5"
    assert opened.page.input_value("#search") == "down"
    assert opened.page.get_attribute("[data-choice=unconditional]", "aria-pressed") == "true"
    opened.page.goto(report.as_uri() + "#map=nothing&step=x&sort=odd&channel=99999&compare=7")
    opened.shows("up.1", 3)
    assert opened.messages == []
    opened.context.close()


def test_thousands_of_channels_are_shown_at_once(tab: Tab) -> None:
    tab.page.click('[data-block="mid"]')
    tab.shows("mid")
    assert tab.page.locator(".tile").count() == 2560
    assert tab.page.evaluate(
        "getComputedStyle(document.querySelector('.tile')).backgroundImage"
    ).startswith('url("blob:')
    # three sorts: what a person would wait for
    took = tab.page.evaluate(
        """async () => {
            const start = performance.now();
            for (const sort of ["variance", "mean", "number"]) await change({ sort });
            return performance.now() - start;
        }"""
    )
    assert took < 6000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", first_of([380, 900, 1600]))
def test_it_fits_and_can_be_read(browser: Any, report: Path, scheme: str, width: int) -> None:
    opened = Tab(browser, report, color_scheme=scheme, viewport={"width": width, "height": 800})
    across = "[document.documentElement.scrollWidth, innerWidth]"
    wide, room = opened.page.evaluate(across)
    assert wide <= room
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", dark)][:3]
    assert (max(levels) < 80) == (scheme == "dark")
    least = 44 if width < 720 else 24  # a finger, a mouse
    small = opened.page.eval_on_selector_all(
        "button:not([disabled]), select, input, a:not(.skip), summary",
        """(all, least) => all.filter(one => one.offsetParent).map(one => [one.id || one.className,
            one.offsetWidth, one.offsetHeight]).filter(([, w, h]) => Math.min(w, h) < least)""",
        least,
    )
    assert [one for one in small if one[0] != "search"] == []
    cut = opened.page.evaluate(CUT)
    assert cut == []
    assert opened.messages == []
    opened.context.close()


def test_every_control_has_an_accessible_name(tab: Tab) -> None:
    nameless = tab.page.eval_on_selector_all(
        "button, input, a, canvas, img",
        """all => all.filter(one => one.offsetParent && !(one.ariaLabel || one.innerText || one.alt
            || one.labels?.length)).map(one => one.outerHTML.slice(0, 90))""",
    )
    assert nameless == []


def test_two_runs_of_a_single_call_have_no_slider_either(browser: Any, tmp_path: Path) -> None:
    maps = [replace(one, snapshots=one.snapshots[:2]) for one in maps_of()]  # the two halves
    page(tmp_path / "two.html", maps)
    opened = Tab(browser, tmp_path / "two.html", FIRST)
    assert opened.page.locator("#halves").is_visible()
    assert not opened.page.locator("#play").is_visible()
    assert not opened.page.locator("#step").is_visible()
    assert opened.messages == []
    opened.context.close()


def test_a_single_call_has_no_slider(browser: Any, tmp_path: Path) -> None:
    page(tmp_path / "one.html", maps_of(steps=False))
    opened = Tab(browser, tmp_path / "one.html", FIRST)
    assert not opened.page.locator("#time").is_visible()
    opened.page.keyboard.press("]")
    opened.page.keyboard.press("h")
    opened.shows("conv_in")
    assert opened.messages == []
    opened.context.close()


def test_signed_maps_have_diverging_colours_and_bars_say_when_they_clip(tab: Tab) -> None:
    tab.page.click('[data-block="down.1"]')
    tab.shows("down.1")
    low, high = tab.page.locator("#one-scale span").all_inner_texts()
    assert low.startswith("\u2264") or high.startswith("\u2265")
    low, high = (words.strip("\u2264\u2265 ") for words in (low, high))
    assert low == f"\u2212{high}"  # symmetric around zero
    assert tab.page.get_attribute("#one-scale", "title").startswith("clipped: the values go from")
    assert "247, 246, 246" in tab.page.get_attribute("#one-scale i", "style")
    tab.page.click("#colormap button:text-is('viridis')")
    tab.address("colormap=viridis")
    tab.wait("!document.querySelector('#one-scale i').style.background.includes('247, 246, 246')")
    # the deviation is never negative
    tab.page.click("#colormap button:text-is('auto')")
    tab.wait("document.querySelector('#one-scale i').style.background.includes('247, 246, 246')")
    assert "247, 246, 246" not in tab.page.get_attribute("#std-scale i", "style")


def test_a_channel_at_its_own_resolution_and_its_download(tab: Tab, tmp_path: Path) -> None:
    maps = values("conv_in", 0, "conditional")
    tab.page.click(".tile[data-channel='2']")
    tab.wait("document.getElementById('one-title').innerText === 'Channel 2'")
    tab.page.click("#enlarge")
    tab.wait("document.getElementById('large').dataset.shown")
    assert "exact values" in tab.text("#large-note")
    assert tab.page.evaluate("document.getElementById('large-canvas').width") == 16
    with tab.page.expect_download() as saved:
        tab.page.click("#npy")
    saved.value.save_as(tmp_path / "a.npy")
    assert (np.load(tmp_path / "a.npy") == maps[2].astype(np.float16)).all()
    with tab.page.expect_download() as saved:
        tab.page.click("#png")
    assert saved.value.suggested_filename == "conv_in.call0.channel2.png"
    saved.value.save_as(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (16, 16)
    tab.page.keyboard.press("ArrowRight")
    tab.wait("document.getElementById('large-title').innerText.endsWith('channel 3')")
    tab.page.hover("#large-canvas")
    tab.wait("document.getElementById('large-value').innerText.startsWith('row')")
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("#large").is_visible()


def test_a_channel_that_is_too_large_for_float16(browser: Any, tmp_path: Path) -> None:
    x = np.linspace(-1e5, 7e4, 48, dtype=np.float32).reshape(1, 6, 8)
    shot = Snapshot(read=lambda: x, shape=(1, 6, 8))
    page(tmp_path / "a.html", [FeatureMap(name="mid", box="mid", snapshots=[shot])])
    opened = Tab(browser, tmp_path / "a.html", "#map=mid")
    opened.page.keyboard.press("l")
    opened.wait("document.getElementById('large').dataset.shown")
    assert "exact values in float32" in opened.text("#large-note")
    with opened.page.expect_download() as saved:
        opened.page.click("#npy")
    saved.value.save_as(tmp_path / "a.npy")
    assert (np.load(tmp_path / "a.npy") == x[0]).all()
    opened.context.close()


def test_a_channel_without_exact_values_says_so(browser: Any, tmp_path: Path) -> None:
    page(tmp_path / "a.html", maps_of(steps=False), detailed=0, store="maps.zarr")
    opened = Tab(browser, tmp_path / "a.html", "#map=down.0")
    opened.page.keyboard.press("l")
    opened.wait("document.getElementById('large').dataset.shown")
    assert 'sdconv.open_maps("maps.zarr")' in opened.text("#large-note")
    assert opened.page.is_disabled("#npy")
    assert not opened.page.is_disabled("#png")
    opened.context.close()


def test_two_steps_are_compared_side_by_side(tab: Tab) -> None:
    assert not tab.page.locator("#compared").is_visible()
    tab.page.select_option("#compare", "2 conditional")
    tab.wait("!document.getElementById('compared').hidden")
    tab.address("compare=2")
    assert not tab.page.locator("#images").is_visible()
    heads = tab.page.locator(".versus").all_inner_texts()
    assert "call 0" in heads[0] and "call 2" in heads[1]
    scales = tab.page.locator("#compared .scale").all_inner_texts()
    assert scales[0] == scales[1] != scales[2]
    # the made-up maps grow by 1 with each step, in the mean over channels too
    tab.page.click('[data-block="mid"]')
    tab.shows("mid")
    tab.page.click("#compared canvas[aria-label^='Channel'][aria-label*=', A']")
    tab.wait("document.getElementById('large').open")
    tab.page.keyboard.press("Escape")
    canvas = tab.page.locator("#compared canvas[aria-label^='Mean over channels, B minus A']")
    low, high = re.findall(r"[\d.]+", canvas.get_attribute("aria-label"))
    assert low == high and float(high) == pytest.approx(2, abs=0.5)
    tab.page.select_option("#compare", "")
    tab.wait("document.getElementById('compared').hidden")


def test_the_layers_of_a_block_and_their_kernels(tab: Tab) -> None:
    assert tab.page.locator("#layers-body tr").count() == 1
    assert "true stride" in tab.text("#layers-head").lower()
    tab.page.click("#kernels summary")
    tab.wait("document.getElementById('kernels').dataset.shown === 'conv_in'")
    titles = "#kernel-figures figcaption b"
    assert tab.page.locator(titles).all_inner_texts() == [
        "Kernels as colours",
        "Slices",
        "Norms",
        "By position",
    ]
    tab.page.click('[data-block="down.0"]')
    tab.shows("down.0")
    assert tab.page.locator("#layers-body button").all_inner_texts() == ["conv1", "conv2"]
    tab.page.click("#layers-body button:text-is('conv2')")
    tab.wait("document.getElementById('kernels').dataset.shown === 'down.0.conv2'")
    assert tab.page.locator(titles).all_inner_texts() == ["Absolute weights"]
    tab.page.click('[data-block="mid"]')
    tab.shows("mid")
    assert not tab.page.locator("#layers").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_other_views_fit_a_narrow_window(browser: Any, report: Path, scheme: str) -> None:
    fragment = "#map=conv_in&step=0&compare=2+conditional"
    narrow = {"width": 400, "height": 800}
    opened = Tab(browser, report, fragment, color_scheme=scheme, viewport=narrow)
    opened.page.click("#kernels summary")
    opened.wait("document.getElementById('kernels').dataset.shown === 'conv_in'")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.page.evaluate(CUT) == []
    opened.page.keyboard.press("l")
    opened.wait("document.getElementById('large').dataset.shown")
    outside = opened.page.eval_on_selector_all(
        "#large *",
        """all => all.filter(one => one.getBoundingClientRect().right > innerWidth
            || one.getBoundingClientRect().bottom > innerHeight).map(one => one.id)""",
    )
    assert outside == []
    opened.context.close()
