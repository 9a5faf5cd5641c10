"""Merged weights equal those that PEFT and LyCORIS compute from the same files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pipelines, unets
from helpers.loras import (
    Matrices,
    dotted,
    fused,
    kohya,
    largest_error,
    layers,
    matrices,
    original_names,
    state,
)
from helpers.versions import needs_diffusers_0_40
from safetensors.torch import save_file
from torch import Tensor, nn

import sdconv

CASES: Mapping[str, tuple[str, Callable[[nn.Module, Matrices], dict[str, Tensor]]]] = {
    "kohya": ("text", lambda model, lora: kohya(lora)),
    "kohya, original layout": ("xl", lambda model, lora: kohya(lora, original_names(model))),
    "PEFT": ("text", lambda model, lora: dotted(lora, "unet.{}.lora_[A|B].weight", False)),
    "diffusers": ("text", lambda model, lora: dotted(lora, "unet.{}.lora.[down|up].weight", False)),
}


@needs_diffusers_0_40
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str) -> None:
    kind, spell = CASES[case]
    network = unets.ours(pipelines.KINDS[kind].parts()["unet"])
    before = state(network)
    # one alpha for all layers: with several, diffusers drops those of attentions in kohya's names
    tensors = spell(network, matrices(network, alpha=1.5))
    theirs = fused(kind, tensors, 0.7)
    merged = sdconv.merge_lora(network, tensors, scale=0.7)
    assert set(merged.layers) == set(layers(network))
    assert merged.skipped == ()
    assert largest_error(network.state_dict(), theirs) < 1e-6
    assert largest_error(before, theirs) > 0.1
    if "kohya" in case:  # control: another alpha shows
        merged.unmerge()
        tensors |= {k: v + 0.01 for k, v in tensors.items() if k.endswith("alpha")}
        sdconv.merge_lora(network, tensors, scale=0.7)
        assert largest_error(network.state_dict(), theirs) > 1e-4


@pytest.mark.parametrize("mid", [False, True])
def test_equals_lycoris(mid: bool, peer: Any, network: Any, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris", reason="needs LyCORIS: pip install lycoris-lora")
    # convolutions have another rank, and with `mid` a matrix for the kernel
    locon = lycoris.create_lycoris(
        copy.deepcopy(peer), algo="locon", use_tucker=mid, linear_dim=3, conv_dim=2
    )
    torch.manual_seed(7)
    for lora in locon.loras:
        nn.init.normal_(lora.lora_up.weight)  # zeros before training
    locon.apply_to()
    tensors = {name: tensor.detach() for name, tensor in locon.state_dict().items()}
    # several alphas, some of which diffusers would drop
    for number, name in enumerate(sorted(name for name in tensors if name.endswith(".alpha"))):
        tensors[name] = torch.tensor(1.0 + number % 3)
    path, model = tmp_path / "locon.safetensors", copy.deepcopy(peer)
    save_file(tensors, path)
    theirs, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    theirs.merge_to(0.7)
    merged = sdconv.merge_lora(network, path, scale=0.7)
    assert set(merged.layers) == set(layers(network)) and merged.skipped == ()
    assert any("lora_mid" in name for name in tensors) == mid
    assert largest_error(network.state_dict(), model.state_dict()) < 1e-6
    assert largest_error(peer.state_dict(), model.state_dict()) > 0.1
    # controls: transposed kernels and equal alphas show
    for wrong in (
        {k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in tensors.items()},
        {k: torch.tensor(2.0) if k.endswith("alpha") else v for k, v in tensors.items()},
    ):
        merged.unmerge()
        merged = sdconv.merge_lora(network, wrong, scale=0.7)
        assert largest_error(network.state_dict(), model.state_dict()) > 1e-2


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_folder_of_a_peft_adapter(
    rank_stabilised: bool, peer: Any, network: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"conv1": 2},
        alpha_pattern={r"down_blocks.*to_k": 3},
        use_rslora=rank_stabilised,
        target_modules=["to_k", "to_q", "conv1", "proj_in"],
        init_lora_weights=False,
    )
    model = unets.theirs({k: v for k, v in peer.config.items() if not k.startswith("_")})
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    theirs = wrapped.merge_and_unload().state_dict()
    sdconv.merge_lora(network, tmp_path)
    assert largest_error(network.state_dict(), theirs) < 1e-6
    # the file itself: the config next to it counts
    sdconv.unmerge_lora(network)
    sdconv.merge_lora(network, tmp_path / "adapter_model.safetensors")
    assert largest_error(network.state_dict(), theirs) < 1e-6
    # control: without the config, alpha is unknown, and taken to equal the rank
    sdconv.unmerge_lora(network)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(sdconv.SdconvWarning, match="alpha is unknown for"):
        sdconv.merge_lora(network, tmp_path / "adapter_model.safetensors")
    assert largest_error(network.state_dict(), theirs) > 1e-2


def test_alphas_in_the_metadata_of_diffusers(network: Any, tmp_path: Path) -> None:
    pipe = pipelines.pipeline("text")
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "conv2"], init_lora_weights=False
    )
    torch.manual_seed(5)
    pipe.unet.add_adapter(config)
    state_dict = peft.get_peft_model_state_dict(pipe.unet)
    metadata = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=state_dict, unet_lora_adapter_metadata=metadata
    )
    fresh = pipelines.pipeline("text")
    network = unets.ours(fresh.unet)
    fresh.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    fresh.fuse_lora(components=["unet"])
    fresh.unload_lora_weights()
    sdconv.merge_lora(network, tmp_path / "pytorch_lora_weights.safetensors")
    assert largest_error(network.state_dict(), fresh.unet.state_dict()) < 1e-6
