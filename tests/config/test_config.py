"""What a config.json may say: valid types, supported values, and no contradictions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import seeded

import sdconv
from sdconv.checkpoint.identify.infer import identify
from sdconv.config import Config, UNet2DConditionConfig

UNET = UNet2DConditionConfig(**UNet2DConditionConfig.assumed)
CONFIGS = {
    "AutoencoderKL": seeded.kl((32, 64), 4, True),
    "AutoencoderKLFlux2": seeded.flux2((32, 64)),
    "AutoencoderTiny": seeded.tiny(),
    "UNet2DConditionModel": UNET,
}


def read(config: Config, **changed: Any) -> Config:
    content = json.loads(json.dumps(config.to_json())) | changed
    return type(config).from_json(content, "model/config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(name: str) -> None:
    config = CONFIGS[name]
    assert read(config) == config
    # and without the keys that follow from others
    content = {k: v for k, v in config.to_json().items() if k not in config.derived}
    assert type(config).from_json(content, "config.json") == config


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("AutoencoderKL", "down_block_types", ["DownEncoderBlock2D"]),
        ("AutoencoderKL", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("AutoencoderKL", "up_block_types", ["UpDecoderBlock2D"] * 3),
        ("AutoencoderKL", "up_block_types", "UpDecoderBlock2D"),
        ("AutoencoderKL", "up_block_types", None),
        ("AutoencoderKLFlux2", "down_block_types", ["DownEncoderBlock2D"]),
        ("AutoencoderKLFlux2", "up_block_types", [["UpDecoderBlock2D"] * 2]),
        ("AutoencoderTiny", "block_out_channels", [64, 64]),
    ],
)
def test_a_key_that_contradicts_the_others(name: str, key: str, value: Any) -> None:
    with pytest.raises(sdconv.CheckpointError, match=f"contradicts itself in {key}") as caught:
        read(CONFIGS[name], **{key: value})
    text = str(caught.value)
    assert text.startswith("model/config.json: ")
    assert f"got: {value!r}" in text and f"remove {key}" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None])
def test_a_factor_that_is_not_a_number(value: Any) -> None:
    with pytest.raises(sdconv.CheckpointError, match="wrong type for scaling_factor"):
        read(CONFIGS["AutoencoderKL"], scaling_factor=value)
    assert read(CONFIGS["AutoencoderKL"], scaling_factor=1)["scaling_factor"] == 1


def test_fields_that_no_block_reads_may_have_any_value() -> None:
    assert read(UNET, mid_block_only_cross_attention=True) == UNET
    assert read(UNET, addition_embed_type_num_heads=8) == UNET


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("AutoencoderKL", {"latent_channels": 16}, "latent_channels = 16 where the shapes say 4"),
        ("AutoencoderKL", {"layers_per_block": 1}, "layers_per_block = 1 where the shapes say 2"),
        (
            "AutoencoderKL",
            {"use_quant_conv": False},
            "use_quant_conv = False where the shapes say True",
        ),
        (
            "AutoencoderKLFlux2",
            {"patch_size": [1, 1]},
            r"patch_size = \(1, 1\) where the shapes say \(2, 2\)",
        ),
        ("AutoencoderTiny", {"latent_channels": 16}, "latent_channels = 16"),
    ],
)
def test_a_config_that_contradicts_the_shapes_is_named(
    name: str, changed: dict[str, Any], message: str
) -> None:
    config = CONFIGS[name]
    shapes = {k: tuple(v.shape) for k, v in seeded.tensors(config).items()}
    (right,) = identify(shapes, config=config.to_json())
    assert right.contradicted == ()
    (wrong,) = identify(shapes, config=config.to_json() | changed)
    assert len(wrong.contradicted) == 1
    assert wrong.contradicted[0].startswith(message.replace("\\", ""))
    # a field that shapes do not determine contradicts nothing
    beyond = {"sample_size": 7} if "sample_size" in config else {"latent_shift": 7}
    (other,) = identify(shapes, config=config.to_json() | beyond)
    assert other.contradicted == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"layers_per_block": 10**6},
        {"layers_per_block": [2, 2, 2, 65]},
        {"transformer_layers_per_block": 10**6},
        {"transformer_layers_per_block": [1, -2, 3, 1]},
        {"block_out_channels": [32] * 65},
    ],
)
def test_a_unet_that_would_take_forever_to_build(changed: dict[str, Any]) -> None:
    with pytest.raises(sdconv.CheckpointError, match="does not describe a UNet2DConditionModel"):
        read(UNET, **changed)
