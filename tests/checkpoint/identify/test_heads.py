"""The number of attention heads: the width of the prompt embedding decides, nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.unets import FAMILIES, SD1, SD2, on_meta, peer_of
from helpers.weight_files import convert
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


def odd(linear: bool = False, **fields: Any) -> dict[str, torch.Tensor]:
    """A small U-Net that reads prompt embeddings of a width that no known model has."""
    config = {**SD1, "block_out_channels": (64,) * 4, "cross_attention_dim": 40, **fields}
    config |= {"layers_per_block": 1, "attention_head_dim": 8}
    shapes = shapes_of(config, linear=linear)
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


@pytest.mark.parametrize(("linear", "heads"), [(False, 8), (True, (1, 1, 1, 1))])
def test_a_width_of_no_known_model_leaves_the_heads_open(
    linear: bool, heads: Any, tmp_path: Path
) -> None:
    """Until the caller decides: through convert, save and further loads."""
    first = ("sd1", "sd2")[linear]
    words = rf"prompt embeddings of width 40, unlike any known family.*{first} was taken .*family="
    path, folder = tmp_path / "unet.safetensors", tmp_path / "unet"
    original, saved = tmp_path / "original.safetensors", tmp_path / "saved.safetensors"
    save_file(odd(linear), path)
    with pytest.warns(sdconv.SdconvWarning, match=words):
        network = sdconv.load(path)
    assert network.config.attention_head_dim == heads
    sdconv.save(network, saved)
    for out, layout in ((folder, "diffusers"), (original, "original")):
        with pytest.warns(sdconv.SdconvWarning, match=words):
            convert(path, out, layout)
    for again in (saved, folder, original):
        with pytest.warns(sdconv.SdconvWarning, match=words):
            assert sdconv.load(again).config.attention_head_dim == heads
        assert inspect(again).network(None).open_to == (first, ("sd2", "sd1")[linear])
        for family, right in (("sd1", 8), ("sd2", (1, 1, 1, 1))):
            chosen = sdconv.load(again, family=family)
            assert chosen.config.attention_head_dim == right
            sdconv.save(chosen, tmp_path / "chosen.safetensors")
            assert sdconv.load(tmp_path / "chosen.safetensors").config == chosen.config


def test_the_refiners_width_without_its_added_embedding() -> None:
    """As in CompVis/ldm-text2im-large-256, which has 8 heads and is no refiner."""
    shapes = shapes_of({**SD1, "cross_attention_dim": 1280}, linear=False)
    with pytest.warns(sdconv.SdconvWarning, match="prompt embeddings of width 1280"):
        assert sdconv.infer(shapes)["unet"].attention_head_dim == EIGHT
    vae = sdconv.read_header("weights/tiny-vae.safetensors").shapes
    both = shapes | {f"first_stage_model.{name}": shape for name, shape in vae.items()}
    with pytest.warns(sdconv.SdconvWarning) as caught:
        sdconv.infer(both)
    assert any("the vae could be of sd1 or sd2 or sdxl" in str(one.message) for one in caught)
    # the control: the refiner itself
    refiner = shapes_of(FAMILIES["SDXL refiner"], linear=True)
    assert sdconv.infer(refiner)["unet"].attention_head_dim == (6, 12, 24, 24)


def test_what_decides_the_heads_of_an_unknown_width(tmp_path: Path) -> None:
    """A config next to the weights, the metadata, and what has no other candidate."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(odd(), path, {"modelspec.architecture": "stable-diffusion-v2-1"})
    assert sdconv.load(path).config.attention_head_dim == (1, 1, 1, 1)
    save_file(odd(), path)
    fields = UNet2DConditionConfig.from_json(sdconv.infer(read(path), family="sd1")["unet"], "")
    content = json.dumps({**fields.to_json(), "attention_head_dim": 4})
    (tmp_path / "config.json").write_text(content)
    assert sdconv.load(path).config.attention_head_dim == 4
    # the controls: a known width, and no transformer at all
    sdconv.load(odd(cross_attention_dim=768))
    plain = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}
    sdconv.load(odd(**plain, mid_block_type="UNetMidBlock2D"))


def read(path: Path) -> Shapes:
    return sdconv.read_header(path).shapes


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
