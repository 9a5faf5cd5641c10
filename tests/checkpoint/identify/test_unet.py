"""The U-Net read from shapes: every family, both layouts, and what must not be taken for one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.unets import FAMILIES, SMALL, peer_of

import sdconv
from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.identify.find import find_networks
from sdconv.checkpoint.identify.infer import identify
from sdconv.checkpoint.keys.unet import keys_of_canonical, keys_of_original

Shapes = dict[str, tuple[int, ...]]

# not determined by any shape
PIPELINE_ONLY = {"sample_size", "upcast_attention"}


def shapes_in(network: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    return shapes_in(peer_of(dict(config)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Shapes]:
    """The whole config that diffusers makes of the published one, and its network's shapes."""
    network = peer_of(FAMILIES[request.param])
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return config, shapes_in(network)


def found(shapes: Shapes) -> DetectedNetwork:
    (one,) = [one for one in find_networks(shapes) if one.component == "unet"]
    return one


def decided(shapes: Shapes) -> str | None:
    """The family for networks of a width that no published model has; None for others."""
    widths = {v[-1] for k, v in shapes.items() if k.endswith("attn2.to_k.weight")}
    return "sd1" if widths - {768, 1024, 1280, 2048} else None


def test_family_is_read_from_shapes(family: tuple[dict[str, Any], Shapes]) -> None:
    published, shapes = family
    config = sdconv.infer(shapes, family=decided(shapes))["unet"]
    assert set(config) == set(published)
    differing = {k: (config[k], v) for k, v in published.items() if config[k] != v}
    assert {k: v for k, v in differing.items() if k not in PIPELINE_ONLY} == {}
    assert shapes_of(config) == shapes


def test_names_survive_the_original_layout(family: tuple[dict[str, Any], Shapes]) -> None:
    _, shapes = family
    keys = keys_of_canonical(shapes)
    original = {keys.original(name): shape for name, shape in shapes.items()}
    assert None not in original
    assert len(original) == len(shapes)
    assert not set(original) & set(shapes)
    assert keys_of_original([k for k in original if k]) == keys
    prefixed = {f"model.diffusion_model.{name}": shape for name, shape in original.items()}
    one = found(prefixed)
    assert one.layout == "original"
    assert one.prefix == "model.diffusion_model."
    assert one.shapes(prefixed) == shapes
    assert one.unexpected == ()
    given = decided(shapes)
    assert sdconv.infer(prefixed, family=given) == sdconv.infer(shapes, family=given)


@pytest.mark.parametrize(
    ("width", "added"), [(2048, False), (1536, False), (40, False), (16 + 5 * 256, True)]
)
def test_the_original_label_is_recognised_by_its_width(width: int, added: bool) -> None:
    """Where the first level also has transformers of one block each, as in unCLIP."""
    label = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    shapes = shapes_of({**FAMILIES["SD2"], **label})
    keys = keys_of_canonical(shapes)
    original = {keys.original(name) or "": shape for name, shape in shapes.items()}
    assert "label_emb.0.0.weight" in original
    read = sdconv.infer(original)["unet"]
    assert (read.addition_embed_type is not None) == added
    assert (read.class_embed_type is None) == added
    assert read.projection_class_embeddings_input_dim == width


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_prefix_in_diffusers_layout(prefix: str) -> None:
    shapes = shapes_of(FAMILIES["uneven layers"])
    one = found({prefix + name: shape for name, shape in shapes.items()})
    assert (one.layout, one.prefix) == ("diffusers", prefix)
    assert one.names == {name: prefix + name for name in shapes}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("sd15-ldm", "SD1"),
        ("sd15-ldm-with-ema", "SD1"),
        ("sd21-ldm", "SD2"),
        ("sdxl-base-ldm", "SDXL"),
    ],
)
def test_original_headers(shared_dir: Path, header: str, name: str) -> None:
    entries = json.loads((shared_dir / "headers" / f"{header}.json").read_text())
    shapes = {name: tuple(shape) for name, (shape, _) in entries.items()}
    configs = sdconv.infer(shapes)
    assert set(configs) == {"vae", "unet"}
    one = found(shapes)
    assert one.unexpected == ()
    assert one.shapes(shapes) == shapes_of(configs["unet"]) == shapes_of(FAMILIES[name])
    averages = {name for name in shapes if name.startswith("model_ema.diffusion_model")}
    assert set(one.ema.values()) == averages
    assert set(one.ema) == (set(one.names) if averages else set())


def test_ema_has_no_dots() -> None:
    shapes = {f"model.diffusion_model.{k}": v for k, v in _original("one level").items()}
    shapes["model_ema.diffusion_modelinput_blocks10in_layers0weight"] = (64,)
    assert found(shapes).ema == {
        "down_blocks.0.resnets.0.norm1.weight": (
            "model_ema.diffusion_modelinput_blocks10in_layers0weight"
        )
    }


def _original(family: str) -> Shapes:
    shapes = shapes_of(FAMILIES[family])
    keys = keys_of_canonical(shapes)
    return {keys.original(name) or "": shape for name, shape in shapes.items()}


def test_other_tensors_are_left_alone() -> None:
    shapes = shapes_of(FAMILIES["one level"])
    whole = {
        **{f"model.diffusion_model.{k}": v for k, v in shapes.items()},
        "model.diffusion_model.down_blocks.0.attentions.0.added.weight": (3,),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
        "alphas_cumprod": (1000,),
    }
    one = found(whole)
    assert set(one.names) == set(shapes)
    assert one.unexpected == ("model.diffusion_model.down_blocks.0.attentions.0.added.weight",)


def _controlnet() -> Shapes:
    with torch.device("meta"):
        network = diffusers.ControlNetModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=32,
            conditioning_embedding_out_channels=(16, 32),
        )
    return shapes_in(network)


def _video() -> Shapes:
    with torch.device("meta"):
        network = diffusers.UNet3DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        )
    return shapes_in(network)


def _original_controlnet() -> Shapes:
    way_down = {
        f"control_model.{k}": v for k, v in _original("one level").items() if "output" not in k
    }
    return {**way_down, "control_model.input_hint_block.0.weight": (16, 3, 3, 3)}


def _lora() -> Shapes:
    return {f"unet.{k}"[:-7] + ".lora_A.weight": (4, 8) for k in shapes_of(FAMILIES["one level"])}


def _ip_adapter() -> Shapes:
    return {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)}


@pytest.mark.parametrize(
    "strangers", [_controlnet, _video, _original_controlnet, _lora, _ip_adapter]
)
def test_other_networks_are_not_taken_for_a_unet(strangers: Any) -> None:
    shapes = strangers()
    assert shapes
    with pytest.raises(sdconv.UnknownNetworkError, match="no network that sdconv knows"):
        sdconv.infer(shapes)


def test_unet_next_to_its_controlnet() -> None:
    shapes = {
        **_original_controlnet(),
        **{f"model.diffusion_model.{k}": v for k, v in _original("one level").items()},
    }
    assert found(shapes).prefix == "model.diffusion_model."


def test_heads_that_no_family_has_are_open() -> None:
    narrow = {**SMALL, "block_out_channels": (32, 64, 96), "use_linear_projection": True}
    shapes = shapes_of(narrow)
    with pytest.warns(sdconv.SdconvWarning, match="differ in the number of attention heads"):
        config = sdconv.infer(shapes)["unet"]
    assert config.attention_head_dim == (1, 1, 1)
    config = sdconv.infer(shapes, family="x4-upscaler")["unet"]
    assert config.attention_head_dim == 8


def test_family_that_does_not_fit() -> None:
    with pytest.raises(sdconv.InputError, match="does not fit this U-Net"):
        sdconv.infer(shapes_of(FAMILIES["one level"]), family="sdxl")


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("conv_out.", "conv_out.weight is missing"),
        ("up_blocks.2.", "3 levels down, 2 up"),
        ("up_blocks.1.resnets.1", "the up path does not match the down path"),
        ("down_blocks.1.attentions.0.", "a transformer is missing"),
    ],
)
def test_incomplete(gone: str, says: str) -> None:
    shapes = shapes_of(FAMILIES["uneven layers"])
    kept = {k: v for k, v in shapes.items() if not k.startswith(gone)}
    with pytest.raises(sdconv.WeightsMismatchError, match=says):
        sdconv.infer(kept)


def test_a_mid_block_whose_depth_differs_from_its_level() -> None:
    shapes = shapes_of(FAMILIES["one level"])
    block = "mid_block.attentions.0.transformer_blocks."
    deeper = {k.replace(f"{block}0.", f"{block}1."): v for k, v in shapes.items()}
    with pytest.raises(sdconv.WeightsMismatchError, match="differ in depth") as caught:
        sdconv.infer({**shapes, **deeper})
    assert "expected: 1 blocks\n  got: 2 blocks\n" in str(caught.value)
    assert sdconv.infer(shapes, family="sd1")["unet"].mid_depth == 1


def test_two_context_widths() -> None:
    shapes = shapes_of(FAMILIES["one level"])
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(sdconv.WeightsMismatchError, match="different widths"):
        sdconv.infer({**shapes, name: (64, 40)})


def test_config_json_of_a_published_model_comes_back(tmp_path: Path) -> None:
    network = diffusers.UNet2DConditionModel(**FAMILIES["one level"])
    network.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    shapes = shapes_in(network)
    (one,) = identify(shapes, config=content, where=tmp_path)
    assert one.evidence == "its config"
    read = sdconv.infer(shapes, family="sd1")["unet"]
    assert {k: v for k, v in one.config.items() if k not in PIPELINE_ONLY} == {
        k: v for k, v in read.items() if k not in PIPELINE_ONLY
    }
    assert one.config.from_json(json.loads(json.dumps(one.config.to_json())), "") == one.config


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"]},
        {"class_embed_type": "timestep"},
        {"addition_embed_type": "text"},
        {"attention_head_dim": 7},
        {"block_out_channels": [64, 64]},
        {"norm_eps": 1e-6},
        {"transformer_layers_per_block": [[1]]},
    ],
)
def test_config_json_that_is_not_built(change: dict[str, Any]) -> None:
    shapes = shapes_of(FAMILIES["one level"])
    content = {**sdconv.infer(shapes, family="sd1")["unet"].to_json(), **change}
    with pytest.raises(sdconv.CheckpointError, match=r"config\.json"):
        identify(shapes, config=content)


@pytest.mark.parametrize(
    ("channels", "is_open"), [((32, 64, 128), False), ((32, 64, 96), True), ((64, 96, 64), True)]
)
def test_heads_are_open_only_where_there_is_a_transformer(
    channels: tuple[int, int, int], is_open: bool
) -> None:
    """SDXL's first level has none, so its channels need not be split into heads."""
    small = {"transformer_layers_per_block": (1, 2, 2), "attention_head_dim": 1}
    shapes = shapes_of({**FAMILIES["SDXL"], **small, "block_out_channels": channels})
    (one,) = identify(shapes)
    assert (one.guess is not None) == is_open
