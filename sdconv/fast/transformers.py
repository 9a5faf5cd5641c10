"""The transformers between the U-Net's blocks, which are diffusers' own: the matrix products of
their linear layers are taken over as they come, whoever calls them (attention processors, LoRA)."""

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
        if function is functional.linear:
            out = _linear(*args, **(kwargs or {}))
            if out is not None:
                return out
        return function(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    given = [one for one in (input, weight, bias) if one is not None]
    dense = all(one.dtype is torch.float32 and one.is_contiguous() for one in given)
    if not dense or not is_eager(*given) or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        return None
    return engines.of(torch.float32).linear(input, weight, bias)
