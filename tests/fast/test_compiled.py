"""Whole networks on the fast backend in one graph, with torch.compile and torch.export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.numbers import error, randn
from helpers.slow import first_of
from helpers.versions import fails_on_torch_2_6
from torch import Tensor, nn

import sdconv
from sdconv.models.blocks import ResnetBlock2D, Upsample2D

WITHIN = 2e-5


class Decode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae: Any = seeded.network(seeded.SMALL_KL)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample  # type: ignore[no-any-return]


class Encode(Decode):
    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image).latent_dist.mean  # type: ignore[no-any-return]


class Denoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = unets.ours(unets.theirs(unets.smallest("SD1")))

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        return self.unet(sample, 5, text, return_dict=False)[0]  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "decode": (Decode, (randn(1, 4, 9, 8),)),
    "encode": (Encode, (randn(1, 3, 24, 20),)),
    "denoise": (Denoise, (randn(1, 4, 8, 16), randn(1, 5, 24, seed=1))),
}
SLOW_DENOISE = pytest.param("denoise", marks=pytest.mark.slow)
FIRST = {
    "decode": "vae.decoder.conv_in.weight",
    "encode": "vae.encoder.conv_in.weight",
    "denoise": "unet.conv_in.weight",
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["decode", "encode", pytest.param("denoise", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("gradients", first_of([False, True]))
def test_compiled(name: str, gradients: bool) -> None:
    kind, given = NETWORKS[name]
    network = kind().requires_grad_(gradients)
    expected = network(*given).detach()
    with sdconv.backend("fast"):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        out = compiled(*given)
        if gradients:
            first = network.get_parameter(FIRST[name])
            (found,) = torch.autograd.grad(out.square().sum(), [first])
    assert error(out.detach(), expected) < WITHIN
    assert not torch.equal(out, expected)
    if gradients:
        loss = network(*given).square().sum()
        (reference,) = torch.autograd.grad(loss, [first])
        assert error(found, reference) < 1e-4


@pytest.mark.parametrize("name", ["reference", "fast"])
def test_the_graph_has_the_fast_operators(name: str) -> None:
    """Blocks that decline under torch.compile give the right result too, by torch's operations."""
    nodes: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    network = Decode().requires_grad_(False)
    resnets = sum(isinstance(module, ResnetBlock2D) for module in network.vae.decoder.modules())
    with sdconv.backend(name):
        torch.compile(network, fullgraph=True, backend=record)(*NETWORKS["decode"][1])
    convolutions = nodes.count("sdconv.conv3x3.default")
    # two in each ResNet block, and the last one
    assert convolutions == (2 * resnets + 1 if name == "fast" else 0)


@pytest.mark.slow
# raised by torch when its compiler is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_by_inductor(name: str) -> None:
    kind, given = NETWORKS[name]
    network = kind().requires_grad_(False)
    expected = network(*given)
    with sdconv.backend("fast"):
        assert error(torch.compile(network, fullgraph=True)(*given), expected) < WITHIN


@fails_on_torch_2_6("it traces neither the VAE's attention nor diffusers' transformers")
@pytest.mark.parametrize("name", first_of(NETWORKS))
def test_exported(name: str) -> None:
    kind, given = NETWORKS[name]
    network = kind().requires_grad_(False)
    expected = network(*given)
    with sdconv.backend("fast"):
        program = torch.export.export(network, given)
    ran = Counter(str(node.target) for node in program.graph.nodes)
    upsamplers = sum(isinstance(module, Upsample2D) for module in network.modules())
    if name != "encode":
        assert ran["sdconv.upsample_conv.default"] == upsamplers > 0
    assert ran["sdconv.conv3x3.default"] > 5
    # the exported program is fast on any backend
    assert error(program.module()(*given), expected) < WITHIN
