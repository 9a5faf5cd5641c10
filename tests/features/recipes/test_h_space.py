"""Directions added to the mid block's output; a direction of zeros changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import capturing, implementations, pipelines, unets

import sdconv
from sdconv.features import recipes


@pytest.mark.parametrize("kind", implementations.NAMES)
def test_a_pipeline(kind: str) -> None:
    pipe = implementations.pipeline(kind, "text")
    plain = pipelines.run(pipe, "text")
    with recipes.h_space(pipe, torch.zeros(64, 1, 1)):
        assert pipelines.run(pipe, "text") == plain
    direction = torch.linspace(-1, 1, 64)[:, None, None]
    with sdconv.capture(pipe, "unet.mid_block") as before:
        with recipes.h_space(pipe, direction, steps=[1]):
            with sdconv.capture(pipe, "unet.mid_block") as maps:
                changed = pipelines.run(pipe, "text")
    assert torch.equal(changed.latents[0], plain.latents[0])
    assert not torch.equal(changed.latents[1], plain.latents[1])
    old, new = (one.series("unet.mid_block").tensors for one in (before, maps))
    assert torch.equal(new[0], old[0])
    assert torch.equal(new[1], old[1] + direction)


@torch.no_grad()
def test_the_difference_of_two_runs_leads_from_one_to_the_other() -> None:
    network = capturing.unet()
    maps = [sdconv.run_until(network, "mid_block", *capturing.at(step)) for step in (1, 801)]
    one, other = (capturing.one(each, "mid_block") for each in maps)
    with recipes.h_space(network, other - one), sdconv.capture(network, "mid_block") as moved:
        network(*capturing.at(1))
    torch.testing.assert_close(capturing.one(moved, "mid_block"), other)
    assert not torch.allclose(one, other)


def test_a_direction_or_network_that_does_not_fit() -> None:
    network = capturing.unet()
    with (
        pytest.raises(sdconv.InputError, match=r"mid_block: (.|\n)*got: \(3, 1, 1\)"),
        torch.no_grad(),
        recipes.h_space(network, torch.zeros(3, 1, 1)),
    ):
        network(*capturing.at(1))
    without = unets.theirs(unets.smallest("KOALA 700M"))
    with pytest.raises(sdconv.InputError), recipes.h_space(without, torch.zeros(1)):
        pass
    assert not capturing.hooks_on(network)
