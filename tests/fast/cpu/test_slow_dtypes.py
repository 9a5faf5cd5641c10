"""16-bit networks on a processor for which torch has no kernels in their dtype: what torch
multiplies is computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.fake_cuda import map_tensors
from helpers.numbers import error, randn
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import sdconv
from sdconv.fast.cpu import processor
from sdconv.models.blocks import ResnetBlock2D

LOW = [torch.float16, torch.bfloat16]
# what takes no time to speak of: a matrix and few vectors, and latents by a weight of few values
FEW_ROWS, FEW_VALUES = 16, 100


@pytest.fixture(params=LOW, ids=str)
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """A dtype that torch has no kernels for, whatever the processor (an injected fault)."""
    cached = (processor.is_slow, processor.in_float32)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(processor, "_has_kernels", lambda dtype: dtype is not request.param)
    yield request.param
    for function in cached:
        function.cache_clear()


class Multiplied(TorchFunctionMode):
    """Records the functions that multiply many numbers of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in processor._MULTIPLY and args[0].dtype in LOW:
            few = args[0].ndim < 4 and args[0].numel() // args[0].shape[-1] < FEW_ROWS
            if not few and args[1].numel() > FEW_VALUES:
                self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Networks' methods, each with its input."""
    vae = seeded.network(seeded.kl((32, 64), 4, True, layers_per_block=1)).to(dtype)
    tiny = seeded.network(seeded.tiny()).to(dtype)
    unet = unets.ours(unets.theirs(unets.smallest("SD1"))).to(dtype)
    fixed = [map_tensors(one, dtype, lambda t, own: t.to(own)) for one in unets.inputs(unet.config)]
    z, image = randn(1, 4, 12, 10).to(dtype), randn(1, 3, 48, 40, seed=1).to(dtype)
    return {
        "decode": lambda: vae.decode(z).sample,
        "encode": lambda: vae.encode(image).latent_dist.mode(),
        "tiny decode": lambda: tiny.decode(z).sample,
        "tiny encode": lambda: tiny.encode(image).latents,
        "U-Net": lambda: unet(*fixed).sample,
    }


@torch.no_grad()
def test_networks_multiply_nothing_in_a_slow_dtype(slow: torch.dtype) -> None:
    for name, call in calls(slow).items():
        with Multiplied() as plain:
            expected = call()
        assert plain.found, "the control: the reference does"
        with Multiplied() as fast, sdconv.backend("fast"):
            out = call()
        assert not fast.found, (name, fast.found)
        assert out.dtype is slow
        assert error(out, expected) < 16 * torch.finfo(slow).eps, name


@pytest.mark.parametrize("name", ["decode", "encode", "tiny decode", "tiny encode", "U-Net"])
def test_with_gradients_nothing_is_multiplied_in_a_slow_dtype(name: str, slow: torch.dtype) -> None:
    with Multiplied() as fast, sdconv.backend("fast"):
        out = calls(slow)[name]()
    assert out.requires_grad and not fast.found


@torch.no_grad()
def test_a_block_that_overflows(slow: torch.dtype) -> None:
    """It is computed again directly, see `NotFiniteError`."""
    block = ResnetBlock2D(64, 128, temb_channels=None, groups=8, eps=1e-6).to(slow)
    x = randn(1, 64, 40, 40).to(slow)
    x[0, 3, 20, 20] = torch.inf
    expected = block(x)
    with Multiplied() as fast, sdconv.backend("fast"):
        out = block(x)
    assert not fast.found
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()


def test_what_is_left_alone(slow: torch.dtype) -> None:
    """A result that is written into a tensor, operands of several dtypes, and autocast."""
    x = randn(32, 32).to(slow)
    with processor.in_float32(slow):
        out = torch.empty_like(x)
        torch.matmul(x, x, out=out)
        assert out.any()
        with pytest.raises(RuntimeError, match="dtype"):
            functional.linear(x, x.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(x, x).dtype is torch.bfloat16
        assert all(one.dtype is slow for one in (x @ x, x.matmul(x), torch.mm(x, x)))


def test_results_are_those_of_float32_rounded_once(slow: torch.dtype) -> None:
    x, weight, bias = (
        randn(*s, seed=i).to(slow) for i, s in enumerate([(40, 300), (8, 300), (8,)])
    )
    with processor.in_float32(slow):
        out = functional.linear(x, weight, bias=bias)
        others = functional.linear(x.double(), weight.double())
    wide = functional.linear(x.float(), weight.float(), bias.float())
    assert out.dtype is slow and torch.equal(out, wide.to(slow))
    assert not torch.equal(out.float(), wide), "the control"
    assert others.dtype is torch.float64


def test_gradients_flow(slow: torch.dtype) -> None:
    x, weight = randn(1, 4, 6, 6).to(slow), randn(8, 4, 3, 3, seed=1).to(slow).requires_grad_()
    with processor.in_float32(slow):
        functional.conv2d(x, weight, padding=1).sum().backward()
    assert weight.grad is not None and weight.grad.dtype is slow and weight.grad.any()


def test_other_dtypes_are_left_alone(slow: torch.dtype) -> None:
    other = LOW[1 - LOW.index(slow)]
    x = randn(16, 16).to(other)
    with Multiplied() as seen, processor.in_float32(slow):
        assert torch.matmul(x.repeat(32, 1), x).dtype is other
    assert seen.found == ["matmul"]
    with Multiplied() as seen, processor.in_float32(other):
        torch.matmul(x.repeat(32, 1), x)
    assert seen.found == ["matmul"], "the control: nothing is done where it saves no time"


def test_only_16_bit_dtypes_can_be_slow() -> None:
    assert not any(map(processor.is_slow, (torch.float32, torch.float64)))
