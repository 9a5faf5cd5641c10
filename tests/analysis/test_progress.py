"""The work that is done is reported with either backend, and leaves the result as it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import seeded

import sdconv
from sdconv.analysis.anatomy import dissect
from sdconv.analysis.progress import following

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
