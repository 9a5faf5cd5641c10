"""The transformers between the U-Net's blocks, which are diffusers' own: the matrix products of
their linear layers (and 1x1 convolutions) are taken over as they come, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sdconv.backends import is_fast
from sdconv.fast.eager import is_eager
from sdconv.fast.modules import takes
from sdconv.ops import engines


def products(transformer: nn.Module, x: Tensor) -> AbstractContextManager[object]:
    """While it is entered, linear layers of float32 on a CPU compute with sdconv's products, if the
    transformer is to compute fast."""
    if is_fast(transformer) and x.device.type == "cpu" and takes(x) and is_eager(x):
        return _Products()
    return nullcontext()


class _Products(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        ours = _OURS.get(function)
        out = None if ours is None else ours(*args, **(kwargs or {}))
        return out if out is not None else function(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    given = [one for one in (input, weight, bias) if one is not None]
    dense = all(one.dtype is torch.float32 and one.is_contiguous() for one in given)
    if not dense or not is_eager(*given) or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        return None
    return engines.of(torch.float32).linear(input, weight, bias)


def _pointwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> Tensor | None:
    """A 1x1 convolution of a channels-last map is a linear layer."""
    ones, zeros = (1, (1, 1)), (0, (0, 0))
    if weight.shape[2:] != (1, 1) or groups != 1 or stride not in ones or padding not in zeros:
        return None
    out = _linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias)
    return None if out is None else out.permute(0, 3, 1, 2)


_OURS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.conv2d: _pointwise,
}
