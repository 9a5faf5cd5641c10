"""The command that times the backends, and what it says of the fast one's choices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import answer, run
from helpers.paths import WEIGHTS

from sdconv.analysis.explain import Explanation, explain
from sdconv.config import AutoencoderKLConfig
from sdconv.fast.cpu import chosen
from sdconv.fast.cpu.cost_model import Choice
from sdconv.fast.cpu.weight_cache import prepared

VAE, UNET = WEIGHTS / "tiny-vae.safetensors", WEIGHTS / "tiny-unet.safetensors"
USUAL = AutoencoderKLConfig(
    **{
        **AutoencoderKLConfig.assumed,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
)


def by_name(found: Explanation) -> dict[str, str]:
    return {layer.name: layer.method for layer in found.layers}


def test_known_layers_of_the_usual_vae() -> None:
    found = by_name(explain(USUAL, (512, 512)))
    assert found["decoder.conv_in"] == "torch"
    assert found["decoder.up_blocks.2.resnets.1.conv2"] == "winograd"
    assert found["decoder.up_blocks.2.upsamplers.0"] == "doubling"
    assert "decoder.up_blocks.2.upsamplers.0.conv" not in found
    assert "encoder.down_blocks.0.downsamplers.0.conv" not in found
    assert "decoder.up_blocks.2.resnets.0.conv_shortcut" not in found


def test_the_choice_is_the_cheapest() -> None:
    layers = explain(USUAL, (64, 64)).layers
    assert {layer.method for layer in layers} >= {"winograd", "packed", "direct", "doubling"}
    for layer in layers:
        if layer.costs:
            assert layer.costs[layer.method] == min(layer.costs.values()), layer


def test_without_room_everything_is_direct() -> None:
    found = explain(USUAL, (512, 512), limit=0)
    assert set(by_name(found).values()) == {"direct", "torch"}
    assert found.memory == 0
    assert any("no room" in layer.reason for layer in found.layers)
    whole = explain(USUAL, (512, 512))
    half = explain(USUAL, (512, 512), limit=whole.memory // 2)
    assert 0 < half.memory <= whole.memory // 2


@pytest.mark.parametrize(("path", "size"), [(VAE, "128x96"), (UNET, "33x32")])
def test_what_is_explained_is_what_a_run_chooses(
    path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, ran = chosen.choice_for, []

    def watched(x: torch.Tensor, weight: torch.Tensor, normalised: bool) -> Choice:
        choice = own(x, weight, normalised)
        ran.append((tuple(weight.shape[:2]), tuple(x.shape[2:]), choice.method))
        return choice

    monkeypatch.setattr(chosen, "choice_for", watched)
    answer("bench", path, "--size", size, "--rounds", "1")
    layers = answer("bench", path, "--size", size, "--explain")["layers"]
    said = [
        ((one["out_channels"], one["channels"]), tuple(one["size"]), one["method"])
        for one in layers
        if one["method"] != "torch" and not one["doubling"]
    ]
    assert said
    assert sorted(set(ran)) == sorted(set(said))
    assert len(ran) == 2 * len(said)  # a first fast call, and one round


def test_a_map_of_odd_size_is_not_doubled() -> None:
    def doublings(size: str) -> set[str]:
        layers = answer("bench", UNET, "--size", size, "--explain")["layers"]
        return {one["method"] for one in layers if one["doubling"]}

    assert doublings("32") == {"doubling"}
    assert "torch" in doublings("33")


def test_nothing_is_prepared_by_explaining() -> None:
    before = prepared.memory
    explain(USUAL, (64, 64))
    assert prepared.memory == before


@pytest.mark.parametrize(("path", "works"), [(VAE, ["encode", "decode"]), (UNET, ["forward"])])
def test_times(path: Path, works: list[str]) -> None:
    found = answer("bench", path, "--size", "64" if path == VAE else "16", "--rounds", "2")
    assert [row["work"] for row in found["rows"]] == works
    for row in found["rows"]:
        assert len(row["reference"]) == len(row["fast"]) == 2
        # two backends, which round differently, of one function
        assert 0 < row["difference"] < 1e-4
        assert row["first"] > 0
        middle = {name: sum(row[name]) / 2 for name in ("reference", "fast")}
        assert row["ratio"] == pytest.approx(middle["reference"] / middle["fast"])
    assert found["limit"] == prepared.limit


def test_tables() -> None:
    shown = run("bench", VAE, "--size", "64", "--rounds", "1")
    assert shown.exit_code == 0
    assert "times as fast" in shown.stdout
    explained = run("bench", VAE, "--size", "64", "--explain").stdout
    assert "decoder.up_blocks.0.upsamplers.0" in explained
    assert "doubling" in explained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no-such-file.safetensors",), "no-such-file.safetensors"),
        ((VAE, "--size", "big"), "not a size"),
        ((VAE, "--size", "1"), "no size for this network"),
        ((UNET, "--size", "70000", "--explain"), "no size for this network"),
        ((VAE, "--size", "65536"), "the image is too large for the free memory"),
        ((VAE, "--component", "unet"), "no such component"),
        ((VAE, "--rounds", "0"), "--rounds"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], words: str) -> None:
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert "--memory" not in result.stderr, "an option that it lacks"
