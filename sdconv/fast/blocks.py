"""The convolutional blocks with fused arithmetic.

Each function takes a block of :mod:`sdconv.blocks` and computes what its ``forward`` does. Maps are
``(B, C, H, W)``; moments are those of :mod:`sdconv.ops.moments`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdconv.backends import is_fast
from sdconv.fast.modules import is_bare, is_conv1x1, is_conv3x3, is_norm, takes
from sdconv.ops import chosen, fused, library
from sdconv.ops.fused import After, NotFiniteError
from sdconv.ops.moments import Norm


def runs_resnet(block: Any, x: Tensor) -> bool:
    """Whether a ResNet block is to compute fast, and can: nothing hangs on its parts that has to
    see what goes through them."""
    return (
        is_fast(block)
        and takes(x)
        and is_norm(block.norm1, x)
        and is_conv3x3(block.conv1, x)
        and is_norm(block.norm2, x)
        and is_conv3x3(block.conv2, x)
        and is_bare(block.nonlinearity, nn.SiLU)
        and (block.conv_shortcut is None or is_conv1x1(block.conv_shortcut, x))
    )


def resnet(
    block: Any, x: Tensor, temb: Tensor | None, moments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A ResNet block's output, and its moments for the next normalisation.

    Args:
        moments: of ``x`` for ``block.norm1``, if they are known.
    """
    added = None
    if block.time_emb_proj is not None:
        added = block.time_emb_proj(block.nonlinearity(temb))
    shortcut = block.conv_shortcut
    after = After(
        block.conv2.bias,
        residual=x,
        shortcut=None if shortcut is None else (shortcut.weight, shortcut.bias),
    )
    try:
        norm = _norm(block.norm1, x, silu=True, moments=moments)
        before = After(block.conv1.bias, added)
        hidden, found = convolution(x, block.conv1, norm, before, block.norm2.num_groups)
        norm = _norm(block.norm2, hidden, silu=True, moments=found)
        # what is hidden has no other reader
        return convolution(hidden, block.conv2, norm, after, block.norm1.num_groups, in_place=True)
    except NotFiniteError:
        hidden = fused.direct(x, block.conv1.weight, _norm(block.norm1, x, silu=True), before)
        norm = _norm(block.norm2, hidden, silu=True)
        out = fused.direct(hidden, block.conv2.weight, norm, after)
        return out, _moments(out, block.norm1.num_groups)


def runs_doubling(block: Any, x: Tensor, output_size: tuple[int, int] | None) -> bool:
    """Whether a doubling is to compute fast, and can."""
    exact = output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3])
    return exact and is_fast(block) and takes(x) and is_conv3x3(block.conv, x)


def doubling(block: Any, x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A doubled map after its convolution, and its moments."""
    if _is_eager(x, block.conv):
        return chosen.doubled_convolution(x, block.conv.weight, block.conv.bias, groups=groups)
    out, found = library.doubled_convolution(x, block.conv.weight, block.conv.bias, groups)
    return out, found


def runs_last(norm: nn.Module, activation: nn.Module, conv: nn.Module, x: Tensor) -> bool:
    """Whether a network's last normalisation, SiLU and convolution are to compute fast."""
    return (
        is_fast(conv)
        and takes(x)
        and is_norm(norm, x)
        and is_bare(activation, nn.SiLU)
        and is_conv3x3(conv, x)
    )


def last(norm: Any, conv: Any, x: Tensor) -> Tensor:
    """A network's last normalisation, SiLU and convolution."""
    return convolution(x, conv, _norm(norm, x, silu=True), After(conv.bias), 1)[0]


def convolution(
    x: Tensor,
    conv: nn.Conv2d,
    norm: Norm,
    after: After,
    groups: int,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """A 3x3 convolution by the method that its shape is best served by, and its moments.

    Raises:
        NotFiniteError: the output is not finite and ``x`` was spoilt by writing ``in_place``.
    """
    if _is_eager(x, conv, norm.weight, norm.bias, after.added, after.residual):
        in_place = in_place and x.shape[1] == len(conv.weight) and _is_channels_last(x)
        return chosen.convolution(x, conv.weight, norm, after, groups=groups, in_place=in_place)
    out, found = library.convolution(
        x,
        conv.weight,
        after.bias,
        norm.moments,
        norm.weight,
        norm.bias,
        norm.eps,
        norm.silu,
        after.added,
        after.residual,
        *(after.shortcut or (None, None)),
        groups,
    )
    return out, found


def _norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool, moments: Tensor | None = None) -> Norm:
    if moments is None or moments.shape[1] != norm.num_groups:
        moments = _moments(x, norm.num_groups)
    return Norm(moments, norm.weight, norm.bias, norm.eps, silu)


def _moments(x: Tensor, groups: int) -> Tensor:
    return fused.moments(x, groups) if _is_eager(x) else library.moments(x, groups)


def _is_channels_last(x: Tensor) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()


def _is_eager(*given: Tensor | nn.Conv2d | None) -> bool:
    """Whether plain tensors are computed with here and now: nothing is being traced, nothing looks
    on, and no gradient will be asked for. Otherwise torch has to see operators of its own."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    tensors: list[Tensor] = []
    for one in given:
        if isinstance(one, nn.Conv2d):
            tensors += one.parameters(recurse=False)
        elif one is not None:
            tensors.append(one)
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
