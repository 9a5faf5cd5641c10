"""The U-Net's transformers on a CPU: linear layers, 1x1 convolutions and attention in float32, also
in a 16-bit network where the processor is no faster in its dtype.

The transformers are diffusers' own modules, so the torch functions that they call are intercepted;
plain ones are computed by :mod:`sdconv.fast.cpu.transformer` instead, which fuses more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from sdconv.backends import implements
from sdconv.fast.blocks import is_widened, widened
from sdconv.fast.cpu import torch_kernels
from sdconv.fast.cpu.group_stats import group_stats, normalise
from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.processor import has_matrix_units, is_slow
from sdconv.fast.cpu.transformer import can_run_transformer
from sdconv.fast.cpu.transformer import transformer as run_transformer_fused
from sdconv.fast.preconditions import DTYPES, is_eager, is_supported
from sdconv.models.unet_blocks import Conditions, run_transformer


@implements(run_transformer)
def transformer(module: nn.Module, x: Tensor, conditions: Conditions) -> Tensor | None:
    if not (x.device.type == "cpu" and is_supported(x) and is_eager(x)):
        # in channels-first order, in which torch's GroupNorm is accurate
        if x.device.type != "cpu" or x.ndim != 4 or (x.is_contiguous() and not is_widened(x)):
            return None
        with widened(x):
            plain: Tensor = module(x.contiguous(), return_dict=False, **conditions)[0]
        return plain
    fused = not _has_modes() and can_run_transformer(module, x, conditions)
    with widened(x), _FastFunctions():
        if fused:
            return run_transformer_fused(module, x, conditions)
        out: Tensor = module(x, return_dict=False, **conditions)[0]
    return out


def _has_modes() -> bool:
    """Whether a mode of the caller's, other than a default device, is to see what diffusers
    calls."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(not isinstance(mode, DeviceContext) for mode in modes)


class _FastFunctions(TorchFunctionMode):
    """Replaces the torch functions of ``_IMPLEMENTATIONS``."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        fast = _IMPLEMENTATIONS.get(function)
        out = None if fast is None else fast(*args, **(kwargs or {}))
        return out if out is not None else function(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    tensors, dtype = [tensor for tensor in (input, weight, bias) if tensor is not None], input.dtype
    dense = all(x.dtype is dtype and x.is_contiguous() for x in tensors)
    if not dense or not (dtype is torch.float32 or is_slow(dtype)) or not is_eager(*tensors):
        return None
    if weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        return None
    bias = None if bias is None else bias.float()
    out = kernels_for(torch.float32).linear(input.float(), weight, bias)
    return None if out is None else out.to(dtype)


def _conv1x1(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> Tensor | None:
    """A 1x1 convolution, which is a linear layer on a channels-last feature map."""
    ones, zeros = (1, (1, 1)), (0, (0, 0))
    if weight.shape[2:] != (1, 1) or groups != 1 or stride not in ones or padding not in zeros:
        return None
    out = _linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias)
    return None if out is None else out.permute(0, 3, 1, 2)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """GroupNorm of a feature map, with statistics in float64."""
    if input.ndim != 4 or not is_supported(input):
        return None
    grouped = input.shape[1] % num_groups == 0 and input[0].numel() > num_groups
    if not grouped or weight is None or bias is None or not is_eager(input, weight, bias):
        # in channels-first order, in which torch's is accurate
        return functional.group_norm(input.contiguous(), num_groups, weight, bias, eps)
    return normalise(input, group_stats(input, num_groups), weight, bias, eps)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention with one key and value head for each query head, and without a mask."""
    inputs, dtype = (query, key, value), query.dtype
    plain = attn_mask is None and not dropout_p and not is_causal
    if not plain or any(x.ndim != 4 or x.dtype is not dtype for x in inputs):
        return None
    if dtype not in DTYPES or has_matrix_units(dtype):
        return None
    agree = query.shape[:2] == key.shape[:2] and key.shape[:3] == value.shape[:3]
    if not agree or query.shape[3] != key.shape[3] or 0 in (*query.shape, *value.shape):
        return None
    if not is_eager(*inputs):
        return None
    factor = query.shape[3] ** -0.5 if scale is None else scale
    kernels = kernels_for(torch.float32)
    if kernels is torch_kernels:
        return None
    out = kernels.attention(query.float(), key.float(), value.float(), factor)
    return None if out is None else out.to(dtype)


_IMPLEMENTATIONS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.conv2d: _conv1x1,
    functional.group_norm: _group_norm,
    functional.scaled_dot_product_attention: _attention,
}
