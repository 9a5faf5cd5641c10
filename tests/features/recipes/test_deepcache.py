"""Between full steps, the deep part is not computed: the same as replacing it by hand."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import capturing, implementations, pipelines, unets
from helpers.numbers import error
from helpers.slow import first_of
from torch import Tensor, nn

import sdconv
from sdconv.features import Maps, recipes
from sdconv.features.hook_points import hook_points

FACTORS = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


@pytest.mark.parametrize("kind", implementations.NAMES)
@pytest.mark.parametrize("name", first_of(["controlnet", "text", "xl"]))
def test_at_interval_1_it_is_the_plain_run(kind: str, name: str) -> None:
    pipe = implementations.pipeline(kind, name)
    plain = pipelines.run(pipe, name)
    with recipes.deepcache(pipe, 1):
        assert pipelines.run(pipe, name) == plain
    with recipes.deepcache(pipe, 3):
        first = pipelines.run(pipe, name)
        assert pipelines.run(pipe, name) == first  # nothing is left from the previous run
    assert torch.equal(first.latents[0], plain.latents[0])
    assert not torch.equal(first.latents[1], plain.latents[1])
    assert implementations.untouched(pipe.unet)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("SD1", kind) for kind in implementations.NAMES),
        *(pytest.param("SDXL", kind, marks=pytest.mark.slow) for kind in implementations.NAMES),
        pytest.param("uneven layers", "diffusers", marks=pytest.mark.slow),
        ("uneven layers", "sdconv"),
        ("KOALA 700M", "diffusers"),  # without a mid block
    ],
)
@torch.no_grad()
def test_between_full_steps_it_equals_replacing_the_deep_feature_map_by_hand(
    family: str, kind: str
) -> None:
    config = unets.small(family) if "uneven" in family else unets.smallest(family)
    network = implementations.unet(kind, config)
    sample, _, *rest = unets.inputs(network.config, size=(8, 8))
    calls = [(sample / (1 + number), 900 - number, *rest) for number in range(4)]
    plain = [network(*given)[0] for given in calls]
    readers = [name for name in hook_points(network) if name.endswith(":hidden")]
    innermost = len(readers) - 1 - (network.mid_block is None)
    for branch in (0, innermost):
        with recipes.deepcache(network, 3, branch=branch):
            found = [network(*given)[0] for given in calls]
        expected = by_hand(network, calls, readers[-1 - branch])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        same = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
        assert same == [True, False, False, True]
    assert implementations.untouched(network)


def by_hand(network: Any, calls: list[Any], reader: str) -> list[Tensor]:
    """Compute everything, and replace the deep feature map by the first call's in two calls of
    three."""
    results, kept = [], Maps({}, pipeline=False)
    for number, given in enumerate(calls):
        with ExitStack() as stack:
            if number % 3:
                deep = capturing.one(kept, reader)
                stack.enter_context(sdconv.edit(network, {reader: lambda x, _, y=deep: y}))
            else:
                kept = stack.enter_context(sdconv.capture(network, reader))
            results.append(network(*given)[0])
    return results


@torch.no_grad()
def test_the_deep_part_is_not_computed() -> None:
    network = unets.theirs(unets.small("SD1"))
    computed: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: computed.append(name))
    counts = {}
    for branch in range(12):
        with recipes.deepcache(network, 2, branch=branch):
            for step in (801, 1):
                computed.clear()
                network(*capturing.at(step))
        counts[branch] = len(computed)
    assert computed.count("mid_block.resnets.0.conv1") == 0
    network(*capturing.at(1))
    # conv_in and conv_out, and the last layer of the up path: 3 convolutions of its ResNet block
    # and 2 of its transformer
    assert counts[0] == 2 + 3 + 2
    assert all(a < b for a, b in pairwise([*counts.values(), len(computed)]))


@torch.no_grad()
def test_calls_that_begin_a_new_run() -> None:
    network = capturing.unet()
    steps = (900, 700, 500, 300, 900, 700, 500, 500, 300, 400)
    with recipes.deepcache(network, 3), sdconv.capture(network, "mid_block.resnets.0") as maps:
        for step in steps:
            network(*capturing.at(step))
    full = [index in maps.series("mid_block.resnets.0").calls for index in range(len(steps))]
    runs = ((True, False, False, True), (True, False, False), (True, False), (True,))
    assert full == [each for run in runs for each in run]


@torch.no_grad()
def test_a_batch_of_another_size_is_computed() -> None:
    network = capturing.unet()
    sample, step, *rest = capturing.at(1)
    alone = (sample[:1], step, rest[0][:1])
    plain = network(*alone)[0]
    with recipes.deepcache(network, 9):
        network(*capturing.at(801))
        assert torch.equal(network(*alone)[0], plain)


@pytest.mark.slow
@torch.no_grad()
def test_the_fast_backend() -> None:
    network = implementations.unet("sdconv", capturing.UNET)

    def run() -> Tensor:
        return torch.stack([network(*capturing.at(step))[0] for step in (801, 401, 1)])

    plain = run()
    with sdconv.backend("fast"):
        fast = run()
        with recipes.deepcache(network, 1):
            every = run()
        with recipes.deepcache(network, 2):
            between = run()
    # a transformer that is looked at is called, so that its residual is added by other arithmetic
    assert max(map(error, every, fast)) < 1e-6
    errors = list(map(error, between, fast))
    assert max(errors[0], errors[2]) < 1e-6 < 1e-3 < errors[1]
    assert not torch.equal(fast, plain)


def test_together_with_other_edits() -> None:
    pipe = pipelines.pipeline("text")
    pipe.enable_freeu(**FACTORS)
    with recipes.deepcache(pipe, 2):
        expected = pipelines.run(pipe, "text")
    pipe.disable_freeu()
    with recipes.freeu(pipe, **FACTORS), recipes.deepcache(pipe, 2):
        assert pipelines.run(pipe, "text") == expected
    assert implementations.untouched(pipe.unet)


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        ("SD1", {"interval": 0}, "interval: .*(.|\n)*got: 0"),
        ("SD1", {"interval": 2.5}, "interval: "),
        ("SD1", {"interval": 2, "branch": 8}, "branch: .*(.|\n)*0 to 7(.|\n)*got: 8"),
        ("KOALA 700M", {"interval": 2, "branch": 5}, "nothing inside"),
    ],
)
def test_invalid_arguments_are_refused(family: str, given: dict[str, Any], words: str) -> None:
    network = unets.theirs(unets.smallest(family))
    with pytest.raises(sdconv.InputError, match=words), recipes.deepcache(network, **given):
        pass
