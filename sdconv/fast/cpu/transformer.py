"""diffusers' ``Transformer2DModel`` on a CPU in float32, with fewer passes over its tokens.

Each residual is added by the linear layer before it, GEGLU is computed by its own, the tokens
``(B, H W, C)`` are a view of a channels-last feature map, and an unchanged prompt's keys and values
are those of the step before. A part that is not plain (a hook, an adapter, another attention
processor) is called, and only what is around it is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdconv.fast.cpu.kernels import kernels_for
from sdconv.fast.cpu.weight_cache import prompt_cache
from sdconv.fast.preconditions import (
    is_bare,
    is_conv1x1,
    is_diffusers,
    is_diffusers_processor,
    is_eager,
    is_linear,
)
from sdconv.models.unet_blocks import Conditions


def can_run_transformer(module: Any, x: Tensor, conditions: Conditions) -> bool:
    """Whether a module is diffusers' transformer of feature maps and attends without masks."""
    given = {
        name
        for name, value in conditions.items()
        if value is not None and not (isinstance(value, dict) and not value)
    }
    return (
        x.dtype is torch.float32
        and not torch.is_grad_enabled()
        and is_diffusers(module, "Transformer2DModel")
        and given == {"encoder_hidden_states"}
        and module.is_input_continuous
    )


def transformer(module: Any, x: Tensor, conditions: Conditions) -> Tensor:
    """Runs a transformer: ``(B, C, H, W)`` to the same shape, in channels-last order."""
    x = x.contiguous(memory_format=torch.channels_last)
    height, width = x.shape[2:]
    hidden = module.norm(x)
    if module.use_linear_projection:
        hidden = module.proj_in(_tokens(hidden))
    else:
        hidden = _tokens(module.proj_in(hidden))
    for block in module.transformer_blocks:
        if _is_plain_block(block):
            hidden = _block(block, hidden, conditions["encoder_hidden_states"])
        else:
            masks = {"attention_mask": None, "encoder_attention_mask": None}
            none = {"timestep": None, "cross_attention_kwargs": None, "class_labels": None}
            hidden = block(hidden, **{**masks, **none, **conditions})
    fused = _fused_add(module.proj_out, hidden, _tokens(x))
    if fused is not None:
        return _feature_map(fused, height, width)
    if module.use_linear_projection:
        return _feature_map(module.proj_out(hidden), height, width) + x
    out: Tensor = module.proj_out(_feature_map(hidden, height, width))
    return out + x


def _is_plain_block(block: Any) -> bool:
    return (
        is_diffusers(block, "BasicTransformerBlock")
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block._chunk_size is None
    )


def _block(block: Any, x: Tensor, context: Any) -> Tensor:
    own = context if block.only_cross_attention else None
    x = _attend(block.attn1, block.norm1(x), own, x)
    if block.attn2 is not None:
        x = _attend(block.attn2, block.norm2(x), context, x)
    return _feed_forward(block.ff, block.norm3(x), x)


def _attend(attention: Any, x: Tensor, context: Any, residual: Tensor) -> Tensor:
    """An attention layer's output, plus the residual."""
    plain = context is None or isinstance(context, Tensor)
    if not plain or not _is_plain_attention(attention):
        out: Tensor = attention(x, encoder_hidden_states=context, attention_mask=None)
        return out + residual
    if context is None:
        key, value = attention.to_k(x), attention.to_v(x)
    else:
        key, value = (_of_prompt(layer, context) for layer in (attention.to_k, attention.to_v))
    projected = attention.to_q(x), key, value
    heads = [one.unflatten(-1, (attention.heads, -1)) for one in projected]
    mixed = functional.scaled_dot_product_attention(*(one.transpose(1, 2) for one in heads))
    return _add(attention.to_out[0], mixed.transpose(1, 2).flatten(2), residual)


def _of_prompt(layer: Any, context: Tensor) -> Tensor:
    """A linear layer's output for a prompt, which is kept for the next step."""
    if is_linear(layer, context) and layer.bias is None and is_eager(context, layer.weight):
        return prompt_cache.get(layer.weight, project, context)
    out: Tensor = layer(context)
    return out


def project(weight: Tensor, context: Tensor) -> Tensor:
    """``(..., K)`` times the transpose of ``(O, K)``."""
    return functional.linear(context, weight)


def _is_plain_attention(attention: Any) -> bool:
    absent = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    return (
        is_diffusers(attention, "Attention")
        and is_diffusers_processor(attention.processor, "AttnProcessor2_0")
        and not any(getattr(attention, name, None) for name in absent)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and _is_identity(attention.to_out[1])
    )


def _feed_forward(module: Any, x: Tensor, residual: Tensor) -> Tensor:
    """A feed-forward layer's output, plus the residual."""
    if not (
        is_diffusers(module, "FeedForward")
        and is_diffusers(module.net[0], "GEGLU")
        and all(map(_is_identity, (module.net[1], *module.net[3:])))
    ):
        out: Tensor = module(x)
        return out + residual
    return _add(module.net[2], _geglu(module.net[0], x), residual)


def _geglu(module: Any, x: Tensor) -> Tensor:
    if _is_dense(module.proj, x):
        fused = kernels_for(x.dtype).geglu(x, module.proj.weight, module.proj.bias)
        if fused is not None:
            return fused
    out: Tensor = module(x)
    return out


def _is_identity(module: Any) -> bool:
    """Whether a module is a dropout that drops nothing."""
    return is_bare(module, nn.Dropout) and (not module.training or module.p == 0)


def _add(layer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """A linear layer's output, plus the residual."""
    fused = _fused_add(layer, x, residual)
    if fused is not None:
        return fused
    out: Tensor = layer(x)
    return out + residual


def _fused_add(layer: Any, x: Tensor, residual: Tensor) -> Tensor | None:
    """`_add` for linear layers and 1x1 convolutions of tokens ``(B, T, K)``; None where they have
    to be called."""
    if not _is_dense(layer, x, residual) or residual.shape != (*x.shape[:-1], len(layer.weight)):
        return None
    return kernels_for(x.dtype).linear(x, layer.weight.flatten(1), layer.bias, residual)


def _is_dense(layer: Any, x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels may compute a linear layer or a 1x1 convolution of tokens."""
    if not (is_linear(layer, x) or is_conv1x1(layer, x)) or x.shape[-1] != layer.weight.shape[1]:
        return False
    tensors = [one for one in (x, layer.weight, layer.bias, *others) if one is not None]
    return is_eager(*tensors) and all(
        one.is_contiguous() and one.dtype is torch.float32 for one in tensors
    )


def _tokens(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B, H W, C)``, a view of a channels-last feature map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _feature_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """``(B, H W, C)`` as ``(B, C, H, W)`` in channels-last order."""
    return tokens.view(len(tokens), height, width, -1).permute(0, 3, 1, 2)
