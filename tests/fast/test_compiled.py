"""Whole networks on the fast backend as one graph: torch.compile and torch.export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.numbers import error
from torch import Tensor, nn

import sdconv
from sdconv.models.blocks import Upsample2D

WITHIN = 2e-5


class Decode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae: Any = seeded.network(seeded.kl((32, 64), 4, True, layers_per_block=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample  # type: ignore[no-any-return]


class Encode(Decode):
    def forward(self, picture: Tensor) -> Tensor:
        return self.vae.encode(picture).latent_dist.mean  # type: ignore[no-any-return]


class Denoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = unets.ours(unets.theirs(unets.smallest("SD1")))

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        return self.unet(sample, 5, text, return_dict=False)[0]  # type: ignore[no-any-return]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


WHOLE: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "decode": (Decode, (drawn(1, 4, 9, 8),)),
    "encode": (Encode, (drawn(1, 3, 24, 20),)),
    "denoise": (Denoise, (drawn(1, 4, 8, 16), drawn(1, 5, 24))),
}
FIRST = {
    "decode": "vae.decoder.conv_in.weight",
    "encode": "vae.encoder.conv_in.weight",
    "denoise": "unet.conv_in.weight",
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled(whole: str, gradients: bool) -> None:
    kind, given = WHOLE[whole]
    network = kind().requires_grad_(gradients)
    expected = network(*given).detach()
    with sdconv.backend("fast"):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        out = compiled(*given)
        if gradients:
            first = network.get_parameter(FIRST[whole])
            (found,) = torch.autograd.grad(out.square().sum(), [first])
    assert error(out.detach(), expected) < WITHIN
    assert not torch.equal(out, expected)
    if gradients:
        loss = network(*given).square().sum()
        (reference,) = torch.autograd.grad(loss, [first])
        assert error(found, reference) < 1e-4


@pytest.mark.slow
# torch's own, while its compiler is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("whole", WHOLE)
def test_compiled_by_inductor(whole: str) -> None:
    kind, given = WHOLE[whole]
    network = kind().requires_grad_(False)
    expected = network(*given)
    with sdconv.backend("fast"):
        assert error(torch.compile(network, fullgraph=True)(*given), expected) < WITHIN


@pytest.mark.parametrize("whole", WHOLE)
def test_exported(whole: str) -> None:
    kind, given = WHOLE[whole]
    network = kind().requires_grad_(False)
    expected = network(*given)
    with sdconv.backend("fast"):
        program = torch.export.export(network, given)
    ran = Counter(str(node.target) for node in program.graph.nodes)
    doublings = sum(isinstance(module, Upsample2D) for module in network.modules())
    if whole != "encode":
        assert ran["sdconv.doubled_convolution.default"] == doublings > 0
    assert ran["sdconv.convolution.default"] > 5
    # the program is fast by itself, wherever it runs
    assert error(program.module()(*given), expected) < WITHIN
