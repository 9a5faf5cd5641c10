"""The work that is done is reported with either backend, and leaves the result as it is; stages
that report nothing go on by the clock."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import seeded, unets

import sdconv
from sdconv.analysis.anatomy import dissect
from sdconv.analysis.progress import Stages, following
from sdconv.models.dummy_inputs import Noise, inputs_for

SMALL = seeded.kl((32, 64), 4, True, layers_per_block=1)


@pytest.mark.parametrize("name", ["reference", "fast"])
def test_every_block_is_reported_when_it_begins(name: str) -> None:
    network: Any = seeded.network(SMALL)
    image = torch.linspace(-1, 1, 3 * 16 * 24).reshape(1, 3, 16, 24)
    reports: list[tuple[str, int, int]] = []
    with torch.inference_mode(), sdconv.backend(name):
        expected = network.decode(network.encode(image).latent_dist.mode()).sample
        with following(network, (16, 24), ["encode", "decode"], lambda *got: reports.append(got)):
            found = network.decode(network.encode(image).latent_dist.mode()).sample
        network.encode(image)  # is not reported any more
    assert torch.equal(found, expected)
    anatomy = dissect(SMALL, (16, 24))
    assert [total for _, _, total in reports] == [anatomy.macs] * len(reports)
    done = [one for _, one, _ in reports]
    assert done == sorted(done) and (done[0], done[-1]) == (0, anatomy.macs)
    kinds = {block.name for block in anatomy.blocks if "resnets" in block.name}
    assert kinds <= {name for name, _, _ in reports}
    # most of the work is reported step by step
    steps = [after - before for before, after in pairwise(done)]
    assert max(steps) < anatomy.macs / 3


@pytest.mark.parametrize("name", ["reference", "fast"])
@pytest.mark.parametrize(
    "config", [seeded.SMALL_TINY, seeded.tiny(use_midblock_gn=True)], ids=["taesd", "taef2"]
)
def test_tiny_autoencoders(config: Any, name: str) -> None:
    network: Any = seeded.network(config)
    image = torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)
    reports: list[tuple[str, float, float]] = []
    with torch.inference_mode(), sdconv.backend(name):
        expected = network.decode(network.encode(image).latents).sample
        with following(network, (32, 48), ["encode", "decode"], lambda *got: reports.append(got)):
            found = network.decode(network.encode(image).latents).sample
    assert torch.equal(found, expected)
    blocks = [one for one in dissect(config, (32, 48)).blocks if "TinyBlock" in one.class_name]
    assert {block.name for block in blocks} <= {name for name, _, _ in reports}
    done = [one for _, one, _ in reports]
    assert done == sorted(done) and len(set(done)) > len(blocks)
    assert done[-1] == dissect(config, (32, 48)).macs


@pytest.mark.parametrize("name", ["reference", "fast"])
def test_each_call_of_a_unet_is_a_share(name: str) -> None:
    network = unets.ours(unets.theirs(unets.smallest("SD1")))
    noise = Noise(1, 0, torch.float32, torch.device("cpu"))
    inputs = inputs_for(network, (8, 8), noise)["forward"]
    reports: list[tuple[str, float, float]] = []
    with torch.inference_mode(), sdconv.backend(name):
        with following(network, (64, 64), ["denoise"] * 3, lambda *got: reports.append(got)):
            for _ in range(3):
                network(*inputs)
                reports.append(("called", reports[-1][1], reports[-1][2]))
    shares = [done / total for _, done, total in reports]
    assert shares == sorted(shares) and shares[-1] == 1
    called = [
        share for (what, _, _), share in zip(reports, shares, strict=True) if what == "called"
    ]
    for number, share in enumerate(called):
        assert number / 3 + 0.2 < share <= (number + 1) / 3


def test_stages_share_the_work_and_go_on_by_the_clock() -> None:
    reports: list[tuple[str, float, float]] = []
    with Stages(lambda *got: reports.append(got), 3) as stages:
        stages.begin("first")
        stages.within(1, 2)
        time.sleep(0.3)
        assert reports[-1] == ("first", 0.5, 3), "of the first stage's time nothing is known"
        stages.begin("second")
        time.sleep(0.6)
        stages.begin("third")
    done = [one for _, one, _ in reports]
    assert done == sorted(done) and done[-1] == 3
    second = [one for name, one, _ in reports if name == "second"]
    assert second[0] == 1 and 1.3 < second[-1] < 2
    count = len(reports)
    time.sleep(0.3)
    assert len(reports) == count, "nothing is reported after the end"


def test_stages_end_with_an_error_of_the_work() -> None:
    reports: list[tuple[str, float, float]] = []
    with pytest.raises(KeyError), Stages(lambda *got: reports.append(got), 2) as stages:
        stages.begin("first")
        raise KeyError
    assert reports[-1] == ("first", 0, 2)
