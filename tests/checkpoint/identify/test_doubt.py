"""What is open stays open until the caller decides: through convert, save and further loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.weight_files import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.checkpoint.save import original_tensors

KL = seeded.SMALL_KL
KL16 = seeded.kl((32, 64), 16, False, layers_per_block=1)
VAE = "first_stage_model."
State = dict[str, Tensor]
ARCHITECTURE = "modelspec.architecture"


def vae(config: Any = KL, prefix: str = VAE) -> State:
    named = original_tensors(seeded.tensors(config), config)
    return {prefix + name: tensor.contiguous() for name, tensor in named.items()}


def unet(width: int, prefix: str = "model.diffusion_model.") -> State:
    config = {**unets.smallest("SD1"), "cross_attention_dim": width}
    config["block_out_channels"] = (64,) * 4
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    return {prefix + name: tensor for name, tensor in seeded.weights(shapes).items()}


def zeros(**shapes: tuple[int, ...]) -> State:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


# other networks next to such a VAE, by names that their authors or diffusers gave
UNKNOWN: dict[str, dict[str, tuple[int, ...]]] = {
    "AuraFlow": {
        "model.double_layers.0.attn.w1q.weight": (32, 32),
        "model.cond_seq_linear.weight": (32, 2048),
    },
    "AuraFlow in diffusers": {"joint_transformer_blocks.0.attn.to_k.weight": (32, 32)},
    "PixArt-Sigma": {
        "blocks.0.cross_attn.kv_linear.weight": (64, 32),
        "y_embedder.y_proj.fc1.weight": (32, 4096),
    },
    "PixArt-Sigma in diffusers": {"transformer_blocks.0.attn2.to_k.weight": (32, 1152)},
    "HunyuanDiT": {"blocks.0.attn2.to_k.weight": (32, 1024)},
    "a transformer of width 768": {"model.diffusion_model.a.attn2.to_k.weight": (32, 768)},
    "a transformer of width 2048": {"transformer.a.attn2.to_k.weight": (32, 2048)},
    "and a text encoder": {
        "model.blocks.0.attn1.to_k.weight": (32, 32),
        "cond_stage_model.model.ln_final.weight": (32,),
    },
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_transformer_is_no_evidence(name: str) -> None:
    state = vae() | zeros(**UNKNOWN[name])
    with pytest.warns(sdconv.SdconvWarning, match="could be of sd1 or sd2 or sdxl") as caught:
        loaded = sdconv.load(state, "vae")
    said = str(caught[0].message)
    assert "0.18215 for sd1 and sd2, 0.13025 for sdxl" in said
    assert said.endswith("pass family= to decide")
    assert loaded.config.open_to == ("sd1", "sd2", "sdxl")


def test_the_16_channel_ones_likewise() -> None:
    with pytest.warns(sdconv.SdconvWarning) as caught:
        sdconv.load(vae(KL16))
    said = str(caught[0].message)
    assert "0.3611 with shift_factor 0.1159 for flux1" in said
    assert "1.5305 with shift_factor 0.0609 for sd3" in said


@pytest.mark.parametrize(("width", "factor"), [(768, 0.18215), (1024, 0.18215), (2048, 0.13025)])
def test_a_unets_own_tensors_are_evidence(width: int, factor: float) -> None:
    found = sdconv.load(vae() | unet(width), "vae")
    assert (found.config.scaling_factor, found.config.open_to) == (factor, ())


def test_known_transformers_are_evidence() -> None:
    flux = zeros(
        **{
            "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (3, 3),
            "model.diffusion_model.single_blocks.0.linear1.weight": (3, 3),
        }
    )
    assert sdconv.load(vae(KL16) | flux, "vae").config.scaling_factor == 0.3611
    # HunyuanVideo's have other names under double_blocks
    other = {name.replace("img_attn.", "img_attn_"): tensor for name, tensor in flux.items()}
    with pytest.warns(sdconv.SdconvWarning, match="flux1 or sd3"):
        sdconv.load(vae(KL16) | other, "vae")


OUTPUTS = [
    ("out.safetensors", "original"),
    ("out.safetensors", "diffusers"),
    ("folder", "diffusers"),
]


@pytest.mark.parametrize(("name", "layout"), OUTPUTS)
@pytest.mark.parametrize("how", ["convert", "save"])
def test_a_doubt_is_not_lost(how: str, name: str, layout: str, tmp_path: Path) -> None:
    state, out = vae(prefix=""), tmp_path / name
    with pytest.warns(sdconv.SdconvWarning, match="could be of"):
        if how == "convert":
            convert(state, out, layout)
        else:
            sdconv.save(sdconv.load(state), out, layout=layout)
    config = (
        json.loads(sdconv.read_header(out).metadata["sdconv.config"])
        if out.suffix
        else json.loads((out / "config.json").read_text())
    )
    assert config["_sdconv_open_to"] == ["sd1", "sd2", "sdxl"]
    # and once more, from what was written
    again = tmp_path / "again.safetensors"
    for source in (out, again):
        with pytest.warns(sdconv.SdconvWarning, match=r"could be of.*pass family= to decide"):
            network = sdconv.load(source)
        if source is out:
            sdconv.save(network, again)
    # until the caller decides
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decided = sdconv.load(again, family="sdxl")
        sdconv.save(decided, again)
        assert sdconv.load(again).config.scaling_factor == 0.13025
    assert "_sdconv_open_to" not in sdconv.read_header(again).metadata["sdconv.config"]


def test_diffusers_opens_an_open_folder(tmp_path: Path) -> None:
    import diffusers

    with pytest.warns(sdconv.SdconvWarning):
        convert(vae(), tmp_path / "vae", "diffusers")
    peer = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert peer.config.scaling_factor == 0.18215


def test_an_open_unet_is_not_lost(tmp_path: Path) -> None:
    config = {**unets.SMALL, "block_out_channels": (32, 64, 96), "use_linear_projection": True}
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    state = seeded.weights(shapes)
    with pytest.warns(sdconv.SdconvWarning, match="attention heads"):
        convert(state, tmp_path / "unet", "diffusers")
    with pytest.warns(sdconv.SdconvWarning, match="attention heads"):
        assert sdconv.load(tmp_path / "unet").config.attention_head_dim == (1, 1, 1)
    assert sdconv.load(tmp_path / "unet", family="sd1").config.attention_head_dim == 8


def test_metadata_against_the_unet(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = vae() | {k: v.contiguous() for k, v in unet(2048).items()}
    for said, loud in (("stable-diffusion-v1", True), ("stable-diffusion-xl-v1-base", False)):
        save_file(state, path, {ARCHITECTURE: said})
        if not loud:
            assert sdconv.load(path, "vae").config.scaling_factor == 0.13025
            continue
        with pytest.warns(sdconv.SdconvWarning, match=r"is of sdxl .* the metadata says sd1"):
            found = sdconv.load(path, "vae")
        assert found.config.scaling_factor == 0.13025
        with pytest.warns(sdconv.SdconvWarning, match="metadata says sd1"):
            sdconv.load(path, "unet")
        with pytest.warns(sdconv.SdconvWarning, match="metadata says sd1"):
            convert(path, tmp_path / "folder", "diffusers")
        with pytest.warns(sdconv.SdconvWarning, match="could be of sdxl or sd1"):
            sdconv.load(tmp_path / "folder", "vae")
        assert sdconv.load(path, "vae", family="sd1").config.scaling_factor == 0.18215


def test_metadata_of_another_number_of_channels(tmp_path: Path) -> None:
    save_file(vae(), tmp_path / "vae.safetensors", {ARCHITECTURE: "Flux.1-dev"})
    with pytest.warns(sdconv.SdconvWarning, match="metadata says flux1"):
        sdconv.load(tmp_path / "vae.safetensors")


def test_a_config_against_the_unet(tmp_path: Path) -> None:
    config = {"vae": KL.to_json()}
    path = tmp_path / "model.safetensors"
    save_file(vae() | unet(2048), path, {"sdconv.config": json.dumps(config)})
    with pytest.warns(sdconv.SdconvWarning, match=r"config with scaling_factor 0.18215.*sdxl"):
        sdconv.load(path, "vae")
    save_file(vae() | unet(768), path, {"sdconv.config": json.dumps(config)})
    sdconv.load(path, "vae")


MEAN, STD = (-1.5, 2.0, -1.25, 2.5), (8.5, 5.75, 6.5, 5.25)
EDM = {"edm_mean": torch.tensor(MEAN), "edm_std": torch.tensor(STD)}


def of_playground(config: Any) -> bool:
    return (config.scaling_factor, config.latents_mean, config.latents_std) == (0.5, MEAN, STD)


def test_playground_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "playground.safetensors"
    save_file(vae() | unet(2048) | EDM, path)
    loaded = sdconv.load(path, "vae")
    assert of_playground(loaded.config)
    assert of_playground(sdconv.infer(sdconv.read_header(path))["vae"])
    # the control: without the statistics it is SDXL
    assert sdconv.load(vae() | unet(2048), "vae").config.scaling_factor == 0.13025
    assert sdconv.load(path, "vae", family="sdxl").config.latents_mean is None

    result = convert(path, tmp_path / "folder", "diffusers")
    assert result.left_out == {}
    content = json.loads((tmp_path / "folder" / "vae" / "config.json").read_text())
    assert (content["latents_mean"], content["latents_std"]) == (list(MEAN), list(STD))
    assert of_playground(sdconv.load(tmp_path / "folder", "vae").config)

    convert(tmp_path / "folder", tmp_path / "back.safetensors", "original")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in EDM.items())
    assert of_playground(sdconv.load(tmp_path / "back.safetensors", "vae").config)
    # also where no metadata says so
    assert of_playground(sdconv.load(back, "vae").config)

    sdconv.save(loaded, tmp_path / "saved.safetensors", layout="original")
    assert of_playground(sdconv.load(load_file(tmp_path / "saved.safetensors")).config)

    convert(path, tmp_path / "d.safetensors", "diffusers")
    assert of_playground(sdconv.load(tmp_path / "d.safetensors", "vae").config)


def test_playground_by_its_name() -> None:
    config = sdconv.load(vae(), family="playground-v2.5").config
    assert config.scaling_factor == 0.5
    assert config.latents_mean == (-1.6574, 1.886, -1.383, 2.5155)
    assert config.latents_std == (8.4927, 5.9022, 6.5498, 5.2299)


@pytest.mark.parametrize(
    "change",
    [
        {"edm_mean": torch.zeros(3)},
        {"edm_std": torch.tensor([1.0, 2.0, 0.0, 1.0])},
        {"edm_mean": torch.tensor([1.0, 2.0, torch.nan, 1.0])},
    ],
)
def test_statistics_that_are_none(change: State) -> None:
    with pytest.raises(sdconv.WeightsMismatchError, match="statistics of this VAE"):
        sdconv.load(vae() | unet(2048) | EDM | change, "vae")


def test_statistics_scale_the_latents() -> None:
    from sdconv.latents import scale, unscale

    network = sdconv.load(vae() | unet(2048) | EDM, "vae")
    raw = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (MEAN, STD))
    scaled = scale(network, raw)
    torch.testing.assert_close(scaled, (raw - mean) * 0.5 / std)
    torch.testing.assert_close(unscale(network, scaled), raw)


def test_statistics_anywhere_and_in_metadata(tmp_path: Path) -> None:
    path = tmp_path / "playground.safetensors"
    for prefix in ("model.", VAE, "vae."):
        state = vae() | unet(2048) | {prefix + name: one for name, one in EDM.items()}
        assert of_playground(sdconv.load(state, "vae").config)
        save_file(state, path)
        assert of_playground(sdconv.infer(sdconv.read_header(path))["vae"])
    for mean, std in (
        (json.dumps(MEAN), json.dumps(STD)),
        ("-1.5,2,-1.25,2.5", "8.5 5.75 6.5 5.25"),
    ):
        save_file(vae() | unet(2048), path, {"edm_mean": mean, "edm_std": std})
        assert of_playground(sdconv.load(path, "vae").config)
        assert of_playground(sdconv.infer(sdconv.read_header(path))["vae"])
        convert(path, tmp_path / "folder", "diffusers")
        assert of_playground(sdconv.load(tmp_path / "folder", "vae").config)
    shapes = sdconv.read_header(path).shapes
    said = {"edm_mean": json.dumps(MEAN), "edm_std": json.dumps(STD)}
    assert of_playground(sdconv.infer(shapes, metadata=said)["vae"])
    save_file(vae() | unet(2048), path, {"edm_mean": "[1, 2]", "edm_std": "x"})
    with pytest.raises(sdconv.WeightsMismatchError, match="statistics of this VAE"):
        sdconv.load(path, "vae")


@pytest.mark.parametrize("name", ["edm_mean", "latents_mean", "model.latents_std", "in metadata"])
def test_statistics_that_are_not_understood_are_a_doubt(name: str, tmp_path: Path) -> None:
    path, state, metadata = tmp_path / "vae.safetensors", vae() | unet(2048), None
    if name == "in metadata":
        metadata = {"latents_mean": "[1, 2, 3, 4]"}
    else:
        state[name] = torch.ones(4)
    save_file(state, path, metadata)
    with pytest.warns(sdconv.SdconvWarning, match="may be statistics of its latents"):
        loaded = sdconv.load(path, "vae")
    assert loaded.config.open_to == ("sdxl", "playground-v2.5")
    assert sdconv.load(path, "vae", family="sdxl").config.open_to == ()


def test_kohyas_metadata_contradict_too(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(vae() | unet(768), path, {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.warns(sdconv.SdconvWarning, match="the metadata says sdxl"):
        sdconv.load(path, "vae")
    save_file(vae(), path, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert sdconv.load(path).config.scaling_factor == 0.13025


def test_the_scaling_factor_that_a_caller_registers_decides(tmp_path: Path) -> None:
    with pytest.warns(sdconv.SdconvWarning, match="could be of"):
        network = sdconv.load(vae())
    network.register_to_config(**dict(network.config))  # as training scripts do
    assert network.config.open_to
    network.register_to_config(scaling_factor=0.13025)
    sdconv.save(network, tmp_path / "vae.safetensors")
    config = sdconv.load(tmp_path / "vae.safetensors").config
    assert (config.scaling_factor, config.open_to) == (0.13025, ())
    given = sdconv.AutoencoderKL.from_single_file(vae(), scaling_factor=0.18215)
    assert given.config.open_to == ()
