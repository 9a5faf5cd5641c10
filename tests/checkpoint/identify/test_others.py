"""Networks that sdconv does not build are refused by their names, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded, unets
from safetensors.torch import save_file

import sdconv
from sdconv.analysis.inspection import inspect
from sdconv.checkpoint.save import original_tensors

Shapes = dict[str, tuple[int, ...]]
VIDEO = (8, 8, 3, 3, 3)


def plain(config: object = seeded.SMALL_KL, layout: str = "diffusers") -> Shapes:
    tensors = seeded.tensors(config)  # type: ignore[arg-type]
    if layout == "original":
        tensors = original_tensors(tensors, config)  # type: ignore[arg-type]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def vq(layout: str, codebook: bool) -> Shapes:
    """A VQ model: the encoder gives as many channels as the decoder takes."""
    shapes = plain(layout=layout)
    shapes["encoder.conv_out.weight"] = (4, *shapes["encoder.conv_out.weight"][1:])
    shapes["encoder.conv_out.bias"] = (4,)
    shapes["quant_conv.weight"], shapes["quant_conv.bias"] = (4, 4, 1, 1), (4,)
    return shapes | ({"quantize.embedding.weight": (64, 4)} if codebook else {})


def memory_blocks(temporal: bool) -> Shapes:
    """A tiny autoencoder for videos, with its layers over time or without."""
    shapes = plain(seeded.SMALL_TINY, "original")
    for name, shape in list(shapes.items()):
        if name.endswith(".conv.0.weight"):
            shapes[name] = (shape[0], 2 * shape[0], *shape[2:])
    return shapes | ({"encoder.9.conv.weight": (8, 16, 1, 1)} if temporal else {})


OTHERS: dict[str, tuple[str, Shapes]] = {
    "Wan": (
        "Wan or Qwen-Image",
        {"encoder.conv1.weight": VIDEO, "encoder.middle.0.residual.0.gamma": (8, 1, 1, 1)},
    ),
    "Qwen-Image in diffusers": (
        "Wan or Qwen-Image",
        {
            "encoder.conv_in.weight": VIDEO,
            "decoder.mid_block.resnets.0.norm1.gamma": (8, 1, 1, 1),
        },
    ),
    "HunyuanVideo": (
        "HunyuanVideo",
        {
            "encoder.conv_in.conv.weight": VIDEO,
            "encoder.down.0.block.0.conv1.conv.weight": VIDEO,
        },
    ),
    "LTX": (
        "LTX-Video",
        {
            "vae.encoder.conv_in.conv.weight": VIDEO,
            "vae.per_channel_statistics.mean-of-means": (8,),
        },
    ),
    "CogVideoX": (
        "CogVideoX",
        {
            "encoder.conv_in.conv.weight": VIDEO,
            "decoder.mid_block.resnets.0.norm1.conv_y.conv.weight": (8, 8, 1, 1, 1),
        },
    ),
    "Mochi": ("Mochi", {"blocks.0.1.stack.0.weight": (8,), "blocks.0.1.stack.2.weight": VIDEO}),
    "Mochi in diffusers": ("Mochi", {"decoder.block_in.resnets.0.conv1.conv.weight": VIDEO}),
    "Cosmos": ("Cosmos", {"encoder.conv_in.0.conv3d.weight": VIDEO}),
    "SVD": (
        "Stable Video Diffusion",
        {"first_stage_model.decoder.up.0.block.0.time_stack.in_layers.2.weight": VIDEO},
    ),
    "any other for videos": ("for videos", {"encoder.conv_in.weight": VIDEO}),
    "DC-AE": ("DC-AE", {"encoder.project_in.conv.weight": (8, 3, 3, 3)}),
    "DC-AE in diffusers": ("DC-AE", {"encoder.down_blocks.0.0.conv1.weight": (8, 8, 3, 3)}),
    "consistency decoder": ("consistency decoder", {"decoder_unet.conv_in.weight": (8, 7, 3, 3)}),
    "consistency decoder, original": (
        "consistency decoder",
        {"embed_image.conv.f.weight": (8, 7, 3, 3), "down.0.0.f_1.f.weight": (8, 8, 3, 3)},
    ),
    "MoVQ": (
        "MoVQ",
        {
            "quantize.embedding.weight": (64, 4),
            "decoder.mid.block_1.norm1.norm_layer.weight": (8,),
        },
    ),
    "Stable Cascade, stage A": (
        "stage A",
        {"in_block.1.weight": (8, 12, 1, 1), "vquantizer.codebook.weight": (64, 4)},
    ),
    "Stable Cascade, stage C": ("Stable Cascade", {"clip_txt_mapper.weight": (8, 8)}),
    "Stable Cascade, stage B": ("Stable Cascade", {"effnet_mapper.0.weight": (8, 8, 1, 1)}),
    "a tiny one for videos": ("TAEHV", memory_blocks(True)),
    "the same without time": ("TAEHV", memory_blocks(False)),
    "VQ": ("VQ model", vq("diffusers", True)),
    "VQ without its codebook": ("VQ model", vq("diffusers", False)),
    "VQ, original": ("VQ model", vq("original", False)),
    "Stable Video Diffusion's U-Net": (
        "Stable Video Diffusion's U-Net",
        {"down_blocks.0.resnets.0.temporal_res_block.conv1.weight": VIDEO},
    ),
    "the same, original": (
        "Stable Video Diffusion's U-Net",
        {"model.diffusion_model.output_blocks.3.0.time_stack.in_layers.2.weight": VIDEO},
    ),
    "AnimateDiff": (
        "AnimateDiff",
        {"down_blocks.0.motion_modules.0.proj_in.weight": (8, 8)},
    ),
    "text to video": (
        "U-Net for videos",
        {"down_blocks.0.temp_convs.0.conv1.2.weight": (8, 8, 3, 1, 1)},
    ),
    "ControlNet": ("a ControlNet", {"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)}),
    "ControlNet, original": (
        "a ControlNet",
        {"control_model.input_hint_block.0.weight": (8, 3, 3, 3)},
    ),
    "T2I-Adapter": ("a T2I-Adapter", {"adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3)}),
    "MAGVIT-v2": (
        "MAGVIT-v2",
        {"encoder.conv_in.conv.weight": VIDEO, "quantizers.a.weight": (4, 4)},
    ),
    "Open-Sora": ("Open-Sora", {"temporal_vae.encoder.conv_in.conv.weight": VIDEO}),
    "audio": ("audio", {"encoder.block.0.conv1.weight_v": (8, 8, 7)}),
    "IP-Adapter": ("IP-Adapter", {"ip_adapter.1.to_k_ip.weight": (4, 4)}),
    "FLUX.1": ("FLUX.1's transformer", {"double_blocks.0.img_attn.qkv.weight": (6, 6)}),
    "SD3": ("SD3's transformer", {"model.joint_blocks.0.x_block.attn.qkv.weight": (6, 6)}),
    "safety checker": ("safety checker", {"concept_embeds": (17, 8)}),
    "text encoder": ("CLIP text", {"text_model.embeddings.token_embedding.weight": (9, 8)}),
    "image encoder": ("CLIP image", {"vision_model.embeddings.class_embedding": (8,)}),
    "T5": ("T5", {"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}),
    "embedding": ("textual inversion", {"emb_params": (2, 768)}),
    "hypernetwork": ("hypernetwork", {"768.0.linear.weight": (4, 4)}),
    "ESRGAN": ("ESRGAN", {"body.0.rdb1.conv1.weight": (32, 64, 3, 3)}),
    "latent upscaler": (
        "latent upscaler",
        {"down_blocks.0.resnets.0.norm1.linear.weight": (8, 8)},
    ),
    "pixels shuffled": (
        "shuffling channels",
        plain() | {"decoder.up_blocks.0.upsamplers.0.conv.weight": (256, 64, 3, 3)},
    ),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        plain() | {"decoder.condition_encoder.layers.0.weight": (8, 8, 3, 3)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    words, shapes = OTHERS[name]
    path = tmp_path / "weights.safetensors"
    save_file({k: torch.zeros(shape) for k, shape in shapes.items()}, path)
    for call in (
        lambda: sdconv.infer(shapes),
        lambda: sdconv.load(path),
        lambda: sdconv.load(path, "vae"),
    ):
        with pytest.raises(sdconv.UnknownNetworkError, match=words) as caught:
            call()
        assert "whole" not in str(caught.value)
        assert "complete" not in str(caught.value)
    assert words in (inspect(path).complaint or "")


def test_config_of_a_class_that_sdconv_does_not_have(tmp_path: Path) -> None:
    seeded.network(seeded.SMALL_KL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(sdconv.UnknownNetworkError, match="another class") as caught:
        sdconv.load(tmp_path)
    assert "hint: run it with the library that has this class" in str(caught.value)


UNETS = {
    "down_blocks.0.resnets.0.norm1.linear.weight": "latent upscaler",
    "down_blocks.0.attentions.0.add_k_proj.weight": "Kandinsky 2 or DeepFloyd IF",
    "position_net.linears.0.weight": "GLIGEN",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight": "IP-Adapter",
    "encoder_hid_proj.weight": "Kolors",
    "mid_block.attentions.0.to_q.weight": "unconditional",
}


@pytest.mark.parametrize("name", UNETS)
def test_other_unets(name: str) -> None:
    network = unets.on_meta(unets.smallest("SD1"))
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert set(sdconv.infer(shapes, family="sd1")) == {"unet"}  # the control
    with pytest.raises(sdconv.UnknownNetworkError, match=UNETS[name]) as caught:
        sdconv.infer(shapes | {name: (64, 64)})
    assert f"got: '{name}'" in str(caught.value)


def test_the_controls_are_opened() -> None:
    for config in (seeded.SMALL_KL, seeded.SMALL_TINY, seeded.SMALL_FLUX2):
        assert set(
            sdconv.infer(plain(config), family=None if config is not seeded.SMALL_KL else "sd1")
        ) == {"vae"}


def test_whole_is_said_only_of_what_is_not() -> None:
    state = seeded.tensors(seeded.SMALL_KL)
    gone = {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}
    with pytest.raises(sdconv.WeightsMismatchError, match="check that the file is whole"):
        sdconv.load(gone, family="sd1")
    more = state | {"decoder.more.weight": torch.ones(3)}
    with pytest.raises(sdconv.WeightsMismatchError) as caught:
        sdconv.load(more, family="sd1")
    assert "whole" not in str(caught.value)
    assert "another kind of network" in str(caught.value)
