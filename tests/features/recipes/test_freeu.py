"""FreeU as an edit gives what diffusers' own gives, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import implementations, pipelines, unets
from torch import Tensor

from sdconv.features import recipes

FACTORS = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


@pytest.mark.parametrize("kind", implementations.NAMES)
@pytest.mark.parametrize("family", ["SD1", "SDXL"])
def test_a_network(kind: str, family: str) -> None:
    check(implementations.unet(kind, unets.smallest(family)))


@pytest.mark.parametrize("family", ["KOALA 700M", "one level", "no transformers"])
def test_networks_of_other_shapes(family: str) -> None:
    check(unets.theirs(unets.smallest(family)))


@torch.no_grad()
def check(network: Any) -> None:
    given = unets.inputs(network.config)
    plain = network(*given)[0]
    with recipes.freeu(network, **FACTORS):
        found = network(*given)[0]
    assert torch.equal(network(*given)[0], plain)
    network.enable_freeu(**FACTORS)
    expected = network(*given)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("kind", implementations.NAMES)
@pytest.mark.parametrize("name", ["text", "xl"])
def test_a_pipeline(kind: str, name: str) -> None:
    pipe = implementations.pipeline(kind, name)
    plain = pipelines.run(pipe, name)
    with recipes.freeu(pipe, **FACTORS):
        found = pipelines.run(pipe, name)
    assert implementations.untouched(pipe.unet)
    pipe.enable_freeu(**FACTORS)
    assert found == pipelines.run(pipe, name)
    assert found != plain


@torch.no_grad()
def test_half_precision() -> None:
    network = unets.theirs(unets.smallest("SD1")).to(torch.bfloat16)
    given = [x.bfloat16() if isinstance(x, Tensor) else x for x in unets.inputs(network.config)]
    with recipes.freeu(network, **FACTORS):
        found = network(*given)[0]
    network.enable_freeu(**FACTORS)
    assert torch.equal(found, network(*given)[0])
