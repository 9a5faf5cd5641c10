"""Round trips are exact, both ways, and what is written opens in diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.weight_files import convert
from safetensors import safe_open
from safetensors.torch import load_file

import sdconv
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, AutoencoderTinyConfig

KL = {
    **AutoencoderKLConfig.assumed,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "scaling_factor": 0.7,
}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}
TINY = {
    **AutoencoderTinyConfig.assumed,
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
NETWORKS = {
    "kl": lambda: sdconv.AutoencoderKL(AutoencoderKLConfig(**KL)),
    "kl without quant convolutions": lambda: sdconv.AutoencoderKL(
        AutoencoderKLConfig(**{**KL, **NO_QUANT})
    ),
    "flux2": lambda: sdconv.AutoencoderKLFlux2(
        AutoencoderKLFlux2Config(
            **{**AutoencoderKLFlux2Config.assumed, "block_out_channels": (32, 32)}
        )
    ),
    "tiny": lambda: sdconv.AutoencoderTiny(AutoencoderTinyConfig(**TINY)),
    "tiny, pooled": lambda: sdconv.AutoencoderTiny(
        AutoencoderTinyConfig(**{**TINY, "use_midblock_gn": True})
    ),
    "tiny decoder alone": lambda: sdconv.AutoencoderTiny(
        AutoencoderTinyConfig(
            **{**TINY, "encoder_block_out_channels": (), "num_encoder_blocks": ()}
        )
    ),
}


def test_names_of_files(tmp_path: Path) -> None:
    shouted, long = tmp_path / "VAE.SAFETENSORS", tmp_path / f"{'é' * 120}.safetensors"
    for path in (shouted, long):
        assert sdconv.save(made("tiny"), path) == [path]
        assert_same(sdconv.load(path), made("tiny"))
    # a dot makes no file
    assert sdconv.save(made("tiny"), tmp_path / "v1.5")[0] == tmp_path / "v1.5" / "config.json"


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for key in first:
        assert first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", NETWORKS)
def test_single_file_round_trip(name: str, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = made(name).to(dtype)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert sdconv.save(network, first, layout=layout) == [first]
    loaded = sdconv.load(first)
    assert loaded.config == network.config
    assert_same(loaded, network)
    # the other way round: from the file, the same file
    sdconv.save(loaded, second, layout=layout)
    assert first.read_bytes() == second.read_bytes()


IMAGE = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20}
SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 16 + 6 * 256,
}


def labelled(label: dict[str, Any], attention: bool) -> sdconv.UNet2DConditionModel:
    """A U-Net with transformers at the first level, where unCLIP has them, or without, as SDXL."""
    torch.manual_seed(0)
    config = dict(unets.SMALL, block_out_channels=(32, 64, 96), attention_head_dim=8, **label)
    if not attention:
        config["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
        config["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return unets.ours(unets.theirs(config))


@pytest.mark.filterwarnings("ignore:the unet ")
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("label", [IMAGE, SIZES])
def test_original_labels_are_what_the_config_says(
    label: dict[str, Any], attention: bool, tmp_path: Path
) -> None:
    """The original layout has one name for two things, which shapes tell apart in known families
    only."""
    network = labelled(label, attention)
    first, second = tmp_path / "first.safetensors", tmp_path / "second"
    sdconv.save(network, first, layout="original")
    assert "label_emb.0.0.weight" in sdconv.read_header(first).tensors
    loaded = sdconv.load(first)
    assert loaded.config == network.config
    assert_same(loaded, network)
    convert(first, second, "diffusers")
    assert_same(sdconv.load(second), network)
    # the control: without the config, an image embedding is taken for sizes where both are possible
    bare = sdconv.infer(sdconv.read_header(first).shapes)["unet"]
    assert (bare.addition_embed_type is None) == (attention and label is IMAGE)


def test_two_embeddings_of_one_original_name_are_refused(tmp_path: Path) -> None:
    both = labelled({**IMAGE, **SIZES}, True)
    with pytest.raises(sdconv.InputError, match="no name for a tensor") as caught:
        sdconv.save(both, tmp_path / "unet.safetensors", layout="original")
    assert "for add_embedding.linear_1" in str(caught.value)
    sdconv.save(both, tmp_path / "unet.safetensors")
    assert_same(sdconv.load(tmp_path / "unet.safetensors"), both)


@pytest.mark.parametrize("name", ["kl", "kl without quant convolutions", "flux2", "tiny"])
def test_folder_opens_in_diffusers(name: str, tmp_path: Path) -> None:
    import diffusers

    network = made(name)
    sdconv.save(network, tmp_path / "vae")
    theirs = getattr(diffusers, network.config.class_name).from_pretrained(tmp_path / "vae")
    assert_same(network, theirs)
    written = json.loads((tmp_path / "vae" / "config.json").read_text())
    del written["_class_name"]
    assert {key: theirs.config[key] for key in written} == written
    loaded = sdconv.load(tmp_path / "vae")
    assert loaded.config == network.config
    assert_same(loaded, network)


def test_original_file_opens_in_diffusers(tmp_path: Path) -> None:
    import diffusers

    network = made("kl")
    sdconv.save(network, tmp_path / "vae")
    sdconv.save(network, tmp_path / "vae.safetensors", layout="original")
    theirs = diffusers.AutoencoderKL.from_single_file(
        tmp_path / "vae.safetensors", config=str(tmp_path / "vae"), local_files_only=True
    )
    assert_same(network, theirs)


def test_what_diffusers_writes_comes_back_in_the_original_layout(tmp_path: Path) -> None:
    import diffusers

    fields = {k: v for k, v in KL.items() if k not in ("latents_mean", "latents_std")}
    theirs = diffusers.AutoencoderKL(
        **fields,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    theirs.save_pretrained(tmp_path / "vae")
    sdconv.save(sdconv.load(tmp_path / "vae"), tmp_path / "o.safetensors", layout="original")
    back = sdconv.load(tmp_path / "o.safetensors")
    assert_same(back, theirs)
    names = set(load_file(tmp_path / "o.safetensors"))
    assert "decoder.up.0.block.0.norm1.weight" in names
    assert load_file(tmp_path / "o.safetensors")["encoder.mid.attn_1.q.weight"].ndim == 4


def test_metadata_states_what_shapes_cannot(tmp_path: Path) -> None:
    sdconv.save(made("kl"), tmp_path / "vae.safetensors")
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["sdconv.config"])["scaling_factor"] == 0.7


REFUSED = {
    "layout": (lambda n, p: sdconv.save(n, p / "a.safetensors", layout="ldm"), "unknown layout"),
    "folder": (lambda n, p: sdconv.save(n, p / "vae", layout="original"), "is a single file"),
    "model": (lambda n, p: sdconv.save(torch.nn.Linear(2, 2), p / "a"), "not a network"),
    "path": (lambda n, p: sdconv.save(n, p / "taken" / "a.safetensors"), "cannot be written"),
    "no path": (lambda n, p: sdconv.save(n, None), "not a path"),
    "number": (lambda n, p: sdconv.save(n, 3), "not a path"),
    "nothing": (lambda n, p: sdconv.save(n, ""), "not a path"),
    "NUL": (lambda n, p: sdconv.save(n, p / "new" / "a\0.safetensors"), r"new/a\\x00.* null"),
    "NUL above": (lambda n, p: sdconv.save(n, p / "new\0" / "vae"), "null"),
    "surrogate": (lambda n, p: sdconv.save(n, p / "\ud800.safetensors"), "cannot be written"),
    "long name": (
        lambda n, p: sdconv.save(n, p / "new" / f"{'x' * 300}.safetensors"),
        "cannot be written",
    ),
    "checkpoint": (
        lambda n, p: sdconv.save(n, p / "out.ckpt"),
        r"(?s)only safetensors files are written.*hint: name it out\.safetensors",
    ),
    "checkpoint, shouted": (lambda n, p: sdconv.save(n, p / "OUT.PTH"), "only safetensors"),
    "meta device": (
        lambda n, p: sdconv.save(n.to("meta"), p / "new" / "a.safetensors"),
        r"(?s)tensors without values.*on the meta device, such as encoder\.",
    ),
    "meta device, folder": (lambda n, p: sdconv.save(n.to("meta"), p / "vae"), "without values"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder would have to be")
    call, words = REFUSED[what]
    with pytest.raises(sdconv.SdconvError, match=words):
        call(made("tiny"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.mark.parametrize("name", ["tiny, pooled", "tiny decoder alone"])
def test_no_folder_is_written_that_diffusers_would_misread(name: str, tmp_path: Path) -> None:
    with pytest.raises(sdconv.SdconvError, match="cannot represent this network"):
        sdconv.save(made(name), tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


def test_a_folder_of_a_files_name(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.mkdir()
    with pytest.raises(sdconv.InputError, match="is a folder"):
        sdconv.save(seeded.network(seeded.SMALL_KL), out)
    assert not list(out.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    path = tmp_path / "vae.safetensors"
    sdconv.save(made("tiny"), path)
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(sdconv.CheckpointError, match="No space left"):
        sdconv.save(made("kl"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
