"""Pipelines give the same bits with networks that sdconv loaded in place of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetXSAdapter, UNet2DConditionModel
from helpers import loras, pipelines
from helpers.patching import REPLACED, code_of, code_run_by, plain
from helpers.pipelines import KINDS, SCHEDULERS, TEXT_WIDTH, pipeline, run, scheduler
from helpers.slow import first_of, marked_slow
from helpers.weight_files import convert
from safetensors.torch import load_file, save_file
from torch import nn

import sdconv
from sdconv.models import unet, vae
from sdconv.streaming.layers import StreamLayer


def swapped(kind: str = "text", **parts: Any) -> Any:
    """A pipeline whose networks are sdconv's, loaded from the state dicts of the original ones."""
    pipe = pipeline(kind, **parts)
    family = KINDS[kind].family
    pipe.vae = sdconv.load(dict(pipe.vae.state_dict()), family=family)
    pipe.unet = sdconv.load(dict(pipe.unet.state_dict()), family=family)
    return pipe


@pytest.mark.parametrize("kind", marked_slow(KINDS, but=["text", "upscale", "xl controlnet"]))
def test_pipelines_give_the_same_pixels(kind: str, tmp_path: Path) -> None:
    pipe = pipeline(kind)
    pipe.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "whole.safetensors", "original")
    file = tmp_path / "single.safetensors"  # without the configs, as other programs write it
    save_file(load_file(tmp_path / "whole.safetensors"), file)
    pipe.vae = sdconv.load(file, component="vae", family=KINDS[kind].family)
    pipe.unet = sdconv.load(file, component="unet", family=KINDS[kind].family)
    assert run(pipe, kind) == plain(kind)


def test_from_the_folder_of_a_pipeline(tmp_path: Path) -> None:
    pipe = pipeline("text")
    pipe.save_pretrained(tmp_path)
    pipe.vae = sdconv.load(tmp_path, component="vae")
    pipe.unet = sdconv.load(tmp_path, component="unet")
    assert run(pipe, "text") == plain()


@pytest.mark.parametrize("kind", first_of(["image", "xl"]))
def test_tiling_streams_and_keeps_the_image(kind: str) -> None:
    pipe = swapped(kind)
    whole = run(pipe, kind).images
    pipe.vae.enable_tiling()
    assert pipe.vae.streaming is not None
    ran = code_run_by(lambda: run(pipe, kind))
    assert StreamLayer.compute.__code__ in ran and code_of(vae.Decoder) not in ran
    assert (run(pipe, kind).images - whole).abs().max() < 1e-5
    pipe.vae.disable_tiling()
    assert torch.equal(run(pipe, kind).images, whole)


def test_sdconvs_code_runs() -> None:
    ran = code_run_by(lambda: run(swapped(), "text"))
    theirs = {code_of(kind) for kind in (*REPLACED, UNet2DConditionModel, AutoencoderKL)}
    assert theirs & code_run_by(lambda: run(pipeline("text"), "text"))
    assert not ran & theirs
    assert {code_of(unet.UNet2DConditionModel), code_of(vae.Decoder)} <= ran


def test_a_hook_gets_the_same_arguments_as_in_diffusers() -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for pipe in (pipeline("xl"), swapped("xl")):
        pipe.unet.add_embedding.register_forward_pre_hook(
            lambda module, *given: seen.append(given), with_kwargs=True
        )
        run(pipe, "xl")
    assert len(seen) == 4  # two steps each
    (embedding,), kwargs = seen[0]
    assert embedding.shape == (4, TEXT_WIDTH + 6 * 256) and kwargs == {}
    assert all(torch.equal(given[0][0], embedding) for given in seen)


def test_a_lora_with_the_original_layouts_names() -> None:
    runs = []
    for pipe in (pipeline("xl"), swapped("xl")):
        # diffusers reads the config to convert the names
        matrices = loras.matrices(pipe.unet, only=r"\.to_|ff|conv1", alpha=1.5)
        pipe.load_lora_weights(loras.kohya(matrices, loras.original_names(pipe.unet)))
        runs.append(run(pipe, "xl"))
    assert runs[0] == runs[1] != plain("xl")


def _weight(pipe: Any) -> None:
    pipe.vae.decoder.mid_block.resnets[0].conv1.weight[0, 0, 1, 1] += 1e-3


def _eps(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].norm1.eps = 1e-6


def _no_time_embedding(pipe: Any) -> None:
    nn.init.zeros_(pipe.unet.down_blocks[0].resnets[0].time_emb_proj.weight)


@pytest.mark.parametrize("fault", [_weight, _eps, _no_time_embedding])
def test_a_fault_changes_the_image(fault: Callable[[Any], None]) -> None:
    pipe = swapped()
    assert run(pipe, "text") == plain()
    with torch.no_grad():
        fault(pipe)
    assert run(pipe, "text") != plain()


# diffusers passes tensors to numpy in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", first_of(SCHEDULERS))
def test_schedulers(name: str) -> None:
    expected = run(pipeline("text", scheduler=scheduler(name)), "text")
    assert expected != plain()
    assert run(swapped(scheduler=scheduler(name)), "text") == expected


@pytest.mark.filterwarnings("ignore:.*upcast_vae. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", first_of(["xl", "upscale"]))
def test_in_half_precision(kind: str) -> None:
    # these two pipelines convert a float16 VAE to float32
    before, after = pipeline(kind).to(torch.float16), swapped(kind).to(torch.float16)
    assert run(after, kind) == run(before, kind)
    assert after.vae.dtype == before.vae.dtype


@pytest.mark.parametrize("kind", ["text", "xl"])
def test_controlnet_xs(kind: str) -> None:
    """diffusers takes the U-Net apart when the pipeline is made."""
    found = []
    config = {**pipeline(kind).unet.config, "layers_per_block": 2}  # which ControlNet-XS expects
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    for make in (pipeline, swapped):
        pipe = make(kind, unet=pipelines.unet(**config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            control = ControlNetXSAdapter.from_unet(pipelines.unet(**config), size_ratio=0.5).eval()
            for parameter in control.parameters():
                if not parameter.any():  # zero, as before training
                    nn.init.normal_(parameter, std=0.1)
        own = "StableDiffusionXL" if kind == "xl" else "StableDiffusion"
        whole = getattr(diffusers, f"{own}ControlNetXSPipeline")
        wanted = inspect.signature(whole.__init__).parameters
        parts = {name: part for name, part in pipe.components.items() if name in wanted}
        xs = whole(**parts, controlnet=control)
        xs.set_progress_bar_config(disable=True)
        assert type(xs.unet).__name__ == "UNetControlNetXSModel"
        for scale in (1.0, 0.0):
            image = xs(
                prompt="cat",
                image=torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(1)),
                controlnet_conditioning_scale=scale,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(2),
                output_type="pt",
            ).images
            found.append(image)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1]), "the control does something"
