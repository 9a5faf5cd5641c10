"""Every spelling of a layer's name; each key is used or listed as skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import seeded
from helpers.loras import (
    assert_equal,
    dotted,
    kohya,
    largest_error,
    layers,
    matrices,
    original_names,
    state,
)
from safetensors.torch import save_file

import sdconv
from sdconv.checkpoint.save import original_tensors
from sdconv.errors import CheckpointError
from sdconv.lora.names import layer_spellings

FORMS = (
    "unet.{}.lora_[A|B].weight",
    "base_model.model.unet.{}.lora_[A|B].weight",
    "base_model.model.{}.lora_[A|B].default.weight",
    "unet.{}.lora.[down|up].weight",
    "unet.{}.lora_linear_layer.[down|up].weight",
    "{}.lora_[down|up].weight",
    "lora_unet.{}.lora_[down|up].weight",
    "diffusion_model.{}.lora_[down|up].weight",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling(form: str, network: Any) -> None:
    lora = matrices(network)
    sdconv.merge_lora(network, kohya(lora))
    expected = state(network)
    sdconv.unmerge_lora(network)
    names = original_names(network) if form.startswith("diffusion_model") else str
    merged = sdconv.merge_lora(network, dotted({names(k): v for k, v in lora.items()}, form))
    assert set(merged.layers) == set(layers(network))
    assert_equal(network.state_dict(), expected)


def test_attention_processors(network: Any) -> None:
    lora = matrices(network, only=r"\.to_(q|k|v|out\.0)$")
    sdconv.merge_lora(network, kohya(lora))
    expected = state(network)
    sdconv.unmerge_lora(network)
    old = {}
    for name, tensor in dotted(lora, "unet.{}_lora.[down|up].weight").items():
        name = name.replace("to_out.0", "to_out").replace(".alpha", "_lora.alpha")
        old[re.sub(r"\.(to_\w+)\.", r".processor.\1.", name)] = tensor
    assert (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"
        in old
    )
    sdconv.merge_lora(network, old)
    assert_equal(network.state_dict(), expected)


@pytest.mark.shared
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl-base"])
def test_every_layer_of_the_full_networks_has_kohyas_names(family: str, shared_dir: Path) -> None:
    header = json.loads((shared_dir / "headers" / f"{family}-ldm.json").read_text())
    originals = {
        name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for name, (shape, _) in header.items()
        if name.startswith("model.diffusion_model.") and len(shape) > 1
    }
    config = sdconv.infer({name: shape for name, (shape, _) in header.items()})["unet"]
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel.from_config(config.to_json())
    names = set(layers(network))
    spellings = layer_spellings([name for name, _ in network.named_modules()])
    assert {spellings[name.replace(".", "_")] for name in originals} == names
    assert {spellings[name.replace(".", "_")] for name in names} == names


def test_a_vae_in_either_layout(tmp_path: Path) -> None:
    config = seeded.kl((32, 64), 4, True, layers_per_block=1)
    vae = seeded.network(config)
    before = state(vae)
    lora = matrices(vae)
    weights = {f"{name}.weight": weight for name, weight in layers(vae).items()}
    original = dict(zip(lora, original_tensors(weights, config), strict=True))
    sdconv.merge_lora(vae, dotted(lora, "vae.{}.lora_[A|B].weight", False))
    expected = state(vae)
    assert largest_error(expected, before) > 0.1
    sdconv.unmerge_lora(vae)
    tensors = {
        f"lora_vae_{original[name].removesuffix('.weight').replace('.', '_')}.{part}": matrix
        for name, (down, up, _) in lora.items()
        for part, matrix in (("lora_down.weight", down), ("lora_up.weight", up))
    }
    assert "lora_vae_decoder_mid_attn_1_q.lora_down.weight" in tensors
    save_file(tensors, tmp_path / "lora.safetensors")
    merged = sdconv.merge_lora(vae, tmp_path / "lora.safetensors")
    assert_equal(vae.state_dict(), expected)
    merged.unmerge()
    assert_equal(vae.state_dict(), before)


TEXT_KEYS = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
    "base_model.model.text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight",
    "lora_te1.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
)


def test_text_encoders_are_listed_as_skipped(network: Any) -> None:
    tensors = kohya(matrices(network, only="mid_block"))
    merged = sdconv.merge_lora(network, tensors | dict.fromkeys(TEXT_KEYS, torch.ones(2, 2)))
    assert merged.skipped == TEXT_KEYS
    assert len(merged.layers) == len(tensors) / 3


def test_a_layer_named_twice(network: Any) -> None:
    # some files have a layer under the names of both layouts
    lora = matrices(network, only="mid_block")
    tensors = kohya(lora) | kohya(lora, original_names(network))
    merged = sdconv.merge_lora(network, tensors)
    assert len(merged.layers) == len(lora)
    assert len(merged.skipped) == 3 * len(lora)
    expected = state(network)
    merged.unmerge()
    sdconv.merge_lora(network, kohya(lora))
    assert_equal(network.state_dict(), expected)
    repeated = next(k for k in reversed(tensors) if k.endswith("up.weight"))
    tensors[repeated] = tensors[repeated] + 1
    with pytest.raises(CheckpointError, match=re.escape(repeated)):
        sdconv.merge_lora(network, tensors)
