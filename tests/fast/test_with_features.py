"""Captures, edits, FreeU and patched pipelines on the fast backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import implementations, pipelines, seeded, unets
from helpers.numbers import error
from helpers.slow import first_of
from torch import Tensor

import sdconv
from sdconv.backends import is_fast, set_backend

WITHIN = 2e-5


def vae() -> tuple[Any, tuple[Any, ...]]:
    network = seeded.network(seeded.SMALL_KL)
    return network, (torch.rand(1, 3, 24, 20, generator=torch.Generator().manual_seed(0)),)


def unet() -> tuple[Any, tuple[Any, ...]]:
    network = unets.ours(unets.theirs(unets.smallest("SD1")))
    return network, unets.inputs(network.config, size=(8, 16))


def by_kind(network: Any) -> dict[str, list[str]]:
    """Hook points by the last part of their names; no block has two of a kind. All points inside
    transformers are one kind; ``cpu/test_transformer.py`` has each of them alone."""
    found: dict[str, list[str]] = {}
    for point in sdconv.features(network):
        kind = "attentions" if "attentions" in point.name else point.name.rpartition(".")[2]
        found.setdefault(kind, []).append(point.name)
    return found


@pytest.mark.parametrize("make", first_of([vae, unet]))
def test_capture_at_every_point(make: Any) -> None:
    network, given = make()
    with torch.no_grad():
        with sdconv.capture(network, [p.name for p in sdconv.features(network)]) as maps:
            plain = network(*given).sample
        expected = maps.to_dict()
        seen: set[str] = set()
        for names in by_kind(network).values():
            with sdconv.backend("fast"), sdconv.capture(network, names) as maps:
                out = network(*given).sample
            assert error(out, plain) < WITHIN
            for name, found in maps.to_dict().items():
                seen.add(name)
                assert error(found, expected[name]) < WITHIN, name
    assert seen == set(expected)
    # control: with the last kind of points, most blocks were fast
    assert not torch.equal(out, plain)


@pytest.mark.parametrize("make", first_of([vae, unet]))
def test_edits_at_every_kind_of_point(make: Any) -> None:
    network, given = make()

    def run(name: str) -> Tensor:
        with torch.no_grad(), sdconv.edit(network, {name: lambda x, _: x.abs()}):
            return network(*given).sample  # type: ignore[no-any-return]

    with torch.no_grad():
        plain = network(*given).sample
    kinds_of_points = {kind: name for kind, (name, *_) in by_kind(network).items()}
    assert len(kinds_of_points) > 10
    seen = 0
    for name in kinds_of_points.values():
        expected = run(name)
        with sdconv.backend("fast"):
            assert error(run(name), expected) < WITHIN, name
        seen += error(plain, expected) > 1e-4
    # the input image has no negative values, and normalisation undoes the shift of a channel
    assert seen >= len(kinds_of_points) - 2


CASES = [
    ("xl controlnet", "patched"),
    *(
        pytest.param(name, "patched", marks=pytest.mark.slow)
        for name in pipelines.KINDS
        if name != "xl controlnet"
    ),
    ("xl", "sdconv"),
    ("text", "block"),
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_pipelines(name: str, how: str) -> None:
    expected = pipelines.run(pipelines.pipeline(name), name)
    pipe = implementations.pipeline("sdconv" if how == "sdconv" else "diffusers", name)
    if how == "block":
        sdconv.apply_patch(pipe)
        with sdconv.backend("fast"):
            found = pipelines.run(pipe, name)
        assert pipelines.run(pipe, name) == expected
    elif how == "patched":
        sdconv.apply_patch(pipe, backend="fast")
        found = pipelines.run(pipe, name)
    else:
        set_backend(pipe.unet, "fast")
        found = pipelines.run(pipe, name)
    assert found != expected
    for one, other in zip(found.latents, expected.latents, strict=True):
        assert error(one, other) < 1e-4
    assert error(found.images, expected.images) < 1e-4


@pytest.mark.parametrize("kind", ["sdconv", "patched"])
def test_freeu(kind: str) -> None:
    network = implementations.unet(kind, unets.smallest("SD1"))
    given = unets.inputs(network.config, size=(8, 16))
    with torch.no_grad():
        plain = network(*given).sample
        network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        expected = network(*given).sample
        with sdconv.backend("fast"):
            found = network(*given).sample
    assert error(found, expected) < WITHIN
    assert not torch.equal(found, expected)
    assert error(plain, expected) > 1e-2


def test_the_backend_of_a_patched_pipeline() -> None:
    pipe = pipelines.pipeline("text")
    sdconv.apply_patch(pipe, backend="fast")
    blocks = [m for m in pipe.unet.modules() if type(m).__module__.startswith("sdconv")]
    assert blocks and all(map(is_fast, blocks))
    sdconv.apply_patch(pipe)
    assert not any(map(is_fast, blocks))
    sdconv.apply_patch(pipe, backend="fast")
    sdconv.remove_patch(pipe)
    assert not any(map(is_fast, blocks))
