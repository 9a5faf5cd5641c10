"""Captured feature maps in autograd's graph."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import capturing, seeded
from torch import Tensor

import sdconv

CONFIG = seeded.kl((32, 32), 4, True, layers_per_block=1)
NAME = "mid_block.resnets.0"


@cache
def encoder() -> Any:
    return seeded.network(CONFIG).encoder


def image() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def one(maps: Any, name: str = NAME) -> Tensor:
    value = maps[name]
    assert isinstance(value, Tensor)
    return value


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """The feature map and the output, through torch's own hook."""
    kept: list[Tensor] = []
    module = encoder().get_submodule(NAME)
    handle = module.register_forward_hook(lambda _, __, y: kept.append(y))
    output = encoder()(x)
    handle.remove()
    return kept[0], output


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_a_loss_on_a_feature_map_reaches_the_input(backend: str) -> None:
    x = image().requires_grad_()
    with sdconv.backend(backend), sdconv.capture(encoder(), NAME, grad=True) as maps:
        encoder()(x)
    (found,) = torch.autograd.grad(one(maps).square().sum(), x)
    (expected,) = torch.autograd.grad(by_hand(x)[0].square().sum(), x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert found.abs().max() > 0
    with sdconv.capture(encoder(), NAME) as plain:
        encoder()(x)
    assert not one(plain).requires_grad


def test_the_output_has_a_gradient_with_respect_to_a_feature_map() -> None:
    x = image()
    with sdconv.capture(encoder(), NAME, grad=True) as maps:
        output = encoder()(x)
    (found,) = torch.autograd.grad(output.square().sum(), one(maps))
    kept, plain = by_hand(x.requires_grad_())
    assert torch.equal(output, plain)
    (expected,) = torch.autograd.grad(plain.square().sum(), kept)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_frozen_weights_and_a_plain_input() -> None:
    network = seeded.network(CONFIG).encoder.requires_grad_(False)
    with sdconv.capture(network, NAME, grad=True) as maps:
        output = network(image())
    assert one(maps).is_leaf
    output.sum().backward()
    assert one(maps).grad is not None


def test_what_is_reduced_has_a_gradient_too() -> None:
    x = image().requires_grad_()
    options: dict[str, Any] = {"reduce": "mean", "channels": [0, 3], "dtype": torch.float64}
    with sdconv.capture(encoder(), NAME, grad=True, **options) as maps:
        encoder()(x)
    (found,) = torch.autograd.grad(one(maps).sum(), x)
    kept, _ = by_hand(x)
    (expected,) = torch.autograd.grad(kept[:, [0, 3]].mean((2, 3)).sum(), x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_writing_into_the_networks_tensor_does_not_show() -> None:
    with torch.enable_grad(), sdconv.capture(encoder(), NAME, grad=True) as maps:
        module = encoder().get_submodule(NAME)
        handle = module.register_forward_hook(lambda _, __, y: y.mul_(2))
        changed = encoder()(image())
        handle.remove()
    kept, plain = by_hand(image())
    assert torch.equal(one(maps), kept)
    assert not torch.equal(changed, plain)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sdconv.InputError, match="on the disk"):
        with sdconv.capture(encoder(), NAME, grad=True, store=tmp_path / "maps"):
            pass
    for without in (torch.no_grad, torch.inference_mode):
        with pytest.raises(sdconv.SdconvError, match="no gradients are recorded"):
            with without(), sdconv.capture(encoder(), NAME, grad=True):
                encoder()(image())
    unet = seeded.network(CONFIG)
    unet.enable_gradient_checkpointing()
    with pytest.raises(sdconv.InputError, match="disable_gradient_checkpointing"):
        with sdconv.capture(unet, f"encoder.{NAME}", grad=True):
            pass


def test_the_gradient_of_a_loss_on_a_unets_feature_maps() -> None:
    recipes = sdconv.features.recipes
    unet = capturing.unet()
    sample, timestep, tokens, *_ = capturing.at(500)
    with torch.no_grad():
        target = sdconv.run_until(unet, "mid_block", sample + 0.1, timestep, tokens)

    def loss(maps: Any) -> Tensor:
        distance: Tensor = maps["mid_block"] - target["mid_block"]
        return distance.square().sum()

    with torch.inference_mode():  # as a pipeline's loop may be
        gradient = recipes.feature_gradient(unet, "mid_block", loss, sample, timestep, tokens)
    assert gradient.shape == sample.shape and not gradient.is_inference()

    @torch.no_grad()
    def value(x: Tensor) -> float:
        return float(loss(sdconv.run_until(unet, "mid_block", x, timestep, tokens)))

    step = 1e-3 * gradient / gradient.norm()
    slope = (value(sample + step) - value(sample - step)) / 2e-3
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)
    assert value(sample - 50 * step) < value(sample) < value(sample + 50 * step)
    for wrong in (lambda maps: maps["mid_block"], lambda maps: 1.0, lambda maps: torch.ones(())):
        with pytest.raises(sdconv.InputError, match="a single number"):
            recipes.feature_gradient(unet, "mid_block", wrong, sample, timestep, tokens)
