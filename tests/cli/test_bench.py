"""The command that times the backends and explains how the fast one computes each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import answer, run
from helpers.paths import WEIGHTS

from sdconv.analysis.explain import Explanation, explain
from sdconv.cli.common import parse_dtype
from sdconv.config import AutoencoderKLConfig
from sdconv.fast.cpu import conv
from sdconv.fast.cpu.cost_model import ConvPlan
from sdconv.fast.cpu.weight_cache import weight_cache

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
    assert found["decoder.up_blocks.2.upsamplers.0"] == "winograd"
    assert found["encoder.down_blocks.0.downsamplers.0"] == "winograd"
    assert "decoder.up_blocks.2.upsamplers.0.conv" not in found
    assert "encoder.down_blocks.0.downsamplers.0.conv" not in found
    assert "decoder.up_blocks.2.resnets.0.conv_shortcut" not in found


def test_each_kind_has_its_methods_and_the_cheapest_is_taken() -> None:
    layers = explain(USUAL, (64, 64)).layers
    methods: dict[str, set[str]] = {layer.kind: set() for layer in layers}
    for layer in layers:
        methods[layer.kind].add(layer.method)
    assert methods["conv3x3"] >= {"winograd", "winograd_uncached", "direct"}
    assert methods["upsample_conv"] == {"winograd", "winograd_uncached"}
    assert methods["downsample_conv"] == {"winograd"}
    for layer in layers:
        if layer.costs:
            assert layer.costs[layer.method] == min(layer.costs.values()), layer


def test_without_room_no_weight_is_cached() -> None:
    found = explain(USUAL, (512, 512), limit=0)
    assert set(by_name(found).values()) == {"winograd_uncached", "direct", "torch", "image_conv"}
    assert found.memory == 0
    assert any("no room" in layer.reason for layer in found.layers)
    whole = explain(USUAL, (512, 512))
    half = explain(USUAL, (512, 512), limit=whole.memory // 2)
    assert 0 < half.memory <= whole.memory // 2


@pytest.mark.parametrize(("path", "size", "dtype"), [
    (VAE, "128x96", "float32"), (VAE, "128x96", "bf16"), (UNET, "33x32", "float32"),
    (UNET, "33x32", "fp16"),
])  # fmt: skip
def test_the_plans_explained_are_those_that_run(
    path: Path, size: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watches the function that plans convolutions."""
    own, ran = conv.plan_for, []
    own_image_conv = conv.image_conv

    def watched(kind: Any, x: torch.Tensor, weight: torch.Tensor, normalised: bool) -> ConvPlan:
        plan = own(kind, x, weight, normalised)
        ran.append((kind, tuple(weight.shape[:2]), tuple(x.shape[2:]), plan.method))
        return plan

    def watched_image_conv(x: torch.Tensor, weight: torch.Tensor, *args: Any, **named: Any) -> Any:
        ran.append(("conv3x3", tuple(weight.shape[:2]), tuple(x.shape[2:]), "image_conv"))
        return own_image_conv(x, weight, *args, **named)

    monkeypatch.setattr(conv, "plan_for", watched)
    monkeypatch.setattr(conv, "image_conv", watched_image_conv)
    timed = answer("bench", path, "--size", size, "--dtype", dtype, "--rounds", "1")
    explained = answer("bench", path, "--size", size, "--dtype", dtype, "--explain")
    assert timed["dtype"] == explained["dtype"] == parse_dtype(dtype)
    layers = explained["layers"]
    said = [
        (one["kind"], (one["out_channels"], one["channels"]), tuple(one["size"]), one["method"])
        for one in layers
        if one["method"] != "torch"
    ]
    assert said
    assert sorted(set(ran)) == sorted(set(said))
    assert len(ran) == 2 * len(said)  # a first fast call, and one round


def test_upsampling_to_an_odd_size_is_left_to_torch() -> None:
    def methods(size: str) -> set[str]:
        layers = answer("bench", UNET, "--size", size, "--explain")["layers"]
        return {one["method"] for one in layers if one["kind"] == "upsample_conv"}

    assert "torch" not in methods("32")
    assert "torch" in methods("33")


def test_explaining_packs_no_weights() -> None:
    before = weight_cache.memory
    explain(USUAL, (64, 64))
    assert weight_cache.memory == before


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
    assert found["limit"] == weight_cache.limit


def test_tables() -> None:
    shown = run("bench", VAE, "--size", "64", "--rounds", "1")
    assert shown.exit_code == 0
    assert "times as fast" in shown.stdout
    explained = run("bench", VAE, "--size", "64", "--explain").stdout
    assert "decoder.up_blocks.0.upsamplers.0" in explained
    assert "upsample_conv" in explained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no-such-file.safetensors",), "no-such-file.safetensors"),
        ((VAE, "--size", "big"), "not a size"),
        ((VAE, "--size", "1"), "invalid size for this network"),
        ((UNET, "--size", "70000", "--explain"), "invalid size for this network"),
        ((VAE, "--size", "65536"), "the image is too large for the free memory"),
        ((VAE, "--component", "unet"), "no such component"),
        ((VAE, "--rounds", "0"), "--rounds"),
        ((VAE, "--dtype", "float64", "--explain"), "expected: float32 or float16 or bfloat16"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], words: str) -> None:
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert "--memory" not in result.stderr, "an option that it lacks"
