"""What the U-Net does not take is refused, in words, before any arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import unets
from torch import nn

import sdconv
from sdconv.unet import UNet2DConditionModel

NETWORKS = {
    "plain": unets.blank(unets.small("one level")),
    "SDXL": unets.blank(unets.smallest("SDXL")),
    "x4": unets.blank(unets.smallest("x4 upscaler")),
    "unCLIP": unets.blank(unets.smallest("SD2 unCLIP")),
    "LCM": unets.blank(unets.smallest("LCM")),
}


def given(network: UNet2DConditionModel, **changed: Any) -> dict[str, Any]:
    names = (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
    )
    return dict(zip(names, unets.inputs(network.config), strict=True)) | changed


SIZED = {"text_embeds": torch.zeros(2, unets.TEXT), "time_ids": torch.zeros(2, 6)}


@pytest.mark.parametrize(
    ("kind", "changed", "says", "expected", "got"),
    [
        ("plain", {"sample": torch.zeros(2, 9, 8, 8)}, "latents", "(B, 4, H, W)", "(2, 9, 8, 8)"),
        ("plain", {"sample": torch.zeros(4, 8, 8)}, "latents", "(B, 4, H, W)", "(4, 8, 8)"),
        ("plain", {"sample": torch.zeros(2, 4, 0, 8)}, "latents", "(B, 4, H, W)", "(2, 4, 0, 8)"),
        ("plain", {"sample": torch.tensor(0.0)}, "latents", "(B, 4, H, W)", "()"),
        ("plain", {"timestep": torch.zeros(3)}, "timesteps", "(2,)", "(3,)"),
        ("plain", {"timestep": torch.zeros(2, 1)}, "timesteps", "(2,)", "(2, 1)"),
        (
            "plain",
            {"encoder_hidden_states": torch.zeros(2, 7, 32)},
            "encoder_hidden_states",
            "(2, tokens, 24)",
            "(2, 7, 32)",
        ),
        (
            "plain",
            {"encoder_hidden_states": torch.zeros(1, 7, 24)},
            "encoder_hidden_states",
            "(2, tokens, 24)",
            "(1, 7, 24)",
        ),
        ("plain", {"encoder_hidden_states": None}, "encoder_hidden_states", "tokens", "None"),
        ("plain", {"class_labels": torch.zeros(2)}, "class_labels", "None", "(2,)"),
        ("plain", {"timestep_cond": torch.zeros(2, 256)}, "timestep_cond", "None", "(2, 256)"),
        ("plain", {"added_cond_kwargs": SIZED}, "added_cond_kwargs", "none", "text_embeds, time"),
        ("plain", {"cross_attention_kwargs": {"gligen": {}}}, "GLIGEN", "no such", "gligen"),
        ("SDXL", {"added_cond_kwargs": None}, "added_cond_kwargs", "text_embeds, time_ids", "none"),
        (
            "SDXL",
            {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 16)}},
            "added_cond_kwargs",
            "text_embeds, time_ids",
            "text_embeds",
        ),
        (
            "SDXL",
            {"added_cond_kwargs": {**SIZED, "image_embeds": []}},
            "added_cond_kwargs",
            "text_embeds, time_ids",
            "image_embeds",
        ),
        (
            "SDXL",
            {"added_cond_kwargs": {**SIZED, "time_ids": torch.zeros(2, 5)}},
            "wrong shapes",
            "C + 256 n = 1552",
            "(2, 16) and (2, 5)",
        ),
        ("x4", {"class_labels": None}, "class_labels", "(2,)", "None"),
        ("x4", {"class_labels": torch.zeros(2)}, "whole numbers", "int64", "float32"),
        ("x4", {"class_labels": torch.zeros(2, 1)}, "class_labels", "(2,)", "(2, 1)"),
        ("unCLIP", {"class_labels": torch.zeros(2, 3)}, "class_labels", "(2, 40)", "(2, 3)"),
        ("LCM", {"timestep_cond": torch.zeros(2, 8)}, "timestep_cond", "(B, 256)", "(2, 8)"),
        (
            "plain",
            {"down_block_additional_residuals": [torch.zeros(1)] * 3},
            "come together",
            "mid_block_additional_residual",
            "one without the other",
        ),
        (
            "plain",
            {"mid_block_additional_residual": torch.zeros(1)},
            "come together",
            "down_block_additional_residuals",
            "one without the other",
        ),
        (
            "plain",
            {
                "down_block_additional_residuals": [torch.zeros(1)] * 12,
                "mid_block_additional_residual": torch.zeros(1),
            },
            "ControlNet",
            "3",
            "12",
        ),
        (
            "plain",
            {"down_intrablock_additional_residuals": [torch.zeros(1)] * 4},
            "T2I-Adapter",
            "at most 2",
            "4",
        ),
    ],
)
def test_refused(kind: str, changed: dict[str, Any], says: str, expected: str, got: str) -> None:
    network = NETWORKS[kind]
    with pytest.raises(sdconv.InputError) as caught:
        network(**given(network, **changed))
    where, *parts = str(caught.value).splitlines()
    assert where.startswith("UNet2DConditionModel: ")
    assert says in where
    assert expected in parts[0]
    assert parts[0].startswith("  expected: ")
    assert got in parts[1]
    assert parts[1].startswith("  got: ")


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_the_change_it_is_taken(kind: str) -> None:
    network = NETWORKS[kind]
    with torch.device("meta"):
        inputs = given(network)
    inputs["timestep"] = inputs["timestep"].to("meta")
    with torch.no_grad():
        assert network(**inputs).sample.shape == (2, network.config.out_channels, 8, 12)


def test_nothing_is_computed_before_the_refusal() -> None:
    network = NETWORKS["SDXL"]
    ran: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in network.children()]
    with pytest.raises(sdconv.InputError):
        network(**given(network, added_cond_kwargs=None))
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_a_vae_is_no_unet() -> None:
    vae = sdconv.AutoencoderKLConfig(
        **{**sdconv.AutoencoderKLConfig.assumed, "block_out_channels": (32,), "layers_per_block": 1}
    )
    state = sdconv.AutoencoderKL(vae).state_dict()
    with pytest.raises(sdconv.UnknownNetworkError, match="no component 'unet'"):
        sdconv.load(state, component="unet")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop("conv_in.bias"), "missing"),
        (lambda state: state.pop("mid_block.resnets.1.conv2.weight"), "missing"),
        (lambda state: state.update({"down_blocks.9.odd": torch.zeros(1)}), "unexpected"),
        (lambda state: state.update({"conv_out.bias": torch.zeros(5)}), "shape"),
    ],
)
def test_weights_that_do_not_fit(spoil: Any, says: str) -> None:
    state = unets.theirs(unets.small("one level")).state_dict()
    spoil(state)
    with pytest.raises(sdconv.WeightsMismatchError, match=says):
        sdconv.load(state)
