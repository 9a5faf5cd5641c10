"""sdconv's U-Net in diffusers' pipelines, and LoRAs, IP-Adapters and attention processors on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from helpers import unets
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import sdconv

SD1 = unets.small("SD1") | {"layers_per_block": 1, "sample_size": 8}
SDXL = unets.small("SDXL") | {"layers_per_block": 1, "sample_size": 8}


def pipeline(unet: Any, kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    parts = {"vae": vae.eval(), "text_encoder": None, "tokenizer": None, **parts}
    if "XL" in kind:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        parts |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = getattr(diffusers, kind)(unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **given: Any) -> torch.Tensor:
    """The result of two steps with guidance, from prompt embeddings of a seed."""
    torch.manual_seed(4)
    width = pipe.unet.config.cross_attention_dim
    embeddings = {
        "prompt_embeds": torch.randn(1, 7, width),
        "negative_prompt_embeds": torch.randn(1, 7, width),
    }
    if "XL" in type(pipe).__name__:
        embeddings["pooled_prompt_embeds"] = torch.randn(1, unets.TEXT)
        embeddings["negative_pooled_prompt_embeds"] = torch.randn(1, unets.TEXT)
    return pipe(
        **embeddings,
        num_inference_steps=2,
        height=16,
        width=24,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **given,
    ).images


def pair(config: dict[str, Any]) -> tuple[Any, Any]:
    peer = unets.theirs(config)
    return unets.ours(peer), peer


@pytest.mark.parametrize(
    ("kind", "config"),
    [("StableDiffusionPipeline", SD1), ("StableDiffusionXLPipeline", SDXL)],
)
def test_pipelines_give_the_same_latents(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    ours, peer = pair(config)
    assert isinstance(ours, diffusers.UNet2DConditionModel)
    mine = pipeline(ours, kind)
    expected = latents(pipeline(peer, kind))
    assert torch.equal(latents(mine), expected)
    mine.save_pretrained(tmp_path)
    none = {name: part for name, part in mine.components.items() if part is None}
    for given, kind_of_unet in (({}, diffusers.UNet2DConditionModel), ({"unet": ours}, type(ours))):
        opened = type(mine).from_pretrained(tmp_path, **none, **given)
        assert type(opened.unet) is kind_of_unet
        opened.set_progress_bar_config(disable=True)
        assert torch.equal(latents(opened), expected)
    again = sdconv.load(tmp_path, component="unet")
    assert torch.equal(latents(pipeline(again, kind)), expected)


def lora(unet: Any, folder: Path) -> Path:
    """Writes a LoRA for attention and convolutions, with seeded weights."""
    wrapped = copy.deepcopy(unet)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "time_emb_proj"]
    wrapped.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(6)
    state = {k: torch.randn_like(v) / 8 for k, v in get_peft_model_state_dict(wrapped).items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def test_lora_weights(tmp_path: Path) -> None:
    ours, peer = pair(SD1)
    lora(peer, tmp_path)
    arguments = unets.inputs(peer.config)[:5]
    results: list[list[torch.Tensor]] = []
    for unet in (ours, peer):
        pipe = pipeline(unet)
        seen = [latents(pipe)]
        name = "pytorch_lora_weights.safetensors"  # diffusers 0.37 asks the Hub for it otherwise
        pipe.load_lora_weights(tmp_path, weight_name=name, adapter_name="style")
        seen.append(latents(pipe))
        with torch.no_grad():
            seen.append(unet(*arguments, cross_attention_kwargs={"scale": 0.5}).sample)
        pipe.set_adapters(["style"], adapter_weights=[0.25])
        seen.append(latents(pipe))
        pipe.fuse_lora(lora_scale=0.5)
        seen.append(latents(pipe))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        seen.append(latents(pipe))
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain, full, half, quarter, fused, _ = results[0]
    assert len({tuple(one.flatten().tolist()) for one in (plain, full, half, quarter, fused)}) == 5
    assert list(ours.state_dict()) == list(peer.state_dict())


def ip_adapter(unet: Any, folder: Path, width: int = 12) -> Path:
    """Writes an IP-Adapter in its authors' layout: a projection, and two matrices for each
    cross-attention, numbered by its index among all attentions."""
    torch.manual_seed(7)
    text_width = unet.config.cross_attention_dim
    state = {
        "image_proj.proj.weight": torch.randn(4 * text_width, width) / width**0.5,
        "image_proj.proj.bias": torch.randn(4 * text_width),
        "image_proj.norm.weight": torch.ones(text_width),
        "image_proj.norm.bias": torch.zeros(text_width),
    }
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            channels = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("k", "v"):
                matrix = torch.randn(channels, text_width) / text_width**0.5
                state[f"ip_adapter.{number}.to_{part}_ip.weight"] = matrix
    save_file(state, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "config"),
    [("StableDiffusionPipeline", SD1), ("StableDiffusionXLPipeline", SDXL)],
)
def test_ip_adapter(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    ours, peer = pair(config)
    ip_adapter(peer, tmp_path)
    torch.manual_seed(8)
    image_embeds = [torch.randn(2, 1, 12)]
    results: list[list[torch.Tensor]] = []
    for unet in (ours, peer):
        pipe = pipeline(unet, kind)
        seen = [latents(pipe)]
        pipe.load_ip_adapter(
            tmp_path, subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None
        )
        assert unet.config.encoder_hid_dim_type == "ip_image_proj"
        for scale in (1.0, 0.3, {"down": {"block_2": [0.5]}}):
            pipe.set_ip_adapter_scale(scale)
            seen.append(latents(pipe, ip_adapter_image_embeds=image_embeds))
        pipe.unload_ip_adapter()
        assert unet.config.encoder_hid_dim_type is None
        seen.append(latents(pipe))
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain, full, less, some, after = results[0]
    assert len({tuple(one.flatten().tolist()) for one in (plain, full, less, some)}) == 4
    assert torch.equal(plain, after)


def test_an_ip_adapter_does_not_change_config_json(tmp_path: Path) -> None:
    ours, peer = pair(SD1)
    before = ours.config.to_json()
    pipeline(ours).load_ip_adapter(
        ip_adapter(peer, tmp_path),
        subfolder="",
        weight_name="adapter.safetensors",
        image_encoder_folder=None,
    )
    assert ours.config.to_json() == before
    arguments = unets.inputs(ours.config)
    with pytest.raises(sdconv.InputError, match="image_embeds"):
        ours(*arguments)


def test_attention_processors() -> None:
    ours, peer = pair(SD1)
    assert list(ours.attn_processors) == list(peer.attn_processors)
    calls = []

    class Counting(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    arguments = unets.inputs(peer.config)
    with torch.no_grad():
        for unet in (ours, peer):
            unet.set_attn_processor(Counting())
        assert torch.equal(ours(*arguments).sample, peer(*arguments).sample)
        assert len(calls) == 2 * len(peer.attn_processors)
        for unet in (ours, peer):
            unet.set_attn_processor(AttnProcessor())
            unet.set_default_attn_processor()
            unet.set_attention_slice("auto")
        assert torch.equal(ours(*arguments).sample, peer(*arguments).sample)
        for unet in (ours, peer):
            unet.fuse_qkv_projections()
        assert torch.equal(ours(*arguments).sample, peer(*arguments).sample)
        ours.unfuse_qkv_projections()


def test_controlnet_pipeline() -> None:
    ours, peer = pair(SD1)
    torch.manual_seed(9)
    controlnet = diffusers.ControlNetModel.from_unet(
        peer, conditioning_embedding_out_channels=(16, 32)
    ).eval()
    for parameter in controlnet.parameters():
        if not parameter.any():  # its last convolutions are initially zero, without any effect
            torch.nn.init.normal_(parameter, std=0.1)
    image = torch.rand(1, 3, 16, 24)
    kind = "StableDiffusionControlNetPipeline"
    got, expected = (
        latents(pipeline(unet, kind, controlnet=controlnet), image=image) for unet in (ours, peer)
    )
    assert torch.equal(got, expected)
    assert not torch.equal(got, latents(pipeline(ours)))
