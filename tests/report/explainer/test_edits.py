"""Changed channels hold in every section, and its Python lines print the changed numbers."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import Tab
from helpers.explainer import READY, python_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LATER = "look.layer=decoder.up_blocks.0.upsamplers.0&look.channel=2&look.i=30&look.j=31"


def printed(code: str) -> Any:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return np.atleast_1d(json.loads(out.getvalue()))


@pytest.mark.parametrize(
    ("state", "edits", "done"),
    [
        ("neuron", "encoder.conv_in:12:2", "Boolean(neuron.dataset.sum)"),
        (f"neuron&{LATER}", "latents:1:0;decoder.conv_in:3:-1", "Boolean(neuron.dataset.sum)"),
        (f"field&{LATER}", "latents:1:0.5;encoder.conv_in:3:3", "Boolean(field.dataset.painted)"),
        (
            "blocks&residual.block=decoder.mid_block.resnets.1",
            "decoder.mid_block.resnets.1:12:3",
            "Boolean(document.querySelectorAll('#blocks .python')[1].dataset.value)",
        ),
    ],
)
def test_python_prints_the_changed_numbers(
    state: str, edits: str, done: str, browser: Any, explainer: Path
) -> None:
    tab = Tab(browser, explainer, f"#{state}&vae.edits={edits}")
    tab.wait(READY)
    tab.wait(done)
    assert tab.page.evaluate("Object.keys(explainer.vae.announced.edits).length") > 0
    figure = tab.page.locator(f"#{state.split('&')[0]} .python").nth(
        int(state.startswith("blocks"))
    )
    shown = np.atleast_1d(json.loads(figure.get_attribute("data-value") or ""))
    code = f"{tab.page.text_content('#setup')}\n{python_of(figure)}"
    answer = printed(code)
    scale = max(1.0, np.abs(answer).max())
    assert np.abs(shown - answer).max() <= 1e-5 * scale, code
    # the negative control: without the edits Python prints other numbers
    other = printed(code.replace("= factor", "= 1"))
    assert np.abs(shown - other).max() > 1e-3, code
    assert tab.messages == []
    tab.context.close()
