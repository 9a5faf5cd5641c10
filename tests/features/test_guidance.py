"""Under guidance `sdconv features` denoises as diffusers' pipelines do, and keeps the maps of the
half that follows the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, pipelines
from safetensors.torch import save_file

import sdconv
from sdconv.features.conditions import conditions
from sdconv.features.drivers import Request, prepare_run
from sdconv.features.prompts import encode_prompt

WORDS, STEPS, LAYER = "a cat and two dogs", 3, "mid_block.resnets.1"
SIDES = (pipelines.HEIGHT, pipelines.WIDTH)


def request(model: Path, **given: Any) -> Request:
    none = dict.fromkeys(("source", "key", "vae", "component", "family", "prefix", "model_key"))
    fixed = {"ema": False, "dtype": torch.float32, "clamp": False, "device": "cpu", "seed": 5}
    return Request(**none | fixed | {"model": model, "size": SIDES, "steps": STEPS} | given)


@torch.no_grad()
def ours(model: Path, **given: Any) -> list[torch.Tensor]:
    run = prepare_run(request(model, **{"prompt": WORDS} | given))
    with sdconv.capture(run.network, LAYER, reduce=run.reduce) as maps:
        for call in run.calls:
            call()
    return [one.tensor for one in maps.series(LAYER)]


def theirs(kind: str, **given: Any) -> list[torch.Tensor]:
    pipe = pipelines.pipeline(kind)
    random = torch.Generator().manual_seed(5)
    size = {"height": SIDES[0], "width": SIDES[1], "num_inference_steps": STEPS}
    with sdconv.capture(pipe, f"unet.{LAYER}") as maps:
        pipe(WORDS, generator=random, output_type="latent", **size, **given)
    return [one.conditional for one in maps.series(f"unet.{LAYER}")]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("text", {}),
        ("text", {"negative_prompt": "a mouse", "guidance_scale": 3.0}),
        ("xl", {}),
        ("xl", {"negative_prompt": ""}),
    ],
)
def test_it_is_a_pipelines_denoising_bit_for_bit(
    kind: str, given: dict[str, Any], folders: dict[str, Path]
) -> None:
    names = {"negative_prompt": "negative", "guidance_scale": "guidance"}
    found = ours(folders[kind], **{names[name]: value for name, value in given.items()})
    expected = theirs(kind, **given)
    assert len(found) == len(expected) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = ours(folders[kind], guidance=9.0)
    assert torch.equal(other[0], found[0])
    assert not torch.equal(other[-1], found[-1])


@torch.no_grad()
def test_the_refiner_takes_diffusers_aesthetic_scores(folders: dict[str, Path]) -> None:
    unet: Any = sdconv.load(folders["refiner"], "unet")
    pipe = pipelines.pipeline("refiner")
    embeds = encode_prompt(folders["refiner"], WORDS)
    assert embeds.negative is not None
    size = (SIDES, (0, 0), SIDES, 6.0, 2.5, SIDES, (0, 0), SIDES)
    expected = pipe._get_add_time_ids(*size, torch.float32, pipelines.TEXT_WIDTH)
    latents = (SIDES[0] // 8, SIDES[1] // 8)
    for prompt, ids in zip((embeds, embeds.negative), expected, strict=True):
        arguments, _ = conditions(unet, latents, 0, prompt)
        assert torch.equal(arguments[7]["time_ids"], ids)


def test_what_guidance_needs(folders: dict[str, Path], tmp_path: Path) -> None:
    unet = folders["text"] / "unet"
    embeds = torch.randn(1, 77, pipelines.TEXT_WIDTH)
    path, latents = tmp_path / "prompt.safetensors", tmp_path / "latents.safetensors"
    save_file({"prompt_embeds": embeds}, path)
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, latents, {"sdconv.latents": "scaled"})
    by_file = {"embeds": path, "prompt": None, "guidance": 5.0}
    for given, words in (
        ({"prompt": None, "guidance": 5.0}, "guidance needs a prompt"),
        ({"source": latents, "guidance": 5.0}, "noise is added to an image"),
        (by_file, "embedding of a negative prompt too"),
        ({"prompt": None, "negative": "a"}, "a negative prompt needs a prompt"),
    ):
        with pytest.raises(sdconv.InputError, match=words):
            ours(folders["text"] if given is not by_file else unet, **given)
    without = ours(unet, **by_file | {"guidance": None})
    save_file({"prompt_embeds": embeds, "negative_prompt_embeds": 0 * embeds}, path)
    assert not torch.equal(ours(unet, **by_file)[-1], without[-1])
    save_file({"prompt_embeds": embeds, "negative_prompt_embeds": embeds[:, :5].clone()}, path)
    with pytest.raises(sdconv.InputError, match="another shape than the prompt's"):
        ours(unet, **by_file)


def test_the_command_says_what_it_does(folders: dict[str, Path], tmp_path: Path) -> None:
    given = ("--model", folders["text"], "--prompt", WORDS, "--steps", 1, "--size", 64)
    ran = commands.run("features", *given, "-l", LAYER, "-o", tmp_path / "a")
    assert ran.exit_code == 0, ran.stderr
    assert "the guidance 7.5, and the feature maps are those of its half" in ran.stderr
    maps = sdconv.open_maps(tmp_path / "a" / "maps.zarr")
    assert maps[LAYER].shape[0] == 1
    assert ">guidance<" in (tmp_path / "a" / "report.html").read_text("utf-8") or (
        '"guidance"' in (tmp_path / "a" / "report.html").read_text("utf-8")
    )
    plain = commands.run("features", *given, "--guidance", 1, "-l", LAYER, "-o", tmp_path / "b")
    assert "the guidance none" in plain.stderr
