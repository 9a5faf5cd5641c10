"""Extracting LoRAs: what was merged comes back; what a LoRA cannot hold is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import loras, pipelines, seeded, unets
from helpers.versions import needs_diffusers_0_40
from helpers.weight_files import convert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdconv
from sdconv.errors import InputError, WeightsMismatchError
from sdconv.lora.extract import extract_lora, truncated

KL = seeded.SMALL_KL


def relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, built: Any) -> tuple[Path, Path, Any, Any]:
    """A U-Net, and the same with a LoRA merged: files and networks."""
    folder = tmp_path_factory.mktemp("extract")
    tuned = copy.deepcopy(built)
    sdconv.merge_lora(tuned, loras.kohya(loras.matrices(built, 5)))
    sdconv.save(built, folder / "base.safetensors", layout="original")
    sdconv.save(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors", built, tuned


@pytest.mark.parametrize("names", [pytest.param("kohya", marks=needs_diffusers_0_40), "peft"])
def test_what_was_merged_comes_back(
    names: str, pair: tuple[Path, Path, Any, Any], network: nn.Module, tmp_path: Path
) -> None:
    base, tuned, before, after = pair
    out = tmp_path / "lora.safetensors"
    result = extract_lora(base, tuned, out, rank=4, names=names)
    (energy,) = result.components.values()
    assert energy.layers == len(loras.layers(before))
    assert energy.kept > 1 - 1e-9
    assert energy.left_out == []
    # merged into the base, it makes the tuned network of it
    merged = sdconv.merge_lora(network, out)
    assert not merged.skipped
    wanted = loras.layers(after)
    now = loras.layers(network)
    assert all(relative(now[name], wanted[name]) < 1e-5 for name in wanted)
    # and in diffusers, with its own reader of the file
    pipe = pipelines.pipeline("text", unet=copy.deepcopy(peer_of(before)))
    pipe.load_lora_weights(tmp_path, weight_name=out.name)  # a name, or offline it fails
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    theirs = loras.layers(pipe.unet)
    assert all(relative(theirs[name], wanted[name]) < 1e-5 for name in wanted)
    # the control: a smaller rank keeps less, and says so
    less = extract_lora(base, tuned, tmp_path / "less.safetensors", rank=2, names=names)
    assert 0.3 < less.components["unet"].kept < 0.99


def peer_of(network: Any) -> Any:
    """diffusers' U-Net with the weights of sdconv's."""
    peer = unets.peer_of(unets.smallest("SD1"))
    peer.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    return peer.eval()


def test_the_best_approximation() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((7, 30), (30, 7), (9, 9)):
        matrix = torch.randn(shape, generator=random, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        for rank in (1, 3, 7):
            down, up = truncated(matrix, rank)
            assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
            best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
            assert torch.allclose(up @ down, best, atol=1e-10)
    down, up = truncated(torch.zeros(3, 5, dtype=torch.float64), 2)
    assert float((up @ down).abs().max()) == 0


def test_kept_energy_is_what_the_file_gives(
    pair: tuple[Path, Path, Any, Any], tmp_path: Path
) -> None:
    base, tuned, before, after = pair
    out = tmp_path / "lora.safetensors"
    result = extract_lora(base, tuned, out, rank=2, conv_rank=0, dtype=torch.float16)
    tensors = load_file(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    total = lost = 0.0
    olds = loras.layers(before)
    for name, weight in loras.layers(after).items():
        difference = (weight.detach().double() - olds[name].detach().double()).flatten(1)
        stem = "lora_unet_" + name.replace(".", "_")
        is_large = weight.ndim == 4 and weight.shape[2] > 1
        assert (f"{stem}.alpha" in tensors) != is_large
        if is_large:
            rest = difference
        else:
            assert float(tensors[f"{stem}.alpha"]) == 2
            up, down = (tensors[f"{stem}.lora_{i}.weight"].double() for i in ("up", "down"))
            rest = difference - 2 / up.shape[1] * up.flatten(1) @ down.flatten(1)
        total += float(difference.square().sum())
        lost += float(rest.square().sum())
    assert result.components["unet"].kept == pytest.approx(1 - lost / total, abs=1e-9)
    assert all(name.endswith(".weight") for name in result.components["unet"].left_out)


def test_all_components_of_a_pipeline(tmp_path: Path) -> None:
    pipe = pipelines.pipeline("xl")
    pipe.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for network in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
            for name, module in network.named_modules():
                if name.endswith(("to_q", "q_proj", "mlp.fc1", "conv1")):
                    rows = torch.arange(float(len(module.weight)))
                    module.weight += 0.01 * rows.view(-1, *(1,) * (module.weight.ndim - 1))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight += 0.1
    pipe.save_pretrained(tmp_path / "tuned")
    # one in a folder, the other in an original file, where the second encoder is OpenCLIP's
    convert(tmp_path / "tuned", tmp_path / "tuned.safetensors", "original")
    for names, prefixes in (
        ("kohya", ("lora_unet_input_blocks_", "lora_te1_", "lora_te2_", "lora_vae_")),
        ("peft", ("unet.", "text_encoder.", "text_encoder_2.", "vae.")),
    ):
        out = tmp_path / f"{names}.safetensors"
        result = extract_lora(
            tmp_path / "base", tmp_path / "tuned.safetensors", out, 1, names=names
        )
        assert set(result.components) == {"unet", "text_encoder", "text_encoder_2", "vae"}
        assert result.components["text_encoder_2"].kept > 1 - 1e-6
        assert result.components["text_encoder"].kept < 0.999
        (lost,) = result.components["text_encoder"].left_out
        assert lost.endswith("token_embedding.weight")
        written = load_file(out)
        assert all(any(name.startswith(one) for name in written) for one in prefixes)
    # diffusers reads the file, text encoders too
    without = {k: v for k, v in written.items() if not k.startswith("vae.")}
    metadata = {"format": "pt"} | dict(sdconv.read_header(out).metadata)
    content = json.loads(metadata["lora_adapter_metadata"])
    metadata["lora_adapter_metadata"] = json.dumps(
        {k: v for k, v in content.items() if not k.startswith("vae.")}
    )
    save_file(without, tmp_path / "theirs.safetensors", metadata=metadata)
    again = pipelines.pipeline("xl")
    again.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    again.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    again.unload_lora_weights()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        wanted = loras.layers(getattr(pipe, part))
        now = loras.layers(getattr(again, part))
        assert all(relative(now[name], wanted[name]) < 1e-5 for name in wanted), part


def test_what_cannot_be_extracted_is_refused(
    pair: tuple[Path, Path, Any, Any], tmp_path: Path
) -> None:
    base, tuned, *_ = pair
    out = tmp_path / "lora.safetensors"
    with pytest.raises(WeightsMismatchError, match="nothing to extract"):
        extract_lora(base, base, out, 4)
    state = load_file(tuned)
    biases = load_file(base) | {"time_embed.0.bias": torch.ones(128)}
    with pytest.raises(WeightsMismatchError, match="only what a LoRA does not hold") as error:
        extract_lora(base, biases, out, 4)
    assert "time_embedding.linear_1.bias" in str(error.value)
    state["conv_in.weight"] = torch.ones(32, 5, 3, 3)
    with pytest.raises(WeightsMismatchError, match="of another model"):
        extract_lora(base, state, out, 4)
    with pytest.raises(WeightsMismatchError, match="no component in common"):
        extract_lora(base, seeded.tensors(KL), out, 4)
    for given in ({"rank": 0}, {"rank": 2.0}, {"rank": 4, "conv_rank": -1}):
        with pytest.raises(InputError, match="not a rank"):
            extract_lora(base, tuned, out, **given)
    with pytest.raises(InputError, match="unknown names"):
        extract_lora(base, tuned, out, 4, names="mine")
    with pytest.raises(InputError, match="a LoRA is a single file"):
        extract_lora(base, tuned, tmp_path / "folder", 4)
    assert not out.exists()
