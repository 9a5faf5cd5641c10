"""A changed channel shows within a second; of changes in quick turn, the last counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Tab
from helpers.explainer import IDLE, READY

pytestmark = [pytest.mark.browser, pytest.mark.slow]


POINTS = [
    "encoder.conv_in",
    "encoder.down_blocks.1.resnets.0",
    "encoder.mid_block.attentions.0",
    "latents",
    "decoder.mid_block.resnets.1",
    "decoder.up_blocks.3.resnets.2",
]
# seconds from the slider's step to the changed picture
CHANGE = """async (factor) => {
    const slider = document.querySelector("#vae .one .slider input");
    const shown = document.querySelector("#vae .python"), before = shown.dataset.value;
    const from = performance.now();
    slider.value = factor;
    slider.dispatchEvent(new Event("input"));
    while (shown.dataset.value === before) await new Promise((done) => setTimeout(done, 5));
    return (performance.now() - from) / 1000;
}"""


@pytest.fixture(scope="module")
def tab(browser: Any, explainer: Path) -> Any:
    opened = Tab(browser, explainer, "#vae")
    opened.wait(READY)
    opened.wait(IDLE)
    opened.page.wait_for_timeout(1500)  # the compiler's second, faster code is ready
    opened.wait(IDLE)
    yield opened
    assert opened.messages == []
    opened.context.close()


@pytest.mark.parametrize("point", POINTS)
def test_a_changed_channel_shows_within_a_second(point: str, tab: Tab) -> None:
    tab.page.evaluate(f"location.hash = 'vae&vae.channel=1&vae.point={point}'")
    tab.page.wait_for_timeout(300)
    tab.wait(IDLE)
    seconds = []
    for factor in (0, 2, 0.5):
        seconds.append(tab.page.evaluate(CHANGE, factor))
        tab.page.wait_for_timeout(100)
        tab.wait(IDLE)
    print(point, seconds, os.getloadavg()[0])
    if os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5:
        pytest.skip(f"the machine is busy: seconds say little; it took {min(seconds):.2f}")
    assert min(seconds) < 1


def test_of_changes_in_quick_turn_the_last_counts(tab: Tab) -> None:
    pixel = "JSON.parse(document.querySelector('#vae .python').dataset.value)"
    tab.page.evaluate("location.hash = 'vae&vae.edits=decoder.conv_in:3:0.75'")
    tab.page.wait_for_timeout(300)
    tab.wait(IDLE)
    tab.page.wait_for_timeout(300)
    expected = tab.page.evaluate(pixel)
    tab.page.evaluate("location.hash = 'vae&vae.point=decoder.conv_in&vae.channel=3'")
    tab.page.wait_for_timeout(300)
    tab.wait(IDLE)
    assert tab.page.evaluate(pixel) != expected
    tab.page.evaluate(
        """async () => {
            const slider = document.querySelector("#vae .one .slider input");
            for (const factor of [4, -2, 3, 0, 0.75]) {
                slider.value = factor;
                slider.dispatchEvent(new Event("input"));
                explainer.vae.decodedWith({ shift: -1 }); // in between: it gives way
                explainer.vae.gradient("latents", 0, 3, 3);
                await new Promise((done) => setTimeout(done, 30));
            }
        }"""
    )
    tab.wait(IDLE)
    tab.page.wait_for_timeout(500)
    tab.wait(IDLE)
    assert tab.page.evaluate(pixel) == pytest.approx(expected, abs=1e-6)
