"""The VAE's attention on CUDA, with the value and the output projection folded into one.

The weights of an attention row sum to 1, so that ``softmax(q k) (n V + v) O + o`` is ``softmax(q k)
n (V O) + (v O + o)``: the product of the two weights is one projection, and the constant joins the
residual in the epilogue. The product is taken in float32 and rounded once. It is taken in each
call, which costs as much as the projection of ``C`` tokens and leaves nothing that could be stale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cuda.choices import choose


def attend(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention of normalised tokens.

    Args:
        block: an ``sdconv.models.blocks.Attention``.
        tokens: ``(B, H*W, C)``.

    Returns:
        What is added to the block's input: ``(B, H*W, C)``, and ``(C,)`` for all pixels or None.
    """
    batch, pixels, channels = tokens.shape
    value, out = block.to_v, block.to_out[0]
    if is_folded(block, tokens):
        weight, bias = fold(value.weight, value.bias, out.weight, out.bias)
        values, last = functional.linear(tokens, weight), None
    else:
        values, last, bias = value(tokens), out.weight, out.bias
    query, key, values = (
        # (B, 1 head, HW, C)
        one.view(batch, pixels, 1, channels).transpose(1, 2)
        for one in (block.to_q(tokens), block.to_k(tokens), values)
    )
    mixed = functional.scaled_dot_product_attention(query, key, values)
    mixed = mixed.transpose(1, 2).reshape(batch, pixels, channels)
    return mixed if last is None else functional.linear(mixed, last), bias


def is_folded(block: Any, tokens: Tensor) -> bool:
    """Whether `attend` folds: no gradient is recorded, and the product of the weights costs less
    than the projection of the tokens that it saves."""
    batch, pixels, channels = tokens.shape
    weights = (*block.to_v.parameters(), *block.to_out[0].parameters())
    if torch.is_grad_enabled() and any(one.requires_grad for one in (tokens, *weights)):
        return False
    return batch * pixels > channels and choose("attention", channels, pixels) == "folded"


def fold(
    value_weight: Tensor, value_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One projection for two: the weight, ``(C, C)`` in the dtype of ``value_weight``, and the
    bias, ``(C,)`` in float32 or wider."""
    dtype = torch.promote_types(value_weight.dtype, torch.float32)
    last = out_weight.to(dtype)
    weight = (last @ value_weight.to(dtype)).to(value_weight.dtype)
    if value_bias is None:
        return weight, out_bias
    bias = last @ value_bias.to(dtype)
    return weight, bias if out_bias is None else bias + out_bias.to(dtype)
