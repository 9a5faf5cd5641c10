"""sdconv's autoencoders in diffusers' pipelines: made, run, saved, opened, moved, offloaded."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sdconv
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, AutoencoderTinyConfig

SMALL = AutoencoderKLConfig(
    **{**AutoencoderKLConfig.assumed, "block_out_channels": (32, 64), "layers_per_block": 1}
)
TINY = AutoencoderTinyConfig(
    **{
        **AutoencoderTinyConfig.assumed,
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
)
NONE = {"text_encoder": None, "tokenizer": None}


def network(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "kl":
        return sdconv.AutoencoderKL(SMALL).eval()
    return sdconv.AutoencoderTiny(TINY).eval()


def twin(ours: torch.nn.Module) -> torch.nn.Module:
    """diffusers' own network with the same weights."""
    import diffusers

    fields = {k: v for k, v in ours.config.items() if k not in type(ours.config).extensions}
    fields.pop("block_out_channels" if "num_encoder_blocks" in fields else "", None)
    theirs = getattr(diffusers, ours.config.class_name)(**fields).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def pipeline(vae: torch.nn.Module, kind: str = "StableDiffusionPipeline") -> object:
    import diffusers

    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    pipe = getattr(diffusers, kind)(
        vae=vae,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NONE,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: object, **given: object) -> torch.Tensor:
    torch.manual_seed(2)
    return pipe(
        prompt_embeds=torch.ones(2, 4, 32),
        negative_prompt_embeds=torch.zeros(2, 4, 32),
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)],
        output_type="pt",
        **given,
    ).images


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_text_to_image_gives_the_same_pixels(kind: str) -> None:
    ours = network(kind)
    size = {"height": 40, "width": 24}
    expected = picture(pipeline(twin(ours)), **size)
    assert torch.equal(picture(pipeline(ours), **size), expected)
    other = network(kind)
    with torch.no_grad():
        next(other.decoder.parameters()).add_(0.1)
    assert not torch.equal(picture(pipeline(other), **size), expected)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_image_to_image_gives_the_same_pixels(kind: str) -> None:
    ours = network(kind)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    given = {"image": image, "strength": 0.9}
    name = "StableDiffusionImg2ImgPipeline"
    expected = picture(pipeline(twin(ours), name), **given)
    assert torch.equal(picture(pipeline(ours, name), **given), expected)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_save_pretrained_and_from_pretrained(kind: str, tmp_path: Path) -> None:
    import diffusers

    ours = network(kind)
    pipe = pipeline(ours)
    expected = picture(pipe, height=32, width=32)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", ours.config.class_name]
    # a folder that opens without sdconv, with ours in the network's place, and as a component
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **NONE)
    given = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, vae=ours, **NONE)
    alone = sdconv.load(tmp_path, component="vae")
    assert type(opened.vae) is getattr(diffusers, ours.config.class_name)
    assert given.vae is ours and type(given.vae) is type(ours)
    assert alone.config == ours.config
    for one in (opened, given):
        one.set_progress_bar_config(disable=True)
        assert torch.equal(picture(one, height=32, width=32), expected)


def test_a_network_loaded_before_diffusers_is_accepted(tmp_path: Path) -> None:
    sdconv.save(network("kl"), tmp_path / "vae.safetensors")
    code = f"""
import sys, sdconv
vae = sdconv.load({str(tmp_path / "vae.safetensors")!r})
assert "diffusers" not in sys.modules and type(vae) is vae.__class__
import diffusers
assert isinstance(vae, diffusers.AutoencoderKL) and isinstance(vae, sdconv.AutoencoderKL)
assert type(vae) is sdconv.AutoencoderKL
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_that_diffusers_cannot_build_is_not_saved_for_it(tmp_path: Path) -> None:
    ours = sdconv.AutoencoderTiny(replace(TINY, use_midblock_gn=True))
    with pytest.raises(sdconv.SdconvError, match="cannot represent"):
        pipeline(ours).save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_copies_and_pickles(kind: str) -> None:
    import diffusers  # with it, __class__ and type() differ: what pickle stumbles over

    ours = network(kind)
    assert isinstance(ours, getattr(diffusers, ours.config.class_name))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours) and other.config == ours.config
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True)
        )


def test_offload_hooks_see_encode_and_decode() -> None:
    class Hook:
        calls = 0

        def pre_forward(self, module: torch.nn.Module) -> None:
            self.calls += 1

    for kind in ("kl", "tiny"):
        ours = network(kind)
        ours._hf_hook = Hook()
        with torch.no_grad():
            ours.encode(torch.zeros(1, 3, 16, 16))
            ours.decode(torch.zeros(1, 4, 8, 8))
        assert ours._hf_hook.calls == 2


def test_accelerate_offloads_a_pipeline_with_ours_in_it() -> None:
    from accelerate import cpu_offload_with_hook

    ours = network("kl")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = ours.decode(z).sample
        _, hook = cpu_offload_with_hook(ours, execution_device="cpu")
        assert torch.equal(ours.decode(z).sample, expected)
    hook.remove()


def test_pipelines_move_it() -> None:
    pipe = pipeline(network("kl"))
    pipe.vae.to(torch.float64)
    assert pipe.vae.dtype == torch.float64 and pipe.vae.device == torch.device("cpu")


def test_flux2_pipeline_reads_the_statistics() -> None:
    from diffusers import Flux2Pipeline

    torch.manual_seed(0)
    config = AutoencoderKLFlux2Config(
        **{**AutoencoderKLFlux2Config.assumed, "block_out_channels": (32, 32)}
    )
    ours = sdconv.AutoencoderKLFlux2(config).eval()
    ours.bn.running_mean.normal_()
    ours.bn.running_var.uniform_(0.5, 2)
    theirs = twin(ours)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    encode = Flux2Pipeline._encode_vae_image
    patchify = staticmethod(Flux2Pipeline._patchify_latents)
    results = []
    for vae in (ours, theirs):
        host = type("Host", (), {"vae": vae, "_patchify_latents": patchify})
        with torch.no_grad():
            results.append(encode(host(), image, torch.Generator().manual_seed(0)))
    assert torch.equal(*results)
