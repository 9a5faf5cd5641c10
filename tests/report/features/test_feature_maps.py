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
    assert facts["encoder.conv_out"]["true stride"] == "2"
    assert facts["decoder.conv_out"]["true stride"] == "1/2"  # of the latents


def test_facts_show_kernel_stride_and_padding_of_a_convolution() -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    points = sdconv.features(network, 32)
    expected = {
        "encoder.down_blocks.0.downsamplers.0": ("3 \u00d7 3", "2", "1 below, 1 right"),
        "encoder.conv_out": ("3 \u00d7 3", "1", "1"),
        "quant_conv": ("1 \u00d7 1", "1", "0"),
        "encoder.down_blocks.0.resnets.0": (None, None, None),
    }
    with torch.no_grad(), sdconv.capture(network, list(expected)) as maps:
        network.encode(torch.zeros(1, 3, 32, 32))
    found = feature_maps(maps, points, drawing_of(points, maps))
    terms = ("kernel", "stride", "padding")
    assert {one.name: tuple(map(one.facts.get, terms)) for one in found} == expected


def test_tokens_have_the_rows_and_columns_of_their_layer() -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    points = sdconv.features(network, (8, 32))
    with torch.no_grad(), sdconv.capture(network, "encoder.*.group_norm") as maps:
        network.encode(torch.zeros(1, 3, 8, 32))
    (found,) = feature_maps(maps, points, drawing_of(points, maps))
    assert [one.shape for one in found.snapshots] == [(32, 4, 16)]  # 64 tokens, not of 8 x 8


def test_attention_is_shown_by_what_is_attended_to() -> None:
    """Of each token of a prompt, where the image attends to it."""
    unet = sdconv.load("tiny-unet", dtype=torch.float32)
    points = sdconv.features(unet, (8, 16))
    names = ["up_blocks.1*attn2:probs", "mid_block*attn1:probs", "mid_block.resnets.0"]
    with torch.no_grad(), sdconv.capture(unet, names) as maps:
        unet(torch.randn(1, 4, 8, 16), 500, torch.eye(4)[None])
    found = {one.unit: one for one in feature_maps(maps, points, drawing_of(points, maps))}
    assert set(found) == {"position", "channel", "token"}
    of_tokens = found["token"]
    (snapshot,) = of_tokens.snapshots
    assert snapshot.shape == (4, 4, 8)
    probabilities = maps[of_tokens.name]
    assert isinstance(probabilities, torch.Tensor) and probabilities.shape == (1, 4, 32, 4)
    expected = probabilities[0, :, :, 1].mean(0).reshape(4, 8)
    assert torch.allclose(torch.from_numpy(snapshot.read()[1]), expected)
    assert "over heads" in of_tokens.facts["shown"]
    assert "shown" not in found["channel"].facts
    assert found["position"].snapshots[0].shape == (8, 2, 4)


def test_other_runs_stand_next_to_this_one() -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    points = sdconv.features(network, 32)
    runs = []
    for value in (0.0, 1.0):
        with torch.no_grad(), sdconv.capture(network, ["encoder.conv_in", "quant_conv"]) as maps:
            network.encode(torch.full((1, 3, 32, 32), value))
        runs.append(maps)
    (first, _) = feature_maps(runs[0], points, drawing_of(points), {"other": runs[1]})
    assert [one.half for one in first.snapshots] == ["this run", "other"]
    for snapshot, maps in zip(first.snapshots, runs, strict=True):
        assert (snapshot.read() == maps["encoder.conv_in"][0].numpy()).all()
    (alone, _) = feature_maps(runs[0], points, drawing_of(points))
    assert [one.half for one in alone.snapshots] == [None]
