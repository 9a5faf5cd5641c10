"""Configs from names and shapes alone: what is found, where, and what decides the family."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

import sdconv
from sdconv.checkpoint.identify.find import find_networks
from sdconv.checkpoint.identify.infer import identify
from sdconv.checkpoint.keys.vae import vae_keys
from sdconv.checkpoint.save import original_tensors
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, AutoencoderTinyConfig

KL = dict(AutoencoderKLConfig.assumed)
SD = {**KL, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
CONFIGS = {
    "sd1": AutoencoderKLConfig(**SD),
    "flux1": AutoencoderKLConfig(
        **{**SD, **NO_QUANT, "latent_channels": 16, "sample_size": 1024},
    ),
    "three levels": AutoencoderKLConfig(
        **{**SD, "block_out_channels": (128, 256, 512), "sample_size": 256}
    ),
    "one level, three layers": AutoencoderKLConfig(
        **{**SD, "block_out_channels": (64,), "layers_per_block": 3}
    ),
    "no attention": AutoencoderKLConfig(
        **{**SD, "block_out_channels": (32, 96, 64, 32, 32), "mid_block_add_attention": False}
    ),
}


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@cache
def on_meta(config: AutoencoderKLConfig | AutoencoderKLFlux2Config) -> sdconv.AutoencoderKL:
    with torch.device("meta"):
        if isinstance(config, AutoencoderKLFlux2Config):
            return sdconv.AutoencoderKLFlux2(config)
        return sdconv.AutoencoderKL(config)


def shapes_in(config: AutoencoderKLConfig, layout: str) -> dict[str, tuple[int, ...]]:
    tensors = on_meta(config).state_dict()
    if layout == "original":
        tensors = original_tensors(tensors, config)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


STRUCTURE = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore::sdconv.SdconvWarning")
def test_structure_is_read_from_shapes(name: str, layout: str, prefix: str) -> None:
    config = CONFIGS[name]
    shapes = {prefix + k: v for k, v in shapes_in(config, layout).items()}
    inferred = sdconv.infer(shapes)["vae"]
    assert {k: inferred[k] for k in STRUCTURE} == {k: config[k] for k in STRUCTURE}
    (found,) = find_networks(shapes)
    assert (found.layout, found.prefix) == (layout, prefix)
    assert found.shapes(shapes) == shapes_of(on_meta(config))


HEADERS = {
    "sd15-ldm": ("sd1", 4, 0.18215, None, 512, True),
    "sd15-ldm-with-ema": ("sd1", 4, 0.18215, None, 512, True),
    "sd21-ldm": ("sd2", 4, 0.18215, None, 768, True),
    "sdxl-base-ldm": ("sdxl", 4, 0.13025, None, 1024, True),
    "sd-vae-ldm": ("sd1", 4, 0.18215, None, 512, True),
    "sd3-flux-vae-ldm": ("flux1", 16, 0.3611, 0.1159, 1024, False),
}


@pytest.mark.shared
@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_real_checkpoints(header: str, shared_dir: Path) -> None:
    content = json.loads((shared_dir / "headers" / f"{header}.json").read_text())
    shapes = {name: tuple(shape) for name, (shape, _) in content.items()}
    vae = next(one for one in identify(shapes) if one.component == "vae")
    config = vae.config
    assert isinstance(config, AutoencoderKLConfig)
    assert HEADERS[header] == (
        vae.family,
        config.latent_channels,
        config.scaling_factor,
        config.shift_factor,
        config.sample_size,
        config.use_quant_conv,
    )
    assert config.block_out_channels == (128, 256, 512, 512)
    assert config.layers_per_block == 2
    assert not vae.found.unexpected
    assert vae.found.shapes(shapes) == shapes_of(on_meta(config))


OTHERS = {
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
    "model_ema.decay": (),
    "model_ema.encoderconv_inweight": (128, 3, 3, 3),
    "model_ema.num_updates": (),
    "loss.discriminator.main.0.weight": (64, 3, 4, 4),
    "loss.perceptual_loss.lin0.model.1.weight": (1, 64, 1, 1),
    "loss.logvar": (),
    "alphas_cumprod": (1000,),
    "alphas_cumprod_prev": (1000,),
    "betas": (1000,),
    "log_one_minus_alphas_cumprod": (1000,),
    "posterior_log_variance_clipped": (1000,),
    "sqrt_recipm1_alphas_cumprod": (1000,),
    "global_step": (),
}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.filterwarnings("ignore::sdconv.SdconvWarning")
def test_other_tensors_are_ignored(prefix: str) -> None:
    own = {prefix + k: v for k, v in shapes_in(CONFIGS["sd1"], "original").items()}
    losses = {prefix + k: v for k, v in OTHERS.items() if k.startswith("loss.")}
    shapes = {**own, **OTHERS, **losses}
    (found,) = find_networks(shapes)
    assert sorted(found.names.values()) == sorted(own)
    assert found.unexpected == ()
    assert set(losses) <= set(found.dropped)


def test_an_unknown_name_next_to_a_bare_vae_is_unexpected() -> None:
    shapes = {**shapes_in(CONFIGS["sd1"], "original"), "decoder.extra.weight": (1,), "odd": (2, 3)}
    (found,) = find_networks(shapes)
    assert set(found.unexpected) == {"decoder.extra.weight", "odd"}


def test_every_rule_is_used_and_undone() -> None:
    config = CONFIGS["sd1"]
    keymap = vae_keys(4)
    names = list(shapes_in(config, "diffusers"))
    original = [keymap.original(name) for name in names]
    assert None not in original and len(set(original)) == len(names)
    assert [keymap.canonical(str(name)) for name in original] == names
    assert keymap.canonical("decoder.up.0.upsample.convolution.weight") is None
    assert keymap.original("decoder.up_blocks.0.resnets.0.norm3.weight") is None


def test_the_decoder_is_numbered_from_the_other_end() -> None:
    keymap = vae_keys(4)
    # the original's level 0 has the image's size; diffusers' up_blocks.3 is (autoencoder.py)
    assert (
        keymap.canonical("decoder.up.0.block.2.nin_shortcut.weight")
        == "decoder.up_blocks.3.resnets.2.conv_shortcut.weight"
    )
    assert keymap.canonical("encoder.down.0.block.1.conv1.bias") == (
        "encoder.down_blocks.0.resnets.1.conv1.bias"
    )
    assert keymap.canonical("decoder.mid.attn_1.proj_out.weight") == (
        "decoder.mid_block.attentions.0.to_out.0.weight"
    )


@pytest.mark.parametrize(
    ("others", "family", "factor"),
    [
        ({"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "sdxl", 0.13025),
        ({"cond_stage_model.model.ln_final.weight": (1024,)}, "sd2", 0.18215),
    ],
)
def test_the_rest_of_the_file_names_the_family(
    others: dict[str, tuple[int, ...]], family: str, factor: float
) -> None:
    prefix = "first_stage_model."
    shapes = {prefix + k: v for k, v in shapes_in(CONFIGS["sd1"], "original").items()} | others
    (vae,) = identify(shapes)
    assert (vae.family, vae.config["scaling_factor"], vae.open_to) == (family, factor, ())


@pytest.mark.parametrize(
    ("architecture", "name", "family"),
    [
        ("stable-diffusion-xl-v1-base", "sd1", "sdxl"),
        ("stable-diffusion-v1", "sd1", "sd1"),
        ("stable-diffusion-3-medium", "flux1", "sd3"),
        ("Flux.1-schnell", "flux1", "flux1"),
    ],
)
def test_metadata_names_the_family(architecture: str, name: str, family: str) -> None:
    shapes = shapes_in(CONFIGS[name], "original")
    (vae,) = identify(shapes, metadata={"modelspec.architecture": architecture})
    assert (vae.family, vae.open_to) == (family, ())


def test_an_open_family_warns_and_names_the_choice() -> None:
    shapes = shapes_in(CONFIGS["sd1"], "original")
    with pytest.warns(sdconv.SdconvWarning, match="sd1 or sd2 or sdxl.*sd1 was taken.*family="):
        sdconv.infer(shapes)
    with pytest.warns(sdconv.SdconvWarning, match="flux1 or sd3"):
        sdconv.infer(shapes_in(CONFIGS["flux1"], "diffusers"))


def test_the_caller_decides() -> None:
    shapes = shapes_in(CONFIGS["flux1"], "original")
    config = sdconv.infer(shapes, family="sd3")["vae"]
    assert (config["scaling_factor"], config["shift_factor"]) == (1.5305, 0.0609)
    with pytest.raises(sdconv.InputError, match=r"does not fit a VAE with 16 latent channels"):
        sdconv.infer(shapes, family="sdxl")
    with pytest.raises(sdconv.InputError, match="unknown family"):
        sdconv.infer(shapes, family="sd9")


def test_shapes_may_be_lists_as_json_has_them() -> None:
    shapes = shapes_in(CONFIGS["three levels"], "original")
    lists = json.loads(json.dumps(shapes))
    assert sdconv.infer(lists) == sdconv.infer(shapes)


def test_flux2_is_known_by_its_statistics() -> None:
    config = AutoencoderKLFlux2Config(**AutoencoderKLFlux2Config.assumed)
    shapes = shapes_of(on_meta(config))
    assert sdconv.infer(shapes) == {"vae": config}
    original = original_tensors(on_meta(config).state_dict(), config)
    assert "encoder.quant_conv.weight" in original
    assert sdconv.infer({k: tuple(v.shape) for k, v in original.items()}) == {"vae": config}
    (identified,) = identify(shapes, config=config.to_json())
    assert (identified.family, identified.config) == ("flux2", config)
    assert sdconv.infer(shapes, family="flux2") == {"vae": config}
    with pytest.raises(sdconv.InputError, match="does not fit"):
        sdconv.infer(shapes, family="flux1")
    # repacked files keep the quant convolutions outside the halves
    outside = {
        k.replace("encoder.quant", "quant").replace("decoder.post_quant", "post_quant"): v
        for k, v in ((k, tuple(v.shape)) for k, v in original.items())
    }
    assert sdconv.infer(outside) == {"vae": config}


def test_flux2_with_a_smaller_decoder() -> None:
    assumed = AutoencoderKLFlux2Config.assumed
    config = AutoencoderKLFlux2Config(
        **{**assumed, "decoder_block_out_channels": (96, 192, 384, 384)}
    )
    assert sdconv.infer(shapes_of(on_meta(config))) == {"vae": config}


TINY = dict(AutoencoderTinyConfig.assumed)
TINY_CONFIGS = {
    "taesd": AutoencoderTinyConfig(**TINY),
    "taef1": AutoencoderTinyConfig(**{**TINY, "latent_channels": 16}),
    "taef2": AutoencoderTinyConfig(**{**TINY, "latent_channels": 32, "use_midblock_gn": True}),
    "taesana": AutoencoderTinyConfig(
        **{
            **TINY,
            "latent_channels": 32,
            "encoder_stem_channels": (32, 64),
            "decoder_block_out_channels": (256, 128, 64, 64, 64, 64),
            "num_decoder_blocks": (3, 3, 3, 3, 3, 1),
        }
    ),
}


@pytest.mark.parametrize("layout", ["diffusers", "original", "taesd_ prefix"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tiny_autoencoders(name: str, layout: str) -> None:
    config = TINY_CONFIGS[name]
    with torch.device("meta"):
        tensors = sdconv.AutoencoderTiny(config).state_dict()
    if layout != "diffusers":
        tensors = original_tensors(tensors, config)
    if layout == "taesd_ prefix":
        tensors = {f"taesd_{k}": v for k, v in tensors.items()}
        tensors["vae_scale"] = torch.zeros(())
    assert sdconv.infer({k: tuple(v.shape) for k, v in tensors.items()}) == {"vae": config}


UNKNOWN = {
    "nothing": {},
    "a language model": {
        "model.embed_tokens.weight": (32000, 4096),
        "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
        "lm_head.weight": (32000, 4096),
    },
    "a video VAE": {
        "encoder.conv_in.weight": (128, 3, 3, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3, 3),
        "encoder.down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3, 3),
    },
    "a deep-compression autoencoder": {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.stages.0.0.conv1.conv.weight": (128, 128, 3, 3),
        "decoder.conv_in.weight": (512, 32, 3, 3),
    },
    "a LoRA": {"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3)},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_networks_are_not_taken_for_these(name: str) -> None:
    with pytest.raises(sdconv.UnknownNetworkError) as caught:
        sdconv.infer(UNKNOWN[name])
    text = str(caught.value)
    assert "no network that sdconv knows" in text and "expected: a VAE" in text and "got:" in text


def test_two_vaes_are_refused() -> None:
    one = shapes_in(CONFIGS["sd1"], "original")
    both = {f"{p}.{k}": v for p in ("first_stage_model", "vae") for k, v in one.items()}
    with pytest.raises(sdconv.UnknownNetworkError, match="several networks that could be the vae"):
        sdconv.infer(both)


def test_half_a_vae_is_incomplete() -> None:
    shapes = shapes_in(CONFIGS["sd1"], "diffusers")
    decoder = {k: v for k, v in shapes.items() if k.startswith("decoder")}
    with pytest.raises(sdconv.WeightsMismatchError, match="the VAE is incomplete"):
        sdconv.infer(decoder)


def test_groups_that_do_not_divide_are_named() -> None:
    shapes = {
        k: tuple(16 if n == 128 else n for n in v)
        for k, v in shapes_in(CONFIGS["sd1"], "diffusers").items()
    }
    with pytest.raises(sdconv.WeightsMismatchError, match=r"16 channels.*32 normalisation groups"):
        sdconv.infer(shapes, family="sd1")


@pytest.mark.parametrize("shape", [(), (5,), (2**40, 0, 3, 3)])
@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv_in.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
        "encoder.down_blocks.0.resnets.200000.conv1.weight",
        "decoder.up_blocks." + "9" * 5000 + ".resnets.0.conv1.weight",
    ],
)
@pytest.mark.filterwarnings("ignore::sdconv.SdconvWarning")
def test_absurd_shapes_and_numbers(name: str, shape: tuple[int, ...]) -> None:
    shapes = {**shapes_in(CONFIGS["three levels"], "diffusers"), name: shape}
    try:
        assert "vae" in sdconv.infer(shapes)
    except sdconv.SdconvError as error:
        assert len(str(error)) < 20_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers_per_block": 10**6}, "counts from 0 to 64"),
        ({"block_out_channels": [32, 2**63]}, "no network has"),
        ({"scaling_factor": "x"}, "wrong type for scaling_factor"),
        ({"use_quant_conv": "no"}, "wrong type for use_quant_conv"),
        ({"sample_size": 1.5}, "wrong type for sample_size"),
    ],
)
def test_absurd_configs(change: dict[str, object], words: str) -> None:
    shapes = shapes_in(CONFIGS["three levels"], "diffusers")
    with pytest.raises(sdconv.CheckpointError, match=words):
        identify(shapes, config={**CONFIGS["three levels"].to_json(), **change})


def test_metadata_too_deep_to_read() -> None:
    shapes = shapes_in(CONFIGS["three levels"], "diffusers")
    with pytest.raises(sdconv.CheckpointError, match="is not JSON"):
        identify(shapes, metadata={"sdconv.config": "[" * 200_000})


def test_a_family_must_fit_a_given_config_too() -> None:
    config = CONFIGS["three levels"]
    shapes = shapes_in(config, "diffusers")
    with pytest.raises(sdconv.InputError, match="does not fit"):
        identify(shapes, config=config.to_json(), family="sd3")
