"""The drawing of a network: where boxes are placed, and which skips join them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers import seeded
from helpers.paths import WEIGHTS

import sdconv
from sdconv.report.features.drawing import (
    Box,
    Branch,
    Drawing,
    block_outputs,
    drawing_of,
    lay_out,
)
from sdconv.report.features.geometry import geometry


@pytest.fixture(scope="module")
def unet() -> Drawing:
    network = sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32)
    return drawing_of(sdconv.features(network, 16))


@pytest.fixture(scope="module")
def vae() -> Drawing:
    network = seeded.network(seeded.kl((32, 32, 32), 4, True, layers_per_block=1))
    return drawing_of(sdconv.features(network, 64))


def on_branch(drawing: Drawing, branch: Branch) -> list[tuple[str, int]]:
    return [(box.name, box.level) for box in drawing.boxes if box.branch is branch]


def test_a_unet_has_its_levels_on_both_paths(unet: Drawing) -> None:
    down, up = on_branch(unet, Branch.down), on_branch(unet, Branch.up)
    assert [level for _, level in down] == sorted(level for _, level in down)
    assert [level for _, level in up] == sorted((level for _, level in up), reverse=True)
    assert {level for _, level in down} == {level for _, level in up} == {0, 1, 2}
    assert down[0] == ("conv_in", 0)
    assert up[-1] == ("conv_out", 0)
    assert ("down_blocks.0.downsamplers.0", 1) in down
    assert ("up_blocks.0.upsamplers.0", 1) in up
    assert {name.split(".")[0] for name, _ in on_branch(unet, Branch.mid)} == {"mid_block"}
    assert not [name for name in unet.positions if "time" in name]


def test_skips_join_the_levels_of_a_unet_and_do_not_cross(unet: Drawing) -> None:
    pairs = [(source, target) for source, target, _ in unet.skips]
    assert ("conv_in", "up_blocks.2.resnets.1") in pairs
    assert ("down_blocks.1.downsamplers.0", "up_blocks.0.resnets.1") in pairs
    targets = [b.name for b in unet.boxes if b.name.startswith("up_") and b.kind == "resnet"]
    assert sorted(target for _, target in pairs) == sorted(targets)
    positions = unet.positions
    for (a, b, over), (c, d, beyond) in combinations(unet.skips, 2):
        assert positions[a][1] == positions[b][1]
        if positions[a][1] == positions[c][1] and over < beyond:
            assert positions[c][0] < positions[a][0] < positions[b][0] < positions[d][0]


def test_encoder_and_decoder_meet_at_the_latents(vae: Drawing) -> None:
    assert not vae.skips
    assert {name.split(".")[0] for name, _ in on_branch(vae, Branch.down)} == {"encoder"}
    assert {name.split(".")[0] for name, _ in on_branch(vae, Branch.up)} == {"decoder"}
    mid = [name for name, _ in on_branch(vae, Branch.mid)]
    assert mid.index("quant_conv") + 1 == mid.index("post_quant_conv")
    assert on_branch(vae, Branch.down)[0] == ("encoder.conv_in", 0)
    assert on_branch(vae, Branch.up)[0] == ("decoder.up_blocks.0.resnets.0", 2)
    assert on_branch(vae, Branch.up)[-1] == ("decoder.conv_out", 0)


def test_levels_of_a_tiny_autoencoder_follow_its_downscale() -> None:
    fields = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    fields |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    drawing = drawing_of(sdconv.features(seeded.network(seeded.tiny(**fields)), 32))
    assert {level for _, level in on_branch(drawing, Branch.down)} == {0, 1}
    assert {level for _, level in on_branch(drawing, Branch.up)} == {0, 1}
    assert on_branch(drawing, Branch.up)[-1][1] == 0


def test_boxes_do_not_overlap_and_stay_inside(unet: Drawing, vae: Drawing) -> None:
    for drawing in (unet, vae):
        assert len(drawing.positions) == len(drawing.boxes)
        for (x, y), (u, v) in combinations(drawing.positions.values(), 2):
            assert y != v or abs(x - u) > 0.99
        for x, y in drawing.positions.values():
            assert 0 <= x <= drawing.columns - 0.99
            assert y < drawing.rows
        placed = geometry(drawing, {})
        assert all(y + placed["side"] < placed["height"] for _, y in placed["corners"].values())
        assert len(placed["lines"]) == len(drawing.edges) + len(drawing.skips)


def test_a_detached_module_has_a_box_only_if_captured() -> None:
    network = sdconv.load(WEIGHTS / "tiny-unet.safetensors", dtype=torch.float32)
    points = sdconv.features(network, 16)
    drawing = drawing_of(points, ["time_embedding", "mid_block.resnets.0:temb"])
    assert on_branch(drawing, Branch.detached) == [("time_embedding", 0)]
    assert "time_embedding" not in {name for edge in drawing.edges for name in edge}


def test_block_outputs_are_those_of_whole_blocks() -> None:
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
    one = lay_out([Box(name="a", kind="conv", branch=Branch.mid, level=0)])
    assert (one.columns, one.rows, one.positions["a"]) == (1, 1, (0, 0))
    right = lay_out([Box(name=n, kind="conv", branch=Branch.up, level=0) for n in "ab"])
    assert [right.positions[name][0] for name in "ab"] == [0, 1]
