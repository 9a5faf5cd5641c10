"""Files that people have: parts for text encoders, alphas in a config, and kinds of adapters, which
are named, those that are refused too."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor, nn

import sdconv
from sdconv.analysis.inspection import inspect
from sdconv.checkpoint.keys.adapters import adapter_in
from sdconv.errors import CheckpointError, SdconvError, UnknownNetworkError

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
SOME = torch.ones(2, 2)
DOWN, UP = torch.full((4, 24), 0.5), torch.full((96, 4), 0.25)
GOOD = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}
PEFT = {f"base_model.model.{LAYER}.lora_{k}.weight": v for k, v in (("A", DOWN), ("B", UP))}


def change(network: nn.Module, lora: Any) -> Tensor:
    """What merging adds to the layer's weight."""
    weight = network.get_submodule(LAYER).weight
    assert isinstance(weight, Tensor)
    before = weight.detach().clone()
    merged = sdconv.merge_lora(network, lora)
    assert merged.layers == (LAYER,)
    found = weight.detach() - before
    merged.unmerge()
    return found


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 2, "r": 4}, 0.5),
        ({"lora_alpha": 2, "r": 4, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "r": 8, "rank_pattern": {"to_k": 4}}, 0.5),
        ({"lora_alpha": 9, "r": 4, "alpha_pattern": {"attn2.to_k": 2}}, 0.5),
        ({"lora_alpha": 2, "r": 4, "alpha_pattern": {"attn1.to_k": 9}}, 0.5),
        ({"lora_alpha": 2, "r": 4, "peft_type": "LORA", "init_lora_weights": "gaussian"}, 0.5),
    ],
)
def test_the_config_next_to_pefts_file(
    config: dict[str, Any], factor: float, network: Any, tmp_path: Path
) -> None:
    save_file(PEFT, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = factor * (UP @ DOWN)
    (tmp_path / "variant").mkdir()
    save_file(PEFT, tmp_path / "variant" / "adapter_model.fp16.safetensors")
    (tmp_path / "variant" / "adapter_config.json").write_text(json.dumps(config))
    for path in (
        tmp_path,
        tmp_path / "adapter_model.safetensors",
        tmp_path / "variant" / "adapter_model.fp16.safetensors",
    ):
        assert torch.allclose(change(network, path), expected, atol=1e-6)
    # in a file of another name, the config may belong to another file
    save_file(PEFT, tmp_path / "style.safetensors")
    with pytest.warns(sdconv.SdconvWarning, match=r"style\.safetensors: alpha is unknown"):
        assert torch.allclose(change(network, tmp_path / "style.safetensors"), UP @ DOWN, atol=1e-6)


def test_kohyas_metadata_with_another_alpha(network: Any, tmp_path: Path) -> None:
    """Other programs do not read them, so neither is followed in silence."""
    path = tmp_path / "style.safetensors"
    said = {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    save_file(GOOD, path, said)
    with pytest.warns(sdconv.SdconvWarning, match=r"ss_network_alpha 2\.0 for ss_network_dim 4"):
        assert torch.allclose(change(network, path), UP @ DOWN, atol=1e-6)
    for fine in ({**said, "ss_network_alpha": "4"}, {"ss_network_alpha": "Dynamic"}, None):
        save_file(GOOD, path, fine)
        assert torch.allclose(change(network, path), UP @ DOWN, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"peft_type": "IA3"}, "IA3, of which it has no tensor"),
        ({"peft_type": "LOHA"}, "LOHA, of which it has no tensor"),
        ({"peft_type": "VERA"}, "VeRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the network's weights"),
    ],
)
def test_configs_that_mean_something_else(
    config: dict[str, Any], words: str, network: Any, tmp_path: Path
) -> None:
    save_file(PEFT, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, **config}))
    with pytest.raises(CheckpointError, match=words):
        sdconv.merge_lora(network, tmp_path / "adapter_model.safetensors")


def test_who_is_warned_about_alpha(network: Any, tmp_path: Path) -> None:
    """kohya's files without alpha mean that it equals the rank, and so does a state dict."""
    path = tmp_path / "a.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensors in (GOOD, PEFT | {f"{LAYER}.alpha": torch.tensor(2.0)}):
            save_file(tensors, path)
            change(network, path)
        change(network, PEFT)
    save_file(PEFT, path)
    with pytest.warns(sdconv.SdconvWarning, match=r"adapter_config\.json"):
        change(network, path)


ELSEWHERE = [
    "bundle_emb.style.string_to_param.*",
    "bundle_emb.style.clip_l",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
    "clip_g.transformer.resblocks.0.mlp.c_fc.lora_A.weight",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
    "conditioner_embedders_0_transformer_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "lycoris_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
    "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_networks_part_merges_and_the_rest_is_listed(name: str, network: Any) -> None:
    expected = change(network, GOOD)
    assert torch.equal(change(network, {**GOOD, name: SOME}), expected)
    merged = sdconv.merge_lora(network, {**GOOD, name: SOME})
    assert merged.skipped == (name,)


def test_a_name_that_only_resembles_a_text_encoders(network: Any) -> None:
    for name in ("unet.text_encoder_hid.lora_A.weight", "clip.lora_up.weight"):
        with pytest.raises(SdconvError, match=name.split(".lora")[0].rpartition(".")[2]):
            sdconv.merge_lora(network, {**GOOD, name: SOME})


REFUSED = {
    "OFT in its first form (oft_diag, oft_r)": ["{}.oft_diag"],
    "T-LoRA": ["{}.q_layer.weight", "{}.p_layer.weight", "{}.lambda_layer", "{}.alpha"],
    "AdaLoRA": ["{}.lora_A", "{}.lora_B", "{}.lora_E"],
    "VeRA": ["{}.vera_lambda_b", "{}.vera_lambda_d"],
    "a weight that replaces another (set_weight)": ["{}.set_weight"],
    "a weight of another shape (reshape_weight)": [
        "{}.lora_down.weight",
        "{}.lora_up.weight",
        "{}.reshape_weight",
    ],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_named(kind: str, network: Any, tmp_path: Path) -> None:
    tensors = {name.format(KOHYA): SOME.clone() for name in REFUSED[kind]}
    with pytest.raises(CheckpointError) as caught:
        sdconv.merge_lora(network, tensors)
    assert f"this looks like {kind}, which sdconv does not merge" in str(caught.value)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UnknownNetworkError, match=re.escape(f"of another kind: {kind}")):
        sdconv.load(tmp_path / "lora.safetensors")


MERGED = {
    "LoHa": ["{}.hada_w1_a", "{}.hada_w1_b", "{}.hada_w2_a", "{}.hada_w2_b", "{}.alpha"],
    "LoKr": ["{}.lokr_w1", "{}.lokr_w2_a", "{}.lokr_w2_b", "{}.alpha"],
    "LoKr and DoRA": ["{}.lokr_w1", "{}.lokr_w2", "{}.alpha", "{}.dora_scale"],
    "GLoRA": ["{}.a1.weight", "{}.a2.weight", "{}.b1.weight", "{}.b2.weight"],
    "OFT": ["{}.oft_blocks", "{}.alpha"],
    "BOFT": ["{}.boft_R", "{}.boft_s"],
    "(IA)3": ["{}.on_input", "{}.weight"],
    "LoRA and DoRA": ["{}.lora_down.weight", "{}.lora_up.weight", "{}.dora_scale"],
    "weight-difference": ["{}.diff", "{}.diff_b"],
    "norm": ["{}.w_norm", "{}.b_norm"],
    "LoRA and LoRA-bias": ["{}.lora_A.weight", "{}.lora_B.weight", "{}.lora_B.bias"],
}


@pytest.mark.parametrize("kind", MERGED)
def test_inspect_and_load_say_which_kind_a_file_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({name.format(KOHYA): SOME.clone() for name in MERGED[kind]}, path)
    words = f"this is a {kind} file; merge it with sdconv.merge_lora"
    assert words in str(inspect(path).complaint)
    with pytest.raises(UnknownNetworkError, match=re.escape(words)):
        sdconv.load(path)


def test_boft_is_known_by_its_axes(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({f"{KOHYA}.oft_blocks": torch.zeros(2, 4, 2, 2)}, path)
    assert "this is a BOFT file" in str(inspect(path).complaint)


CONTROL = {
    "lora_controlnet": torch.zeros(1),
    "input_blocks.1.0.in_layers.2.up": SOME,
    "input_blocks.1.0.in_layers.2.down": SOME,
    "input_hint_block.0.weight": SOME,
}


def test_control_lora(network: Any) -> None:
    with pytest.raises(CheckpointError, match="looks like Control-LoRA"):
        sdconv.merge_lora(network, CONTROL)


def test_a_prefix_does_not_pass_for_a_difference(network: Any) -> None:
    """``model.diffusion_model`` once matched ``.diff``."""
    with pytest.raises(SdconvError) as caught:
        sdconv.merge_lora(network, {"model.diffusion_model.conv_in.what": SOME})
    assert "difference" not in str(caught.value)


def test_a_whole_checkpoint_is_not_a_lora(network: Any, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    sdconv.save(seeded.network(seeded.SMALL_KL), path)
    with pytest.raises(CheckpointError, match=r"whole checkpoint, not a LoRA: it has a VAE"):
        sdconv.merge_lora(network, path)
    with pytest.raises(CheckpointError, match=r"it has a U-Net"):
        sdconv.merge_lora(network, network.state_dict())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (GOOD, r"this is a LoRA file; merge it with sdconv\.merge_lora"),
        (PEFT, r"this is a LoRA file; merge it with sdconv\.merge_lora"),
        (CONTROL, "adapter of another kind: Control-LoRA"),
    ],
)
def test_a_lora_is_not_a_network(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(UnknownNetworkError, match=words):
        sdconv.load(path)
    problem = inspect(path).complaint
    assert problem is not None and words.partition(";")[0][:12] in problem


def test_networks_are_not_adapters(network: Any) -> None:
    for tensors in (
        network.state_dict(),
        *map(seeded.tensors, (*seeded.WITH_PEER.values(), *seeded.WITHOUT_PEER.values())),
    ):
        assert adapter_in({name: tensor.shape for name, tensor in tensors.items()}) is None
