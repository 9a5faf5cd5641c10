"""The VAE's attention on CUDA, with the value and the output projection folded into one.

The weights of an attention row sum to 1, so that ``softmax(q k) (n V + v) O + o`` is ``softmax(q k)
n (V O) + (v O + o)``: the product of the two weights is one projection, and the constant joins the
residual in the epilogue. The product is taken in float32 and rounded once. It is taken in each
call, which costs as much as the projection of ``C`` tokens and leaves nothing that could be stale.

Heads of 512 channels are too wide for the kernels of flash attention; torch's fused attention runs
at a sixth of the rate of a matrix product there. So the attention is two products of cuBLAS's, some
thousand queries at a time, with the scores in float32 between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cuda.choices import choose
from sdconv.fast.cuda.group_norm import has_triton
from sdconv.fast.preconditions import is_eager

# Scores that are in memory at a time: 512 MiB in float32, and 256 MiB of weights in 16 bits.
SCORES = 1 << 27
# channels of a head that flash attention takes at most
FLASH_CHANNELS = 256


def attend(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention of normalised tokens.

    Args:
        block: an ``sdconv.models.blocks.Attention``.
        tokens: ``(B, H*W, C)``.

    Returns:
        What is added to the block's input: ``(B, H*W, C)``, and ``(C,)`` for all pixels or None.
    """
    value, out = block.to_v, block.to_out[0]
    if is_folded(block, tokens):
        weight, bias = fold(value.weight, value.bias, out.weight, out.bias)
        values, last = functional.linear(tokens, weight), None
    else:
        values, last, bias = value(tokens), out.weight, out.bias
    mixed = _attend(block.to_q(tokens), block.to_k(tokens), values)
    return mixed if last is None else functional.linear(mixed, last), bias


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k / sqrt(C)) v`` of one head, each ``(B, HW, C)``."""
    if uses_products(query, key, value):
        return by_products(query, key, value)
    mixed = functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
    return mixed[:, 0]


def uses_products(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention runs as two matrix products: in 16 bits, of a wide head, without gradients,
    and with the kernels that it takes."""
    _, pixels, channels = query.shape
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and channels > FLASH_CHANNELS
        and is_eager(query, key, value)
        and has_triton()
        and hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8
        and choose("scores", channels, pixels) == "products"
    )


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as two matrix products with a softmax between them; scores, and the sums of both
    products, are float32."""
    pixels, channels = query.shape[1:]
    out = torch.empty_like(query)
    rows = max(SCORES // pixels, 128)
    for sample in range(len(query)):
        for first in range(0, pixels, rows):
            own = slice(first, first + rows)
            scores = product(query[sample, own], key[sample].T)
            weights, sums = softmax_rows(scores, channels**-0.5, query.dtype)
            torch.div(product(weights, value[sample]), sums, out=out[sample, own])
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in float32."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def softmax_rows(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numerators of ``softmax(scale * scores)``, with 1 as the largest of each row, rounded to
    ``dtype``: its smallest numbers would not hold the softmax of many scores; and their sums.

    Args:
        scores: ``(R, C)`` in float32.
        scale: a positive factor.
        dtype: of the numerators.

    Returns:
        ``(R, C)``, and ``(R, 1)`` in float32.
    """
    if scores.device.type == "cuda" and has_triton():
        from sdconv.fast.cuda.triton_softmax import run_softmax_rows

        return run_softmax_rows(scores, scale, dtype)
    weights = ((scores - scores.amax(1, keepdim=True)) * scale).exp().to(dtype)
    return weights, weights.float().sum(1, keepdim=True)


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
