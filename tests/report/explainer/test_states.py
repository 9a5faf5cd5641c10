"""The explainer keeps its state in the address, needs no network, and says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Tab
from helpers.explainer import IDLE, READY

pytestmark = [pytest.mark.browser, pytest.mark.slow]


# every value of every section, away from its default
STATES = {
    "page.theme": "dark",
    "lists.a": "1, 1",
    "lists.b": "2, 3",
    "lists.n": "1",
    "kernel.w": "0,0,0,0,1,0,0,0,0",
    "kernel.i": "3",
    "kernel.j": "4",
    "padding.size": "9",
    "padding.kernel": "5",
    "padding.stride": "3",
    "padding.kind": "same",
    "padding.guess": "3",
    "padding.shown": "true",
    "padding.levels": "2",
    "padding.side": "both",
    "padding.run": "7",
    "padding.answer": "B",
    "look.layer": "decoder.conv_in",
    "look.channel": "2",
    "look.i": "5",
    "look.j": "6",
    "field.heat": "false",
    "field.zoom": "false",
    "shift.x": "3",
    "shift.y": "-2",
    "switch.norm": "false",
    "switch.silu": "false",
    "switch.shortcut": "false",
    "switch.nearest": "false",
    "residual.block": "decoder.up_blocks.0.resnets.1",
    "residual.channel": "7",
    "up.how": "nearest",
    "up.size": "4",
    "up.on": "photo",
    "up.i": "2",
    "up.j": "1",
    "vae.point": "decoder.conv_in",
    "vae.channel": "9",
    "vae.edits": "latents:1:0.5",
    "vae.i": "10",
    "vae.j": "11",
    "vae.compare": "true",
    "cost.inputs": "3",
    "cost.outputs": "5",
    "cost.kernel": "7",
    "cost.stride": "2",
    "cost.size": "32",
    "winograd.d": "4, 3, 2, 1",
    "winograd.g": "1, 1, 1",
}
CHOSEN = """() => [...document.querySelectorAll("main input, main select")].map((one) =>
    one.type === "radio" || one.type === "checkbox" ? one.checked : one.value)"""


def test_every_state_is_restored_from_the_address(browser: Any, explainer: Path) -> None:
    words = "&".join(f"{name}={value}" for name, value in STATES.items())
    first = Tab(browser, explainer, f"#vae&{words}")
    first.wait(READY)
    first.wait(IDLE)
    plain = Tab(browser, explainer)
    plain.wait(READY)
    # one step writes the address anew, from what was read of it
    first.page.locator("#cost .slider input").first.press("ArrowRight")
    first.wait("location.hash.includes('cost.inputs=4')")
    kept = first.page.evaluate("decodeURIComponent(location.hash)")
    missing = [n for n, v in STATES.items() if f"{n}={v}" not in kept and n != "cost.inputs"]
    assert missing == []
    shown = first.page.evaluate(CHOSEN)
    second = Tab(browser, explainer, "#" + kept[1:])
    second.wait(READY)
    second.wait(IDLE)
    assert second.page.evaluate(CHOSEN) == shown
    assert plain.page.evaluate(CHOSEN) != shown
    for tab in (first, second, plain):
        assert tab.messages == []
        tab.context.close()


def test_switches_and_runs_write_the_address(browser: Any, explainer: Path) -> None:
    tab = Tab(browser, explainer)
    tab.wait(READY)
    tab.page.click("#theme")
    tab.wait("location.hash.includes('page.theme=light')")
    tab.page.locator("#padding .toggle").click()
    tab.wait("location.hash.includes('padding.flicker=true')")
    tab.wait("location.hash.includes('padding.side=both')")
    tab.page.locator("#padding .toggle").click()
    tab.page.click("#padding >> text=Run the network both ways")
    tab.wait("/padding.run=[0-9]+/.test(location.hash)")
    tab.page.click("#reset")
    tab.wait("!location.hash.includes('=')")
    assert tab.page.inner_text("#theme") == "Colours: auto"
    assert tab.messages == []
    tab.context.close()


def test_it_computes_without_a_network(browser: Any, explainer: Path) -> None:
    tab = Tab(browser, explainer, "#vae", offline=True)
    tab.wait(READY)
    tab.wait("Boolean(document.querySelector('#vae .python').dataset.value)")
    assert tab.messages == []
    tab.context.close()


@pytest.mark.parametrize(
    "script",
    [
        "Object.defineProperty(globalThis, 'WebAssembly', { value: undefined })",
        "WebAssembly.validate = () => false",
    ],
)
def test_a_browser_without_simd_is_told_what_is_needed(
    script: str, browser: Any, explainer: Path
) -> None:
    tab = Tab(browser, explainer, "#vae&padding.run=7", script=script)
    tab.wait(READY)
    words = tab.page.inner_text("[role=alert]#trouble")
    assert "WebAssembly with SIMD" in words and "Safari 16.4" in words
    assert tab.page.is_disabled("#padding >> text=Run the network both ways")
    for section in ("neuron", "field", "shift", "blocks", "vae", "cost"):
        tab.page.evaluate(f"document.getElementById({section!r}).scrollIntoView()")
    tab.wait("shift.dataset.differences !== undefined")  # what needs no network still works
    assert tab.messages == []
    tab.context.close()


def test_with_simd_there_is_no_such_message(browser: Any, explainer: Path) -> None:
    tab = Tab(browser, explainer)
    tab.wait(READY)
    assert tab.page.is_hidden("#trouble")
    tab.context.close()
