"""Injecting a run's features into itself changes nothing; into another run, it does."""

from __future__ import annotations

import pytest
import torch
from helpers import capturing, implementations, pipelines

import sdconv
from sdconv.features import recipes


@pytest.mark.parametrize("kind", implementations.NAMES)
def test_a_run_into_itself_and_into_another(kind: str) -> None:
    pipe = implementations.pipeline(kind, "text")
    names = recipes.plug_and_play_places(pipe)
    assert len(names) == 1 + 2 * 3  # queries and keys of 3 attentions
    assert all(name.startswith("unet.up_blocks.") for name in names)
    other = {"prompt": ["a horse"] * 2}
    plain, another = pipelines.run(pipe, "text"), pipelines.run(pipe, "text", **other)
    with sdconv.capture(pipe, names) as source:
        pipelines.run(pipe, "text")
    with recipes.plug_and_play(pipe, source), sdconv.capture(pipe, names) as within:
        assert pipelines.run(pipe, "text") == plain
    with recipes.plug_and_play(pipe, source), sdconv.capture(pipe, names) as injected:
        changed = pipelines.run(pipe, "text", **other)
    assert changed not in (plain, another)
    for maps in (within, injected):
        for name in names:
            pairs = zip(maps.series(name).tensors, source.series(name).tensors, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert implementations.untouched(pipe.unet)


def test_only_captured_calls_are_injected() -> None:
    pipe = pipelines.pipeline("text")
    name = "unet.up_blocks.1.resnets.1"
    with sdconv.capture(pipe, name, steps=[1], dtype=torch.float64) as source:
        pipelines.run(pipe, "text")
    with sdconv.capture(pipe, name) as plain:
        pipelines.run(pipe, "text", prompt=["a horse"] * 2)
    with recipes.plug_and_play(pipe, source), sdconv.capture(pipe, name) as maps:
        pipelines.run(pipe, "text", prompt=["a horse"] * 2)
    first, second = maps.series(name).tensors
    assert torch.equal(first, plain.series(name)[0].tensor)
    assert torch.equal(second, source.series(name)[0].tensor.float())
    assert not torch.equal(second, plain.series(name)[1].tensor)


def test_a_source_without_guidance_is_injected_into_both_halves() -> None:
    pipe = pipelines.pipeline("text")
    name = "unet.mid_block"
    with sdconv.capture(pipe, name) as source:
        pipelines.run(pipe, "text", guidance_scale=1.0)
    with recipes.plug_and_play(pipe, source), sdconv.capture(pipe, name) as maps:
        pipelines.run(pipe, "text")
    entry, kept = maps.series(name)[1], source.series(name)[1].tensor
    assert torch.equal(entry.conditional, kept)
    assert torch.equal(entry.unconditional, kept)


@torch.no_grad()
def test_a_bare_network_and_what_does_not_fit() -> None:
    network = capturing.unet()
    names = recipes.plug_and_play_places(network)
    with sdconv.capture(network, names) as source:
        plain = network(*capturing.at(801))[0]
    with recipes.plug_and_play(network, source):
        assert torch.equal(network(*capturing.at(801))[0], plain)
    sample, step, prompt_embeds, *_ = capturing.at(801)
    with (
        pytest.raises(sdconv.SdconvError, match=r"call 0: .*another timestep(.|\n)*got: 1\.0"),
        recipes.plug_and_play(network, source),
    ):
        network(*capturing.at(1))
    with (
        pytest.raises(sdconv.SdconvError, match=r"got: \(2, 96, 2, 3\)"),
        recipes.plug_and_play(network, source),
    ):
        network(sample[..., :8], step, prompt_embeds)
    with pytest.raises(sdconv.InputError), recipes.plug_and_play(capturing.vae(), source):
        pass
    assert not capturing.hooks_on(network)
