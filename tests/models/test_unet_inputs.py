"""The U-Net refuses invalid inputs with an error before it computes anything."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from helpers import unets
from torch import nn

import sdconv
from sdconv.models.unet import UNet2DConditionModel

NETWORKS = {
    "plain": unets.on_meta(unets.small("one level")),
    "SDXL": unets.on_meta(unets.smallest("SDXL")),
    "x4": unets.on_meta(unets.smallest("x4 upscaler")),
    "unCLIP": unets.on_meta(unets.smallest("SD2 unCLIP")),
    "LCM": unets.on_meta(unets.smallest("LCM")),
}


def on_meta(value: Any) -> Any:
    """A value with its tensors on the meta device, like the weights of the networks here."""
    match value:
        case torch.Tensor():
            return value.to("meta")
        case list():
            return [on_meta(one) for one in value]
        case dict():
            return {name: on_meta(one) for name, one in value.items()}
    return value


def arguments(network: UNet2DConditionModel, **changed: Any) -> dict[str, Any]:
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
    return on_meta(dict(zip(names, unets.inputs(network.config), strict=True)) | changed)


ARRAY = torch.zeros(2, 4, 8, 12).numpy()
WHOLE = torch.zeros(2, 4, 8, 12, dtype=torch.int64)
TEXT = torch.zeros(2, 7, 24)
SIZED = {"text_embeds": torch.zeros(2, unets.TEXT), "time_ids": torch.zeros(2, 6)}


@pytest.mark.parametrize(
    ("kind", "changed", "says", "expected", "got"),
    [
        ("plain", {"sample": torch.zeros(2, 9, 8, 8)}, "latents", "(B, 4, H, W)", "(2, 9, 8, 8)"),
        ("plain", {"sample": torch.zeros(4, 8, 8)}, "latents", "(B, 4, H, W)", "(4, 8, 8)"),
        ("plain", {"sample": torch.zeros(2, 4, 0, 8)}, "latents", "(B, 4, H, W)", "(2, 4, 0, 8)"),
        ("plain", {"sample": torch.tensor(0.0)}, "latents", "(B, 4, H, W)", "()"),
        ("plain", {"sample": torch.zeros(0, 4, 8, 8)}, "latents", "(B, 4, H, W)", "(0, 4, 8, 8)"),
        ("plain", {"sample": None}, "must be a tensor", "(B, 4, H, W)", "None"),
        ("plain", {"sample": [[0.0]]}, "must be a tensor", "torch.Tensor", "builtins.list"),
        ("plain", {"sample": ARRAY}, "must be a tensor", "torch.Tensor", "numpy.ndarray"),
        ("plain", {"sample": WHOLE}, "latents must be floating", "float32", "int64"),
        ("plain", {"sample": WHOLE.double()}, "latents must have the dtype", "float32", "float64"),
        ("plain", {"timestep": None}, "timesteps", "a number", "None"),
        ("plain", {"timestep": "5"}, "timesteps", "a number", "a str"),
        ("plain", {"timestep": [5]}, "timesteps", "a number", "a list"),
        ("plain", {"timestep": torch.zeros(2).bool()}, "timesteps", "a number", "torch.bool"),
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
        ("plain", {"encoder_hidden_states": TEXT.numpy()}, "encoder_hidden", "tokens", "a ndarray"),
        (
            "plain",
            {"encoder_hidden_states": TEXT.half()},
            "dtype of the weights",
            "float32",
            "float16",
        ),
        ("plain", {"encoder_hidden_states": TEXT.long()}, "floating-point", "float32", "int64"),
        ("plain", {"encoder_hidden_states": TEXT[:, :0]}, "encoder_hidden", "tokens", "(2, 0, 24)"),
        ("plain", {"attention_mask": [1]}, "attention_mask must", "(B, tokens)", "builtins.list"),
        ("plain", {"added_cond_kwargs": 1}, "must be a dictionary", "none", "a int"),
        ("plain", {"class_labels": torch.zeros(2)}, "class_labels", "None", "(2,)"),
        ("plain", {"class_labels": 3}, "class_labels", "None", "a int"),
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
        (
            "SDXL",
            {"added_cond_kwargs": {**SIZED, "time_ids": torch.zeros(13)}},
            "wrong shapes",
            "C + 256 n = 1552",
            "(2, 16) and (13,)",
        ),
        (
            "SDXL",
            {"added_cond_kwargs": {**SIZED, "text_embeds": None}},
            "text_embeds must be a tensor",
            "(B, C)",
            "None",
        ),
        ("x4", {"class_labels": None}, "class_labels", "(2,)", "None"),
        ("x4", {"class_labels": [1, 2]}, "class_labels", "(2,)", "a list"),
        ("x4", {"class_labels": torch.zeros(2).bool()}, "whole numbers", "int64", "bool"),
        ("x4", {"class_labels": torch.zeros(2)}, "whole numbers", "int64", "float32"),
        ("x4", {"class_labels": torch.zeros(2, 1)}, "class_labels", "(2,)", "(2, 1)"),
        ("unCLIP", {"class_labels": torch.zeros(2, 3)}, "class_labels", "(2, 40)", "(2, 3)"),
        ("unCLIP", {"class_labels": torch.zeros(2, 40).half()}, "the dtype", "float32", "float16"),
        ("LCM", {"timestep_cond": torch.zeros(2, 256).half()}, "the dtype", "float32", "float16"),
        ("LCM", {"timestep_cond": torch.zeros(2, 8)}, "timestep_cond", "(2, 256)", "(2, 8)"),
        ("LCM", {"timestep_cond": torch.zeros(3, 256)}, "timestep_cond", "(2, 256)", "(3, 256)"),
        (
            "LCM",
            {"timestep_cond": torch.zeros(1, 1, 256)},
            "timestep_cond",
            "(2, 256)",
            "(1, 1, 256)",
        ),
        ("plain", {"attention_mask": torch.ones(3, 96)}, "attention_mask", "(2, tok", "(3, 96)"),
        ("plain", {"attention_mask": torch.ones(96)}, "attention_mask", "(2, tokens)", "(96,)"),
        (
            "plain",
            {"encoder_attention_mask": torch.ones(2, 9)},
            "encoder_attention_mask has the wrong shape",
            "(2, 7)",
            "(2, 9)",
        ),
        (
            "plain",
            {"down_intrablock_additional_residuals": [torch.zeros(2, 64, 4, 6)]},
            "the T2I-Adapter's residuals do not fit: number 0 has the wrong shape",
            "(2, 64, 8, 12)",
            "(2, 64, 4, 6)",
        ),
        (
            "plain",
            {"down_intrablock_additional_residuals": [torch.zeros(3, 64, 8, 12)]},
            "number 0 has the wrong shape",
            "(2, 64, 8, 12)",
            "(3, 64, 8, 12)",
        ),
        (
            "plain",
            {
                "down_block_additional_residuals": [torch.zeros(2, 64, 8, 12)] * 3,
                "mid_block_additional_residual": torch.zeros(2, 64, 4, 6),
            },
            "the ControlNet's residuals do not fit: number 3 has the wrong shape",
            "(2, 64, 8, 12)",
            "(2, 64, 4, 6)",
        ),
        (
            "plain",
            {"down_block_additional_residuals": [torch.zeros(1)] * 3},
            "must be passed together",
            "mid_block_additional_residual",
            "one without the other",
        ),
        (
            "plain",
            {"mid_block_additional_residual": torch.zeros(1)},
            "must be passed together",
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
            {
                "down_block_additional_residuals": [torch.zeros(2, 64, 8, 12)] * 2
                + [torch.zeros(2, 32, 8, 12)],
                "mid_block_additional_residual": torch.zeros(2, 64, 8, 12),
            },
            "the ControlNet's residuals do not fit: number 2 has the wrong channels",
            "(B, 64, H, W)",
            "(2, 32, 8, 12)",
        ),
        (
            "plain",
            {
                "down_block_additional_residuals": [torch.zeros(2, 64, 8, 12)] * 3,
                "mid_block_additional_residual": torch.zeros(2, 1280, 8, 12),
            },
            "number 3",
            "(B, 64, H, W)",
            "(2, 1280, 8, 12)",
        ),
        (
            "plain",
            {"down_intrablock_additional_residuals": [torch.zeros(2, 320, 8, 12)]},
            "the T2I-Adapter's residuals do not fit: number 0 has the wrong channels",
            "(B, 64, H, W)",
            "(2, 320, 8, 12)",
        ),
        (
            "plain",
            {"down_intrablock_additional_residuals": torch.zeros(1)},
            "residuals must be a list",
            "a list or a tuple",
            "a Tensor",
        ),
        (
            "plain",
            {"down_block_additional_residuals": [None] * 3},
            "residuals must be a list",
            "a list or a tuple",
            "a list",
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
def test_invalid_inputs_are_refused(
    kind: str, changed: dict[str, Any], says: str, expected: str, got: str
) -> None:
    network = NETWORKS[kind]
    with pytest.raises(sdconv.InputError) as caught:
        network(**arguments(network, **changed))
    where, *parts = str(caught.value).splitlines()
    assert where.startswith("UNet2DConditionModel: ")
    assert says in where
    assert expected in parts[0]
    assert parts[0].startswith("  expected: ")
    assert got in parts[1]
    assert parts[1].startswith("  got: ")


def test_a_t2i_adapters_residuals_as_a_controlnets_are_refused() -> None:
    """diffusers still accepts them, with a deprecation warning."""
    network = NETWORKS["plain"]
    with pytest.raises(sdconv.InputError) as caught:
        network(**arguments(network, down_block_additional_residuals=[torch.zeros(1)]))
    assert "hint: pass a T2I-Adapter's as down_intrablock_additional_resid" in str(caught.value)


@pytest.mark.parametrize("kind", NETWORKS)
def test_valid_inputs_are_accepted(kind: str) -> None:
    network = NETWORKS[kind]
    with torch.no_grad():
        assert network(**arguments(network)).sample.shape == (2, network.config.out_channels, 8, 12)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("plain", "sample"),
        ("plain", "encoder_hidden_states"),
        ("x4", "class_labels"),
        ("unCLIP", "class_labels"),
        ("LCM", "timestep_cond"),
    ],
)
def test_inputs_on_another_device(kind: str, name: str) -> None:
    network = NETWORKS[kind]
    inputs = arguments(network)
    inputs[name] = torch.zeros_like(inputs[name], device="cpu")
    with pytest.raises(sdconv.InputError, match="must be on the device"):
        network(**inputs)


def test_added_conditions_on_another_device() -> None:
    network = NETWORKS["SDXL"]
    for name in SIZED:
        inputs = arguments(network)
        inputs["added_cond_kwargs"][name] = SIZED[name]
        with pytest.raises(sdconv.InputError, match=f"{name} must be on the device"):
            network(**inputs)


def test_hooks_may_convert_the_input() -> None:
    network = unets.ours(unets.theirs(unets.small("one level")))
    sample, timestep, prompt_embeds, *_ = unets.inputs(network.config)
    wrong = {"sample": sample.half(), "timestep": timestep, "encoder_hidden_states": prompt_embeds}
    with pytest.raises(sdconv.InputError, match="the dtype of the weights"):
        network(**wrong)
    network.conv_in.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    network.time_embedding.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    with torch.no_grad():
        assert network(**wrong).sample.dtype == torch.float32


def test_under_autocast_other_float_dtypes_are_accepted() -> None:
    ours = unets.ours(peer := unets.theirs(unets.small("one level")))
    sample, timestep, prompt_embeds, *_ = unets.inputs(ours.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inputs = sample.bfloat16(), timestep, prompt_embeds.half()
        assert torch.equal(ours(*inputs).sample, peer(*inputs).sample)
        with pytest.raises(sdconv.InputError, match="the dtype of the weights"):
            ours(sample.double(), timestep, prompt_embeds)


@pytest.mark.parametrize("labels", [[3, 1000], [-1, 3]])
def test_class_labels_out_of_range(labels: list[int]) -> None:
    network = unets.ours(unets.theirs(unets.smallest("x4 upscaler")))
    sample, timestep, text, *_ = unets.inputs(network.config)
    with torch.no_grad():
        with pytest.raises(sdconv.InputError, match="class_labels out of range") as caught:
            network(sample, timestep, text, torch.tensor(labels))
        assert "expected: 0 to 999" in str(caught.value)
        network(sample, timestep, text, torch.tensor([0, 999]))


@pytest.mark.parametrize("family", ["no transformers", "one level", "SD1"])
def test_sizes_too_small_for_the_normalisation(family: str) -> None:
    """sdconv refuses exactly the sizes at which torch refuses diffusers' network."""
    config = unets.smallest(family)
    if family == "one level":
        config |= {"block_out_channels": (32,)}
    peer = unets.theirs(config)
    ours = unets.ours(peer)
    refused = []
    for batch, rows, columns in product((1, 2), (1, 2, 9), (1, 2, 9)):
        inputs = unets.inputs(peer.config, batch, (rows, columns))
        with torch.no_grad():
            try:
                expected = peer(*inputs).sample
            except ValueError:
                refused.append((batch, rows, columns))
                with pytest.raises(sdconv.InputError, match="too small"):
                    ours(*inputs)
            else:
                assert torch.equal(ours(*inputs).sample, expected)
    assert refused[0] == (1, 1, 1) and all(batch == 1 for batch, *_ in refused)


def test_nothing_is_computed_before_the_refusal() -> None:
    network = NETWORKS["SDXL"]
    ran: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in network.children()]
    with pytest.raises(sdconv.InputError):
        network(**arguments(network, added_cond_kwargs=None))
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_a_vae_is_not_a_unet() -> None:
    vae = sdconv.AutoencoderKLConfig(
        **{**sdconv.AutoencoderKLConfig.assumed, "block_out_channels": (32,), "layers_per_block": 1}
    )
    state = sdconv.AutoencoderKL(vae).state_dict()
    with pytest.raises(sdconv.UnknownNetworkError, match="no component 'unet'"):
        sdconv.load(state, component="unet")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("conv_in.bias"), "missing"),
        (lambda state: state.pop("mid_block.resnets.1.conv2.weight"), "missing"),
        (lambda state: state.update({"down_blocks.9.odd": torch.zeros(1)}), "unexpected"),
        (lambda state: state.update({"conv_out.bias": torch.zeros(5)}), "shape"),
    ],
)
def test_weights_that_do_not_match(change: Any, says: str) -> None:
    state = unets.theirs(unets.small("one level")).state_dict()
    change(state)
    with pytest.raises(sdconv.WeightsMismatchError, match=says):
        sdconv.load(state, family="sd1")
