"""The number of attention heads: the width of the prompt embedding decides, nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.unets import FAMILIES, SD1, SD2, on_meta, peer_of
from safetensors.torch import save_file

import sdconv
from sdconv.analysis.inspection import inspect
from sdconv.config import UNet2DConditionConfig

Shapes = dict[str, tuple[int, ...]]
EIGHT, BY_64 = 8, (5, 10, 20, 20)
SDXS: dict[str, Any] = {
    **SD1,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "mid_block_type": None,
}


def shapes_of(config: dict[str, Any], *, linear: bool) -> Shapes:
    network = peer_of({**config, "use_linear_projection": linear})
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("inputs", [4, 8, 9])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("config", "heads"), [(SD1, EIGHT), (SD2, BY_64)])
def test_the_width_decides(config: dict[str, Any], heads: Any, linear: bool, inputs: int) -> None:
    shapes = shapes_of({**config, "in_channels": inputs}, linear=linear)
    for prefix in ("", "model.diffusion_model."):
        found = sdconv.infer({prefix + name: shape for name, shape in shapes.items()})["unet"]
        assert found.attention_head_dim == heads
        assert found.use_linear_projection is linear
        assert found.in_channels == inputs


@pytest.mark.parametrize("linear", [False, True])
def test_the_caller_may_overrule(linear: bool) -> None:
    shapes = shapes_of(SD1, linear=linear)
    assert sdconv.infer(shapes, family="sd2")["unet"].attention_head_dim == BY_64
    assert sdconv.infer(shapes, family="sd1")["unet"].attention_head_dim == EIGHT
    shapes = shapes_of(SD2, linear=linear)
    assert sdconv.infer(shapes, family="sd1")["unet"].attention_head_dim == EIGHT
    with pytest.raises(sdconv.InputError, match="does not fit this U-Net"):
        sdconv.infer(shapes, family="sdxl")


@pytest.mark.parametrize("linear", [False, True])
def test_distilled_networks(linear: bool) -> None:
    assert sdconv.infer(shapes_of(SDXS, linear=linear))["unet"].attention_head_dim == EIGHT
    wide = {**SDXS, "cross_attention_dim": 1024}
    found = sdconv.infer(shapes_of(wide, linear=linear))["unet"]
    assert found.attention_head_dim == BY_64[:3]


def test_assumed_heads_are_said(tmp_path: Path) -> None:
    """And a config.json next to the weights decides, without a word."""
    small = {**SDXS, "block_out_channels": (64, 128, 192), "attention_head_dim": (1, 2, 3)}
    state = peer_of(small).state_dict()
    zeros = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in state.items()}
    save_file(zeros, tmp_path / "diffusion_pytorch_model.safetensors")

    def found(path: Path, **given: Any) -> tuple[Any, str]:
        inspection = inspect(path, **given)
        (part,) = inspection.parts
        return inspection.network("unet").config.attention_head_dim, " ".join(part.notes)

    heads, notes = found(tmp_path / "diffusion_pytorch_model.safetensors")
    assert heads == 8 and "8 attention heads are assumed" in notes
    assert found(tmp_path, family="sd1") == (8, "")
    fields = {"_class_name": "UNet2DConditionModel", **dict(peer_of(small).config)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert found(tmp_path) == ((1, 2, 3), "")
    assert sdconv.load(tmp_path, dtype=torch.float32).config.attention_head_dim == (1, 2, 3)
    # the control: with a mid block it is SD1's own shape
    whole = {**small, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    state = peer_of(whole).state_dict()
    zeros = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in state.items()}
    save_file(zeros, tmp_path / "whole.safetensors")
    assert found(tmp_path / "whole.safetensors") == (8, "")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["SDXL", "SDXL refiner", "x4 upscaler"])
def test_others_too(name: str, linear: bool) -> None:
    found = sdconv.infer(shapes_of(FAMILIES[name], linear=linear))["unet"]
    assert found.attention_head_dim == FAMILIES[name]["attention_head_dim"]


def test_a_level_without_transformers_need_not_be_divisible() -> None:
    fields = {**UNet2DConditionConfig.assumed, **SD1, "block_out_channels": (36, 64, 96, 100)}
    fields |= {"attention_head_dim": 8, "norm_num_groups": 4}
    fields |= {"down_block_types": ("DownBlock2D", *SD1["down_block_types"][1:])}
    fields |= {"up_block_types": (*SD1["up_block_types"][:3], "UpBlock2D")}
    fields |= {"mid_block_type": "UNetMidBlock2D"}
    config = UNet2DConditionConfig(**fields)
    ours = {k: tuple(v.shape) for k, v in on_meta(dict(config)).state_dict().items()}
    with torch.device("meta"):
        theirs = peer_of(dict(config)).state_dict()
    assert ours == {k: tuple(v.shape) for k, v in theirs.items()}
    # the control: a level with transformers must be
    for name, types in (
        ("down_block_types", SD1["down_block_types"]),
        ("up_block_types", SD1["up_block_types"]),
    ):
        with pytest.raises(ValueError, match="36 channels cannot be split into 8 heads"):
            dataclasses.replace(config, **{name: types})
    with pytest.raises(ValueError, match="100 channels cannot be split into 8 heads"):
        dataclasses.replace(config, mid_block_type="UNetMidBlock2DCrossAttn")
