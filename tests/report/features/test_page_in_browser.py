"""The page of feature maps in a real browser, opened from the disk."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.made import CHANNELS, IMAGE, TIMESTEPS, maps_of, page

pytestmark = pytest.mark.browser

NAMES = list(CHANNELS)


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
    page(path, maps_of(), image=IMAGE)
    return path


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


@pytest.fixture
def tab(browser: Any, report: Path) -> Iterator[Tab]:
    opened = Tab(browser, report)
    yield opened
    assert opened.messages == []
    assert {re.match(r"\w+:", url)[0] for url in opened.requests} <= {"file:", "blob:", "data:"}  # type: ignore[index]
    opened.context.close()


def test_it_opens_on_the_first_feature_map(tab: Tab) -> None:
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
        float(t.replace("\u2212", "-")) for t in tab.text("#mean-scale").strip().split("\n")
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
    tab.address("colormap=grey")
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
    opened.page.goto(report.as_uri() + "#map=nothing&step=x&sort=odd&channel=99999")
    opened.shows("conv_in")
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
@pytest.mark.parametrize("width", [380, 900, 1400])
def test_it_fits_and_can_be_read(browser: Any, report: Path, scheme: str, width: int) -> None:
    opened = Tab(browser, report, color_scheme=scheme, viewport={"width": width, "height": 800})
    across = "[document.documentElement.scrollWidth, innerWidth]"
    wide, room = opened.page.evaluate(across)
    assert wide <= room
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", dark)][:3]
    assert (max(levels) < 80) == (scheme == "dark")
    small = opened.page.eval_on_selector_all(
        "button:not([disabled])",
        """buttons => buttons.filter(one => one.offsetParent).map(one => [one.id || one.className,
            one.offsetWidth, one.offsetHeight]).filter(([, w, h]) => Math.min(w, h) < 24)""",
    )
    assert small == []
    assert opened.messages == []
    opened.context.close()


def test_every_control_has_an_accessible_name(tab: Tab) -> None:
    nameless = tab.page.eval_on_selector_all(
        "button, input, a, canvas, img",
        """all => all.filter(one => one.offsetParent && !(one.ariaLabel || one.innerText || one.alt
            || one.labels?.length)).map(one => one.outerHTML.slice(0, 90))""",
    )
    assert nameless == []


def test_a_single_call_has_no_slider(browser: Any, tmp_path: Path) -> None:
    page(tmp_path / "one.html", maps_of(steps=False))
    opened = Tab(browser, tmp_path / "one.html")
    assert not opened.page.locator("#time").is_visible()
    opened.page.keyboard.press("]")
    opened.page.keyboard.press("h")
    opened.shows("conv_in")
    assert opened.messages == []
    opened.context.close()
