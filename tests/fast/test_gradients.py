"""Gradients through the fast backend, in all the ways that torch has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.numbers import error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import sdconv
from sdconv.models.blocks import ResnetBlock2D, Upsample2D


def block() -> nn.Sequential:
    """Wide enough for Winograd's method, with a shortcut and upsampling."""
    torch.manual_seed(4)
    return nn.Sequential(
        ResnetBlock2D(128, 96, temb_channels=None, groups=8, eps=1e-6), Upsample2D(96)
    )


def drawn() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    shapes = ((1, 128, 33, 28), (1, 96, 66, 56))
    x, direction = (torch.randn(shape, generator=random) for shape in shapes)
    return x, direction


def in_float64(module: nn.Module) -> nn.Module:
    return module.double().requires_grad_()


def test_against_float64() -> None:
    module, (x, direction) = block(), drawn()
    inputs = [x.requires_grad_(), *module.parameters()]
    with sdconv.backend("fast"):
        found = torch.autograd.grad((module(x) * direction).sum(), inputs)
    double = in_float64(module)
    x64 = x.detach().double().requires_grad_()
    exact = torch.autograd.grad((double(x64) * direction).sum(), [x64, *double.parameters()])
    for one, other in zip(found, exact, strict=True):
        assert error(one, other) < 1e-4


def test_gradients_of_gradients() -> None:
    module, x = block(), drawn()[0][..., :9, :10].requires_grad_()

    def both(module: nn.Module, x: Tensor) -> list[Tensor]:
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad(module(x).square().sum(), inputs, create_graph=True)
        length = sum(one.square().sum() for one in first)
        assert isinstance(length, Tensor)
        return [*first, *torch.autograd.grad(length, inputs)]

    with sdconv.backend("fast"):
        found = both(module, x)
    exact = both(in_float64(module), x.detach().double().requires_grad_())
    for one, other in zip(found, exact, strict=True):
        assert error(one, other) < 1e-4


@pytest.mark.parametrize("name", [name for name, _ in block().named_parameters()])
def test_of_one_parameter_alone(name: str) -> None:
    module, (x, direction) = block().requires_grad_(False), drawn()
    parameter = module.get_parameter(name).requires_grad_()

    def found() -> Tensor:
        return torch.autograd.grad((module(x) * direction).sum(), parameter)[0]

    expected = found()
    with sdconv.backend("fast"):
        assert error(found(), expected) < 1e-4


def forward_mode(module: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))))


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "forward mode": forward_mode,
    "jvp": lambda module, x, direction: jvp(module, (x,), (direction,)),
    "grad": lambda module, x, _: (grad(lambda x: module(x).square().sum())(x),),
    "vmap": lambda module, x, direction: (vmap(module)(torch.stack([x, direction])),),
}


# torch's own forward mode calls it
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_run_the_reference(transform: str) -> None:
    module, x = block().requires_grad_(False), drawn()[0][..., :9, :10]
    run = TRANSFORMS[transform]
    expected = run(module, x, x.flip(2))
    with sdconv.backend("fast"):
        # outside it is fast again
        assert not torch.equal(module(x), run(module, x, x.flip(2))[0]) or transform == "grad"
        for one, other in zip(run(module, x, x.flip(2)), expected, strict=True):
            assert torch.equal(one, other)
