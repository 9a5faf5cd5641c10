"""Diffusion features find the parts of an image in its shifted copy."""

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
from helpers.slow import first_of
from torch import Tensor

import sdconv
from sdconv.features import recipes
from sdconv.images import read_image, to_tensor

CELL = 16  # pixels per cell of the small U-Net's first up block
SIDE = 224


@cache
def networks(kind: str, folder: Path | None = None) -> tuple[Any, Any]:
    """The small VAE and U-Net that ship, as sdconv's classes or, through a folder, diffusers'."""
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
    """A square of the photo with its upper left corner at (top, left)."""
    photo = to_tensor(read_image(WEIGHTS / "photo.jpg").image)
    return photo[..., top : top + SIDE, left : left + SIDE]


def features(image: Tensor, seed: int, kind: tuple[Any, Any] | None = None) -> Tensor:
    vae, unet = kind or networks("sdconv")
    # the small U-Net was trained with unit vectors as its prompt embedding
    return recipes.dift(
        vae, unet, image, torch.eye(4)[None], timestep=101, up_block=0, noises=4, seed=seed
    )


def found(features: Tensor, others: Tensor, shift: tuple[int, int]) -> float:
    """The share of cells in both images that are found within one cell of their true position,
    which is ``shift`` pixels further up and left in the other image."""
    rows, columns = features.shape[2:]
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    there = torch.stack(grid, dim=-1) - torch.tensor(shift) // CELL
    both = (there >= 0).all(-1)
    (nearest,) = recipes.nearest_cells(features, others)
    near = ((nearest - there).abs() <= 1).all(-1)
    return near[both].float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("shift", first_of([(32, 32), (0, 32), (32, 0)]))
def test_cells_are_found_in_a_shifted_copy(shift: tuple[int, int]) -> None:
    # with different noise, so that the match is not due to the noise
    image, copy = features(window(0, 0), seed=0), features(window(*shift), seed=1)
    assert image.shape == (1, 96, SIDE // CELL, SIDE // CELL)
    assert found(image, copy, shift) >= 0.9
    # neither in a mirrored image nor among the same features in random order
    mirrored = features(window(*shift).flip(2, 3), seed=1)
    order = torch.randperm(copy[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = copy.flatten(2)[:, :, order].view_as(copy)
    assert found(image, mirrored, shift) < 0.2
    assert found(image, shuffled, shift) < 0.2
    assert found(image, copy, (96, 96)) < 0.2


def test_diffusers_networks_give_the_same(tmp_path: Path) -> None:
    image = window(0, 0)[..., :64, :96]
    theirs = features(image, 0, networks("diffusers", tmp_path))
    assert torch.equal(theirs, features(image, 0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdconv", "diffusers"])
def test_the_same_by_hand(kind: str) -> None:
    vae, unet = pipelines.vae(), unets.theirs(unets.smallest("SDXL"))
    if kind == "sdconv":
        unet = unets.ours(unet)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    _, _, text, *_, added = unets.inputs(unet.config)
    noise = torch.Generator().manual_seed(7)
    scheduler = pipelines.scheduler()
    expected = []
    for _ in range(3):
        kept: list[Tensor] = []
        handle = unet.up_blocks[1].register_forward_hook(lambda *call: kept.append(call[2]))  # noqa: B023
        latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        drawn = torch.randn(latents.shape[1:], generator=noise)
        noisy = scheduler.add_noise(latents, drawn, torch.tensor([261]))
        unet(noisy, 261, text, added_cond_kwargs=added)
        handle.remove()
        expected.append(kept[0])
    given = {"noises": 3, "seed": 7, "added_cond_kwargs": added}
    seen = recipes.dift(vae, unet, images, text, **given)
    # The inputs differ by a rounding: diffusers mixes with roots in float32, of a product of 261
    # alphas in float32. The network amplifies that: changing its inputs by up to one ulp moves its
    # output by 1.3e-6, and these by 1.5e-6. The next timestep moves it by 8e-2.
    by_hand = torch.stack(expected).mean(0)
    assert error(seen, by_hand) < 1e-5
    theirs = recipes.dift(vae, unet, images, text, alphas_cumprod=scheduler.alphas_cumprod, **given)
    assert error(theirs, by_hand) < 1e-5
    assert error(theirs, seen) < 1e-5
    next_timestep = recipes.dift(vae, unet, images, text, timestep=262, **given)
    assert error(next_timestep, by_hand) > 1e-2


def test_the_network_stops_after_the_up_block() -> None:
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


def test_latents_of_a_tiny_autoencoder() -> None:
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
def test_invalid_arguments_are_refused(given: dict[str, Any], words: str) -> None:
    vae, unet = networks("sdconv")
    with pytest.raises(sdconv.InputError, match=words):
        recipes.dift(vae, unet, torch.zeros(1, 3, 32, 32), torch.eye(4)[None], **given)
    with pytest.raises(sdconv.InputError, match="target: "):
        recipes.dift(vae, vae, torch.zeros(1, 3, 32, 32), torch.eye(4)[None])


def test_nearest_cells_match_a_search_one_by_one() -> None:
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
def test_features_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(sdconv.InputError, match=r"\(2, 8, h, w\)"):
        recipes.nearest_cells(torch.ones(2, 8, 2, 2), torch.ones(shape))
