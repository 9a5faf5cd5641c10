"""The network as a U: which block stands where, and what is handed across."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers import seeded
from helpers.paths import WEIGHTS

import sdconv
from sdconv.report.features.connect import block_outputs, drawing_of
from sdconv.report.features.drawing import Arm, Block, Drawing, drawn
from sdconv.report.features.geometry import geometry


@pytest.fixture(scope="module")
def unet() -> Drawing:
    network = sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32)
    return drawing_of(sdconv.features(network, 16))


@pytest.fixture(scope="module")
def vae() -> Drawing:
    network = seeded.network(seeded.kl((32, 32, 32), 4, True, layers_per_block=1))
    return drawing_of(sdconv.features(network, 64))


def arms(drawing: Drawing, arm: Arm) -> list[tuple[str, int]]:
    return [(block.name, block.level) for block in drawing.path if block.arm is arm]


def test_a_unet_goes_down_and_up_its_levels(unet: Drawing) -> None:
    down, up = arms(unet, Arm.down), arms(unet, Arm.up)
    assert [level for _, level in down] == sorted(level for _, level in down)
    assert [level for _, level in up] == sorted((level for _, level in up), reverse=True)
    assert {level for _, level in down} == {level for _, level in up} == {0, 1, 2}
    assert down[0] == ("conv_in", 0)
    assert up[-1] == ("conv_out", 0)
    assert ("down_blocks.0.downsamplers.0", 1) in down
    assert ("up_blocks.0.upsamplers.0", 1) in up
    assert {name.split(".")[0] for name, _ in arms(unet, Arm.base)} == {"mid_block"}
    assert not [name for name in unet.places if "time" in name]


def test_skips_join_the_levels_of_a_unet_and_do_not_cross(unet: Drawing) -> None:
    pairs = [(source, target) for source, target, _ in unet.skips]
    assert ("conv_in", "up_blocks.2.resnets.1") in pairs
    assert ("down_blocks.1.downsamplers.0", "up_blocks.0.resnets.1") in pairs
    targets = [b.name for b in unet.path if b.name.startswith("up_") and b.kind == "resnet"]
    assert sorted(target for _, target in pairs) == sorted(targets)
    places = unet.places
    for (a, b, over), (c, d, beyond) in combinations(unet.skips, 2):
        assert places[a][1] == places[b][1]
        if places[a][1] == places[c][1] and over < beyond:
            assert places[c][0] < places[a][0] < places[b][0] < places[d][0]


def test_an_autoencoder_meets_at_its_latents(vae: Drawing) -> None:
    assert not vae.skips
    assert {name.split(".")[0] for name, _ in arms(vae, Arm.down)} == {"encoder"}
    assert {name.split(".")[0] for name, _ in arms(vae, Arm.up)} == {"decoder"}
    base = [name for name, _ in arms(vae, Arm.base)]
    assert base.index("quant_conv") + 1 == base.index("post_quant_conv")
    assert arms(vae, Arm.down)[0] == ("encoder.conv_in", 0)
    assert arms(vae, Arm.up)[0] == ("decoder.up_blocks.0.resnets.0", 2)
    assert arms(vae, Arm.up)[-1] == ("decoder.conv_out", 0)


def test_a_tiny_autoencoder_has_levels_by_its_strides() -> None:
    fields = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    fields |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    drawing = drawing_of(sdconv.features(seeded.network(seeded.tiny(**fields)), 32))
    assert {level for _, level in arms(drawing, Arm.down)} == {0, 1}
    assert {level for _, level in arms(drawing, Arm.up)} == {0, 1}
    assert arms(drawing, Arm.up)[-1][1] == 0


def test_no_two_boxes_touch_and_all_are_on_the_sheet(unet: Drawing, vae: Drawing) -> None:
    for drawing in (unet, vae):
        assert len(drawing.places) == len(drawing.path)
        for (x, y), (u, v) in combinations(drawing.places.values(), 2):
            assert y != v or abs(x - u) > 0.99
        for x, y in drawing.places.values():
            assert 0 <= x <= drawing.columns - 0.99
            assert y < drawing.rows
        placed = geometry(drawing, {})
        assert all(y + placed["side"] < placed["height"] for _, y in placed["corners"].values())
        assert len(placed["lines"]) == len(drawing.steps) + len(drawing.skips)


def test_what_lies_aside_of_the_path_has_a_box_only_if_captured() -> None:
    network = sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32)
    points = sdconv.features(network, 16)
    drawing = drawing_of(points, ["time_embedding", "mid_block.resnets.0:temb"])
    assert arms(drawing, Arm.aside) == [("time_embedding", 0)]
    assert "time_embedding" not in {name for step in drawing.steps for name in step}


def test_block_outputs_are_each_others_inputs() -> None:
    network = seeded.network(seeded.kl((32, 32), 4, True, layers_per_block=1))
    names = block_outputs(sdconv.features(network, 32))
    assert names[:3] == [
        "encoder.conv_in",
        "encoder.down_blocks.0.resnets.0",
        "encoder.down_blocks.0.downsamplers.0",
    ]
    assert names[-1] == "decoder.conv_out"
    assert not [name for name in names if name.endswith(("conv1", "norm2", "to_q"))]


def test_one_row_or_none() -> None:
    one = drawn([Block(name="a", kind="conv", arm=Arm.base, level=0)])
    assert (one.columns, one.rows, one.places["a"]) == (1, 1, (0, 0))
    right = drawn([Block(name=n, kind="conv", arm=Arm.up, level=0) for n in "ab"])
    assert [right.places[name][0] for name in "ab"] == [0, 1]
