"""Captured feature maps as a matplotlib figure, and as a notebook's table."""

from __future__ import annotations

import pickle
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from PIL import Image
from torch import nn

import sdconv
from sdconv.errors import InputError
from sdconv.features import CapturedMap, Maps


class Block(nn.Module):
    """Two layers, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.act(self.conv(x))
        return self.act(self.conv(x + 1))


@pytest.fixture(scope="module")
def maps() -> Maps:
    torch.manual_seed(0)
    with torch.no_grad(), sdconv.capture(block := Block(), "*") as found:
        block(torch.randn(2, 3, 16, 24))
    return found


def test_a_figure_has_a_row_for_each_feature_map(maps: Maps) -> None:
    figure = maps.plot(channels=2)
    drawings = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(drawings) == 2 * 6
    titles = [axes.get_title(loc="left") for axes in drawings]
    assert titles[0].startswith("conv\n")
    drawn = figure.axes[1].images[0].get_array()
    assert torch.allclose(torch.as_tensor(drawn), maps["conv"][-1].tensor[0].mean(0), atol=1e-6)
    variances = maps["conv"][-1].tensor[0].var((1, 2))
    assert titles[3] == f"\nchannel {variances.argmax()}"
    first = maps.plot("conv", call=0).axes[1].images[0].get_array()
    assert torch.allclose(torch.as_tensor(first), maps["conv"][0].tensor[0].mean(0), atol=1e-6)


def test_attention_is_drawn_by_what_is_attended_to() -> None:
    network = sdconv.load("tiny-unet", dtype=torch.float32)
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2:probs"
    with torch.no_grad(), sdconv.capture(network, name) as found:
        network(torch.randn(1, 4, 8, 16), 500, torch.eye(4)[None])
    figure = found.plot(channels=4)
    shown = {axes.get_title(loc="left").strip(): axes for axes in figure.axes if axes.images}
    assert {f"token {token}" for token in range(4)} <= set(shown)
    drawn = torch.as_tensor(shown["token 2"].images[0].get_array())
    probabilities = found.series(name)[0].tensor
    assert torch.allclose(drawn, probabilities[0, :, :, 2].mean(0).reshape(4, 8), atol=1e-6)
    assert found._repr_html_().count("<img") == 3


class Tokens(nn.Module):
    """A denoiser of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.norm(sample.flatten(2).mT)


def drawn_size(maps: Maps, pattern: str = "*") -> tuple[int, ...]:
    """Rows and columns of the mean in the first row of a figure."""
    return tuple(maps.plot(pattern).axes[1].images[0].get_array().shape)


def test_tokens_are_laid_out_in_the_proportions_of_the_input(tmp_path: Path) -> None:
    network = Tokens()
    with torch.no_grad(), sdconv.capture(network, "norm") as maps:
        network(torch.randn(1, 4, 4, 16), 1.0)  # 64 tokens, not of 8 x 8
    assert drawn_size(maps) == (4, 16)
    maps.save(tmp_path / "maps")
    assert drawn_size(sdconv.open_maps(tmp_path / "maps")) == (4, 16)
    (png,) = re.findall(r"src='data:image/png;base64,([^']*)'", maps._repr_html_())[:1]
    with Image.open(BytesIO(b64decode(png))) as image:
        assert image.size == (16, 4)


def test_tokens_of_an_autoencoder_are_laid_out_as_its_feature_maps() -> None:
    vae: Any = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    layers = [f"decoder.mid_block.attentions.0{part}" for part in ("", ".group_norm")]
    with torch.no_grad(), sdconv.capture(vae, layers) as maps:
        vae.decode(torch.randn(1, 4, 4, 16))
    assert drawn_size(maps, "*.group_norm") == (4, 16)


def test_a_figure_clips_outliers_and_centres_signed_values_on_zero() -> None:
    torch.manual_seed(0)
    signed = torch.randn(1, 3, 40, 40)
    signed[0, 0, 0, 0] = 500.0
    with torch.no_grad(), sdconv.capture(both := nn.Sequential(nn.Identity(), nn.ReLU()), "1") as m:
        both(signed)
    (call,) = (one.network_call for one in m.series("1"))
    maps = Maps(
        {
            name: [CapturedMap(name, call, lambda x=x: x)]
            for name, x in (  # type: ignore[misc]
                ("signed", signed),
                ("positive", signed.relu() + 1),
                ("equal", torch.ones(1, 3, 4, 4)),
            )
        },
        pipeline=False,
    )
    drawings = [axes for axes in maps.plot(channels=3).axes if axes.images]
    shown = {}
    for row, name in enumerate(maps):
        (image,) = drawings[6 * row + 3].images  # the channel with the largest variance
        shown[name] = image
    low, high = shown["signed"].get_clim()
    assert low == -high and high < 5
    assert (shown["signed"].cmap.name, shown["signed"].colorbar.extend) == ("RdBu_r", "both")
    low, high = shown["positive"].get_clim()
    assert 1 <= low < high < 5
    assert (shown["positive"].cmap.name, shown["positive"].colorbar.extend) == ("viridis", "max")
    assert shown["equal"].colorbar.extend == "neither"


def test_a_figure_can_be_written(maps: Maps, tmp_path: Path) -> None:
    figure = maps.plot("act")
    figure.savefig(tmp_path / "a.png")
    # what a notebook shows, also of one that another process has drawn
    for one in (figure, pickle.loads(pickle.dumps(figure))):
        with Image.open(BytesIO(one._repr_png_())) as shown:
            assert (shown.format, shown.height) == ("PNG", 250)  # 2.5 inches
    with torch.no_grad(), sdconv.capture(flat := nn.Sequential(nn.ReLU()), "0") as constant:
        flat(torch.zeros(1, 2, 4, 4))
    constant.plot().savefig(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patterns": "convx"}, "conv"),
        ({"call": 2}, "not captured"),
        ({"call": -3}, "not captured"),
        ({"channels": -1}, "not a number of channels"),
    ],
)
def test_what_cannot_be_drawn(maps: Maps, arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        maps.plot(**arguments)


class Cells(HTMLParser):
    """Tags and text of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_notebook_shows_a_table(maps: Maps) -> None:
    shown = Cells(maps._repr_html_())
    assert shown.tags.count("tr") == 1 + len(maps)
    assert shown.tags.count("img") == 3 * len(maps)
    assert "2 calls of 2 \u00d7 6 \u00d7 16 \u00d7 24" in shown.words


def test_a_notebook_escapes_names_and_shows_only_the_first(maps: Maps) -> None:
    series = list(maps.series("conv"))
    many = {"<script>": series, **{f"layer {at}": series for at in range(20)}}
    shown = Cells(Maps(many, pipeline=False)._repr_html_())
    assert "script" not in shown.tags
    assert "<script>" in shown.words
    assert "and 9 more" in shown.words


def test_a_notebook_shows_no_images_of_vectors(maps: Maps) -> None:
    (one, *_) = maps.series("conv")
    vector = CapturedMap("conv:temb", one.network_call, lambda: one.tensor.mean((2, 3)))
    shown = Cells(Maps({"conv:temb": [vector], "conv": [one]}, pipeline=False)._repr_html_())
    assert shown.tags.count("img") == 3
    assert "2 \u00d7 6" in shown.words
