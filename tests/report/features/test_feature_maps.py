"""The feature maps that the page shows."""

from __future__ import annotations

import torch
from helpers import seeded

import sdconv
from sdconv.report.features.drawing import drawing_of
from sdconv.report.features.feature_maps import FeatureMap, feature_maps


def test_labels_are_what_a_name_adds_to_its_box() -> None:
    names = {"a.b": "output", "a.b.conv1": "conv1", "a.b:silu1": "silu1", "other": "other"}
    assert {n: FeatureMap(name=n, box="a.b", snapshots=()).label for n in names} == names


def test_facts_say_how_much_smaller_or_larger_than_the_input() -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    points = sdconv.features(network, 32)
    names = ["encoder.conv_out", "decoder.conv_out"]
    with torch.no_grad(), sdconv.capture(network, names) as maps:
        network(torch.zeros(1, 3, 32, 32))
    facts = {one.name: one.facts for one in feature_maps(maps, points, drawing_of(points, maps))}
    assert facts["encoder.conv_out"]["downscale"] == "2"
    assert facts["decoder.conv_out"]["upscale"] == "2"


def test_facts_show_kernel_stride_and_padding_of_a_convolution() -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    points = sdconv.features(network, 32)
    expected = {
        "encoder.down_blocks.0.downsamplers.0": "3 \u00d7 3, stride 2, padding 1 below, 1 right",
        "encoder.conv_out": "3 \u00d7 3, stride 1, padding 1",
        "quant_conv": "1 \u00d7 1, stride 1, padding 0",
        "encoder.down_blocks.0.resnets.0": None,
    }
    with torch.no_grad(), sdconv.capture(network, list(expected)) as maps:
        network.encode(torch.zeros(1, 3, 32, 32))
    found = feature_maps(maps, points, drawing_of(points, maps))
    assert {one.name: one.facts.get("convolution") for one in found} == expected
