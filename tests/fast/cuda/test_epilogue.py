"""What follows a convolution, by torch's operations and as an operator. The kernel's tests are in
``test_triton_kernels.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.numbers import error, randn
from helpers.slow import first_of
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cuda import epilogue

GROUPS = 2


def drawn(dtype: torch.dtype = torch.float32, *, subpixel: bool = False) -> list[Tensor]:
    """A convolution's output, bias, time embedding, residual, and the residual's bias."""
    x = randn(2, 24, 4, 3) if subpixel else randn(2, 6, 6, 4)
    given = [x, randn(6, seed=1), randn(2, 6, seed=2), randn(2, 6, 6, 4, seed=3), randn(6, seed=4)]
    return [one.to(dtype) for one in given]


def plainly(x: Tensor, bias: Tensor, added: Tensor, residual: Tensor, other: Tensor) -> Tensor:
    return x + (bias + added + other)[..., None, None] + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nhwc", [False, True])
def test_by_torch(dtype: torch.dtype, nhwc: bool) -> None:
    given = drawn(dtype)
    if nhwc:
        given[0] = given[0].contiguous(memory_format=torch.channels_last)
    exact = plainly(*(one.double() for one in given))
    out, stats = epilogue.epilogue(*given, GROUPS, False)
    assert out.dtype is dtype and stats.dtype is torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    # rounded once: a sum rounded after each term has a larger error
    assert error(out, exact) < torch.finfo(dtype).eps
    values = out.double().reshape(2, GROUPS, -1)
    assert error(stats[..., 0], values.mean(2)) < 1e-6
    assert error(stats[..., 1], values.var(2, correction=0)) < 1e-6
    assert epilogue.epilogue(*given, 0, False)[1].shape == (2, 0, 2)


def test_a_missing_term_is_noticed() -> None:
    given: list[Any] = drawn()
    exact = plainly(*given)
    assert error(epilogue.epilogue(*given, 0, False)[0], exact) < 1e-6
    for i in range(1, 5):
        fewer = [*given[:i], None, *given[i + 1 :]]
        assert error(epilogue.epilogue(*fewer, 0, False)[0], exact) > 1e-2


def test_interleaving() -> None:
    x, bias, *_ = drawn(subpixel=True)
    out, _ = epilogue.epilogue(x, bias, None, None, None, 0, True)
    cases = x.view(2, 2, 2, 6, 4, 3) + bias[:, None, None]
    for row, column in ((0, 0), (0, 3), (3, 2), (5, 1)):
        i, j = row % 2, column % 2
        expected = cases[:, i, j, :, row // 2 + i, column // 2 + j]
        assert torch.equal(out[:, :, row, column], expected)


@pytest.mark.parametrize("subpixel", first_of([False, True]))
def test_the_operator(subpixel: bool) -> None:
    given = [one.requires_grad_() for one in drawn(subpixel=subpixel)]
    torch.library.opcheck(epilogue.operator, (*given, GROUPS, subpixel))
    alone = (given[0].detach(), None, None, None, None, 0, subpixel)
    torch.library.opcheck(epilogue.operator, alone)


@pytest.mark.parametrize("subpixel", first_of([False, True]))
def test_gradients(subpixel: bool) -> None:
    given = [one.requires_grad_() for one in drawn(torch.float64, subpixel=subpixel)]

    def run(*given: Tensor) -> Tensor:
        out: Tensor = epilogue.operator(*given, GROUPS, subpixel)[0]
        return functional.silu(out)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
