"""Diffusion features find the places of a picture again in its shifted copy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import capturing, pipelines, seeded, unets
from helpers.numbers import error
from helpers.paths import WEIGHTS
from torch import Tensor

import sdconv
from sdconv.features import recipes
from sdconv.images import read_image, to_tensor

CELL = 16  # pixels to a place on the first level of the small U-Net's way up
SIDE = 224


@cache
def networks(kind: str, folder: Path | None = None) -> tuple[Any, Any]:
    """The small VAE and U-Net that ship, as sdconv's classes or, by way of a folder, diffusers'."""
    own = [sdconv.load(WEIGHTS / f"tiny-{name}.safetensors", dtype=torch.float32) for name in NAMES]
    if folder is None:
        return own[0], own[1]
    for network, name in zip(own, NAMES, strict=True):
        network.save_pretrained(folder / name)
    classes = (diffusers.AutoencoderKL, diffusers.UNet2DConditionModel)
    vae, unet = (c.from_pretrained(folder / n) for c, n in zip(classes, NAMES, strict=True))
    return vae, unet


NAMES = ("vae", "unet")


def window(top: int, left: int) -> Tensor:
    """A square of the photo, its upper left corner there."""
    photo = to_tensor(read_image(WEIGHTS / "photo.jpg").image)
    return photo[..., top : top + SIDE, left : left + SIDE]


def features(picture: Tensor, seed: int, kind: tuple[Any, Any] | None = None) -> Tensor:
    vae, unet = kind or networks("sdconv")
    # the small U-Net knows no text: four tokens of its own stand for it
    return recipes.dift(
        vae, unet, picture, torch.eye(4)[None], timestep=101, up_block=0, noises=4, seed=seed
    )


def found(features: Tensor, others: Tensor, shift: tuple[int, int]) -> float:
    """The share of the places in both pictures that are found within one place of where they are,
    ``shift`` pixels further up and left in the other one."""
    rows, columns = features.shape[2:]
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    there = torch.stack(grid, dim=-1) - torch.tensor(shift) // CELL
    both = (there >= 0).all(-1)
    (nearest,) = recipes.nearest_cells(features, others)
    near = ((nearest - there).abs() <= 1).all(-1)
    return near[both].float().mean().item()


@pytest.mark.parametrize("shift", [(0, 32), (32, 0), (32, 32)])
def test_places_are_found_in_a_shifted_copy(shift: tuple[int, int]) -> None:
    # other noise, so that it is not the noise that is found
    picture, copy = features(window(0, 0), seed=0), features(window(*shift), seed=1)
    assert picture.shape == (1, 96, SIDE // CELL, SIDE // CELL)
    assert found(picture, copy, shift) >= 0.9
    # neither in a mirrored picture nor among the same features in disorder
    mirrored = features(window(*shift).flip(2, 3), seed=1)
    order = torch.randperm(copy[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = copy.flatten(2)[:, :, order].view_as(copy)
    assert found(picture, mirrored, shift) < 0.2
    assert found(picture, shuffled, shift) < 0.2
    assert found(picture, copy, (96, 96)) < 0.2


def test_diffusers_networks_see_the_same(tmp_path: Path) -> None:
    picture = window(0, 0)[..., :64, :96]
    theirs = features(picture, 0, networks("diffusers", tmp_path))
    assert torch.equal(theirs, features(picture, 0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdconv", "diffusers"])
def test_the_same_by_hand(kind: str) -> None:
    vae, unet = pipelines.vae(), unets.theirs(unets.smallest("SDXL"))
    if kind == "sdconv":
        unet = unets.ours(unet)
    pictures = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    _, _, text, *_, added = unets.inputs(unet.config)
    noise = torch.Generator().manual_seed(7)
    scheduler = pipelines.scheduler()
    expected = []
    for _ in range(3):
        kept: list[Tensor] = []
        handle = unet.up_blocks[1].register_forward_hook(lambda *call: kept.append(call[2]))  # noqa: B023
        latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
        drawn = torch.randn(latents.shape[1:], generator=noise)
        noisy = scheduler.add_noise(latents, drawn, torch.tensor([261]))
        unet(noisy, 261, text, added_cond_kwargs=added)
        handle.remove()
        expected.append(kept[0])
    given = {"noises": 3, "seed": 7, "added_cond_kwargs": added}
    seen = recipes.dift(vae, unet, pictures, text, **given)
    # a batch of noises rounds as one noise does not, by a bit or two of the largest value
    assert error(seen, torch.stack(expected).mean(0)) < 1e-5
    theirs = recipes.dift(
        vae, unet, pictures, text, alphas_cumprod=scheduler.alphas_cumprod, **given
    )
    torch.testing.assert_close(theirs, seen)
    other = recipes.dift(vae, unet, pictures, text, timestep=1, **given)
    assert not torch.allclose(other, seen)


def test_it_ends_with_the_level_asked_for() -> None:
    vae, unet = networks("sdconv")
    passed: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, level=level: passed.append(level))
        for level, block in enumerate(unet.up_blocks)
    ]
    seen = recipes.dift(vae, unet, window(0, 0)[..., :32, :32], torch.eye(4)[None], noises=2)
    for handle in handles:
        handle.remove()
    assert passed == [0, 1] * 2
    assert seen.shape == (1, 96, 4, 4)
    assert not seen.requires_grad
    assert not capturing.hooks_on(unet)


def test_a_tiny_autoencoders_latents() -> None:
    unet = networks("sdconv")[1]
    seen = recipes.dift(
        seeded.network(seeded.tiny()), unet, torch.zeros(2, 3, 32, 32), torch.eye(4)[None], noises=1
    )
    assert seen.shape == (2, 96, 4, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"timestep": 1000}, "timestep: .*(.|\n)*0 to 999(.|\n)*got: 1000"),
        ({"timestep": -1}, "timestep: "),
        ({"timestep": 3, "alphas_cumprod": torch.ones(3)}, "0 to 2"),
        ({"noises": 0}, "noises: "),
        ({"up_block": 3}, r"'up_blocks\.3'"),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    vae, unet = networks("sdconv")
    with pytest.raises(sdconv.InputError, match=words):
        recipes.dift(vae, unet, torch.zeros(1, 3, 32, 32), torch.eye(4)[None], **given)
    with pytest.raises(sdconv.InputError, match="target: "):
        recipes.dift(vae, vae, torch.zeros(1, 3, 32, 32), torch.eye(4)[None])


def test_nearest_cells_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 3, 4, generator=random)
    others = torch.randn(2, 8, 5, 2, generator=random)
    cells = recipes.nearest_cells(features, others * 3)
    assert cells.shape == (2, 3, 4, 2)
    for number, row, column in ((0, 0, 0), (0, 2, 3), (1, 1, 2)):
        alike = torch.cosine_similarity(
            features[number, :, row, column][:, None, None], others[number], dim=0
        )
        best = divmod(int(alike.argmax()), 2)
        assert tuple(cells[number, row, column].tolist()) == best


@pytest.mark.parametrize("shape", [(1, 8, 2, 2), (2, 7, 2, 2), (2, 8, 4)])
def test_features_that_cannot_be_compared(shape: tuple[int, ...]) -> None:
    with pytest.raises(sdconv.InputError, match=r"\(2, 8, h, w\)"):
        recipes.nearest_cells(torch.ones(2, 8, 2, 2), torch.ones(shape))
