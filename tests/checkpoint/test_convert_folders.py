"""Pipelines' folders made single files that diffusers opens, and folders again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from helpers import pipelines
from helpers.weight_files import convert, raw
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import sdconv


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines as diffusers saves them."""
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in ("text", "refiner", "upscale"):
        pipelines.pipeline(kind).save_pretrained(folder / kind)
    # SDXL's text encoders, which diffusers distinguishes by their widths
    wide = pipelines.text_encoder(CLIPTextModelWithProjection).config
    wide.hidden_size = 48
    encoder = pipelines.seeded(lambda: CLIPTextModelWithProjection(wide), 12)
    unet = pipelines.xl_unet(6, pipelines.TEXT_WIDTH + 48)
    pipelines.pipeline("xl", text_encoder_2=encoder, unet=unet).save_pretrained(folder / "xl")
    return folder


@pytest.mark.parametrize("kind", ["text", "xl"])
def test_a_file_made_from_a_folder_opens_in_diffusers(
    kind: str, folders: Path, tmp_path: Path
) -> None:
    made = tmp_path / "model.safetensors"
    assert convert(folders / kind, made, "original").carried == {}
    name = pipelines.KINDS[kind].name
    before = getattr(diffusers, name).from_pretrained(folders / kind)
    after = getattr(diffusers, name).from_single_file(
        made, config=str(folders / kind), local_files_only=True
    )
    for pipe in (before, after):
        pipe.set_progress_bar_config(disable=True)
    assert pipelines.run(before, kind) == pipelines.run(after, kind)
    # sdconv reads the same configs from it, which shapes alone would not give for these networks
    for component in ("vae", "unet"):
        ours = sdconv.load(made, component)
        assert ours.config == sdconv.load(folders / kind, component).config


@pytest.mark.parametrize(
    ("kind", "encoder", "prefix"),
    [
        ("upscale", "text_encoder", "cond_stage_model.model."),
        ("xl", "text_encoder_2", "conditioner.embedders.1.model."),
        ("refiner", "text_encoder_2", "conditioner.embedders.0.model."),
    ],
)
def test_text_encoders_in_open_clips_layout(
    kind: str, encoder: str, prefix: str, folders: Path, tmp_path: Path
) -> None:
    made = tmp_path / "model.safetensors"
    convert(folders / kind, made, "original")
    theirs = load_file(folders / kind / encoder / "model.safetensors")
    model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folders / kind / encoder))
    back = convert_open_clip_checkpoint(model, load_file(made), prefix)
    if not any(name.startswith("text_model.") for name in theirs):  # transformers from 5.6 on
        back = {name.removeprefix("text_model."): tensor for name, tensor in back.items()}
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_a_text_encoder_other_than_clip_keeps_its_name(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "text", tmp_path / "model")
    other = {"encoder.block.0.layer.0.weight": torch.ones(3)}
    save_file(other, tmp_path / "model" / "text_encoder" / "model.safetensors")
    (tmp_path / "model" / "left").mkdir()
    save_file(other, tmp_path / "model" / "left" / "not_of_the_pipeline.safetensors")
    result = convert(tmp_path / "model", tmp_path / "m.safetensors", "original")
    assert result.carried == {"text_encoder": 1}
    assert "text_encoder.encoder.block.0.layer.0.weight" in raw(tmp_path / "m.safetensors")


def test_a_file_in_diffusers_names_becomes_folders_again(folders: Path, tmp_path: Path) -> None:
    made = tmp_path / "model.safetensors"
    result = convert(folders / "text", made, "diffusers")
    assert set(result.carried) == {"text_encoder"}
    convert(made, tmp_path / "parts", "diffusers")
    for component in ("vae", "unet"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        assert raw(tmp_path / "parts" / name) == raw(folders / "text" / name)
        written, before = (
            json.loads((root / component / "config.json").read_text())
            for root in (tmp_path / "parts", folders / "text")
        )
        assert written.items() >= {k: before[k] for k in written}.items()


@pytest.mark.parametrize("kind", ["text", "refiner", "upscale"])
def test_a_file_made_from_a_folder_comes_back_from_diffusers_names_byte_by_byte(
    kind: str, folders: Path, tmp_path: Path
) -> None:
    made, between, back = (tmp_path / f"{name}.safetensors" for name in ("made", "between", "back"))
    convert(folders / kind, made, "original")
    convert(made, between, "diffusers")
    convert(between, back, "original")
    assert back.read_bytes() == made.read_bytes() != between.read_bytes()


def test_pipelines_that_lack_weights(tmp_path: Path) -> None:
    (tmp_path / "pipe" / "vae").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    out = tmp_path / "out.safetensors"
    with pytest.raises(sdconv.CheckpointError, match="is a pipeline without weights"):
        convert(tmp_path / "pipe", out, "original")
    save_file({"x": torch.ones(1)}, tmp_path / "pipe" / "vae" / "model.safetensors")
    with pytest.raises(sdconv.UnknownNetworkError, match="no component 'unet'"):
        convert(tmp_path / "pipe", out, "original", "unet")
    assert not out.exists()
