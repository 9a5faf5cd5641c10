"""Nearly uniform feature maps (a black image, a masked half): the fast backend is as near to
float64 as the reference, whose GroupNorm takes the variance by Welford's method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sdconv
from sdconv.backends import set_backend
from sdconv.fast.cpu.group_stats import combine, group_stats, normalise
from sdconv.models.blocks import ResnetBlock2D
from sdconv.models.unet_blocks import run_transformer

means = st.one_of(st.just(0.0), st.floats(1, 1e3), st.floats(-1e3, -1))
seeds = st.integers(0, 99)


def off(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def as_good(network: nn.Module, run: Any, x: Tensor, floor: float = 2e-6) -> None:
    """Fast is no farther from float64 than twice the reference, or ``floor``."""
    with torch.no_grad():
        exact = run(copy.deepcopy(network).double(), x.double())
        reference = off(run(network, x), exact)
        with sdconv.backend("fast"):
            for one in (x, x.contiguous(memory_format=torch.channels_last)):
                assert off(run(network, one), exact) <= max(2 * reference, floor)


@given(means, seeds, st.sampled_from([0.0, 1.0]), st.booleans())
@settings(max_examples=30)
def test_normalise(mean: float, seed: int, spread: float, channels_last: bool) -> None:
    x = mean + spread * torch.randn(2, 32, 9, 7, generator=torch.Generator().manual_seed(seed))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, bias = torch.linspace(0.5, 2, 32), torch.linspace(-1, 1, 32)
    exact = functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-6)
    found = normalise(x, group_stats(x, 8), weight, bias, 1e-6)
    assert float((found.double() - exact).abs().max()) < 1e-5


def test_the_control() -> None:
    """torch's own GroupNorm in channels-last order is what must not be used."""
    x = 1000 + torch.randn(1, 32, 9, 7, generator=torch.Generator().manual_seed(0))
    exact = functional.group_norm(x.double(), 8, eps=1e-6)
    found = functional.group_norm(x.contiguous(memory_format=torch.channels_last), 8, eps=1e-6)
    assert float((found.double() - exact).abs().max()) > 1e-3


@given(means, seeds, st.sampled_from([(32, 32), (64, 32), (32, 64), (96, 96)]))
@settings(max_examples=15, deadline=None)
def test_a_resnet_block(mean: float, seed: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    block = ResnetBlock2D(*sizes, temb_channels=None, groups=32, eps=1e-6).eval()
    as_good(block, lambda network, x: network(x), mean + torch.randn(1, sizes[0], 6, 10))


@pytest.mark.parametrize("channels", [(32, 64), (64, 96), (96, 128)])
@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_a_uniform_image(channels: tuple[int, ...], value: float) -> None:
    network = seeded.network(seeded.kl(channels, 4, True, layers_per_block=1))
    image, latents = torch.full((1, 3, 32, 32), value), torch.full((1, 4, 16, 16), value)
    as_good(network, lambda v, x: v.encode(x).latent_dist.parameters, image)
    as_good(network, lambda v, z: v.decode(z).sample, latents)
    image[:, :, :, 16:] = torch.randn(1, 3, 32, 16, generator=torch.Generator().manual_seed(1))
    as_good(network, lambda v, x: v.encode(x).latent_dist.parameters, image)


@given(means, seeds)
@settings(max_examples=4, deadline=None)
def test_a_unet(mean: float, seed: int) -> None:
    config = unets.smallest("SD1")
    network: Any = unets.ours(unets.theirs(config))
    torch.manual_seed(seed)
    prompt = torch.randn(1, 7, config["cross_attention_dim"])
    sample = mean + (torch.randn(1, 4, 8, 8) if seed % 2 else torch.zeros(1, 4, 8, 8))

    def run(network: Any, x: Tensor) -> Tensor:
        out: Tensor = network(x, torch.tensor(500), prompt.to(x.dtype)).sample
        return out

    as_good(network, run, sample, floor=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_that_declines_gets_channels_first_order(grad: bool) -> None:
    """The reference's bits, whatever order the block before has left."""
    torch.manual_seed(0)
    block = ResnetBlock2D(32, 32, temb_channels=None, groups=32, eps=1e-6).eval()
    block.conv1.register_forward_hook(lambda *_: None)
    x = 1000 + torch.randn(1, 32, 6, 10)
    with torch.set_grad_enabled(grad):
        expected = block(x)
        with sdconv.backend("fast"):
            found = block(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_transformers_norm(grad: bool) -> None:
    network: Any = unets.ours(unets.theirs(unets.smallest("SD1")))
    module = network.down_blocks[0].attentions[0]
    width = module.norm.num_channels
    x = 1000 + torch.randn(1, width, 8, 8, generator=torch.Generator().manual_seed(1))
    conditions = {"encoder_hidden_states": torch.zeros(1, 7, 24)}

    def run(module: nn.Module, x: Tensor) -> Tensor:
        given: Any = {name: one.to(x.dtype) for name, one in conditions.items()}
        return run_transformer(module, x, given)

    with torch.set_grad_enabled(grad):
        exact = run(copy.deepcopy(module).double(), x.double())
        reference = off(run(module, x), exact)
        set_backend(module, "fast")
        found = run(module, x.contiguous(memory_format=torch.channels_last))
    assert off(found, exact) <= 2 * reference


def test_gradients_of_a_block_with_a_large_mean() -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(32, 32, temb_channels=None, groups=32, eps=1e-6)
    x = (1000 + torch.randn(1, 32, 6, 10)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (copy.deepcopy(block).double()(wide) ** 2).sum().backward()
    with sdconv.backend("fast"):
        (block(x.contiguous(memory_format=torch.channels_last)) ** 2).sum().backward()
    assert x.grad is not None and wide.grad is not None
    assert off(x.grad, wide.grad) < 1e-3


def test_rounding_never_makes_a_variance_negative() -> None:
    value = torch.tensor(1.1e6 / 3).double()
    sums = torch.stack([1000 * value, 1000 * value**2])[None, None].expand(7, 1, 2) * (1 - 1e-15)
    stats = combine(sums, torch.full((7,), 1000.0, dtype=torch.float64))
    assert float(stats[0, 1]) >= 0
