"""Heat maps for words are the U-Net's cross-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import capturing, pipelines, unets
from torch import Tensor

import sdconv
from sdconv.features import Context, recipes

NETWORKS: dict[str, Any] = {
    "diffusers": capturing.unet(),
    "sdconv": unets.ours(unets.theirs(capturing.UNET)),
}


@torch.no_grad()
def run(network: Any, *steps: float) -> list[Tensor]:
    return [network(*capturing.at(step)).sample for step in steps or (500,)]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_they_are_the_mean_of_all_cross_attention(network: Any) -> None:
    plain = run(network, 900, 100)
    with recipes.heat_maps(network) as heat:
        assert all(map(torch.equal, run(network, 900, 100), plain))
    assert heat.tensor.shape == (2, 7, 8, 12)
    with sdconv.capture(network, "*attn2:probs") as maps:
        run(network, 900, 100)
    layers = []
    for name in maps:
        for one in maps.series(name).tensors:
            x = one.mean(1).mT
            rows = {96: 8, 24: 4, 6: 2, 2: 1}[x.shape[2]]
            grid = x.unflatten(2, (rows, -1))
            layers.append(torch.nn.functional.interpolate(grid, (8, 12), mode="bicubic"))
    expected = torch.stack(layers).clamp(min=0).mean(0)
    assert torch.allclose(heat.tensor, expected, atol=1e-6)
    assert torch.allclose(heat[3], expected[:, 3], atol=1e-6)
    assert torch.allclose(heat[[1, 2]], expected[:, 1:3].mean(1), atol=1e-6)
    with recipes.heat_maps(network, steps=1) as second:
        run(network, 900, 100)
    assert not torch.allclose(second.tensor, heat.tensor, atol=1e-6)


def test_a_word_is_found_where_the_attention_is_put() -> None:
    pipe = pipelines.pipeline("text")
    given = {"prompt": "a cat sat", "negative_prompt": "", "generator": None}
    rows, columns = pipelines.HEIGHT // 8, pipelines.WIDTH // 8
    numbers = [2, 3, 4]  # after the begin token and "a": a token for each letter of "cat"

    def left(x: Tensor, _: Context) -> Tensor:
        """All attention to the word in the left half, none to it in the right half."""
        for factor in (1, 2, 4):
            grid = (-(-rows // factor), -(-columns // factor))
            if grid[0] * grid[1] == x.shape[2]:
                maps = x.unflatten(2, grid)
                maps[:, :, :, : grid[1] // 2] = 0
                maps[:, :, :, : grid[1] // 2, numbers] = 1 / len(numbers)
                maps[:, :, :, grid[1] // 2 :, numbers] = 0
                return x
        raise AssertionError(x.shape)

    with sdconv.edit(pipe, {"unet.*attn2:probs": left}):
        with recipes.heat_maps(pipe, "a cat sat") as heat:
            pipelines.run(pipe, "text", **given)
    cat, sat = heat["cat"][0], heat["sat"][0]
    assert cat.shape == (rows, columns)
    half = columns // 2
    assert cat[:, : half - 2].mean() > 0.3
    assert cat[:, half + 2 :].mean() < 0.02
    assert sat[:, half + 2 :].mean() > 10 * sat[:, : half - 2].mean()
    with pytest.raises(sdconv.InputError, match="does not contain this word"):
        heat["dog"]


def test_only_the_half_that_follows_the_prompt_counts() -> None:
    pipe = pipelines.pipeline("text")
    found = []
    for negative in ("a mouse", "two"):
        with recipes.heat_maps(pipe, "a cat", steps=0) as heat:
            pipelines.run(pipe, "text", prompt="a cat", negative_prompt=negative, generator=None)
        found.append(heat.tensor)
    assert found[0].shape[0] == 1


def test_what_is_refused() -> None:
    network = NETWORKS["diffusers"]
    with recipes.heat_maps(network) as heat:
        with pytest.raises(sdconv.SdconvError, match="no cross-attention was computed"):
            _ = heat.tensor
        run(network)
    for word in (7, -1, []):
        with pytest.raises(sdconv.InputError, match="no such token"):
            heat[word]
    with pytest.raises(sdconv.InputError, match="tokens are not known"):
        heat["cat"]
    with pytest.raises(sdconv.InputError, match="tokenizer"), recipes.heat_maps(network, "a cat"):
        pass
    with pytest.raises(sdconv.InputError, match="no cross-attention"):
        with recipes.heat_maps(unets.theirs(unets.smallest("no transformers"))):
            pass
