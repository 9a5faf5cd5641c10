"""Gradients of losses on feature maps, as in self-guidance (Epstein et al. 2023,
https://arxiv.org/abs/2306.00986)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.errors import InputError
from sdconv.features.capture import capture
from sdconv.features.maps import Maps
from sdconv.features.selection import Patterns


def feature_gradient(
    network: nn.Module,
    patterns: Patterns,
    loss: Callable[[Maps], Tensor],
    sample: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The gradient of a loss on a network's feature maps with respect to its input.

    A sampler that adds it to the predicted noise, scaled, moves the image to where the loss is
    lower. The network runs no further than the last layer that matches.

    Args:
        network: a U-Net, an encoder or any other module, sdconv's or diffusers'.
        patterns: names or globs of the feature maps, as for ``sdconv.capture``.
        loss: a function of the captured maps that returns a single number.
        sample: the network's first argument; it is not changed.
        args, kwargs: the network's other arguments.

    Returns:
        A tensor like ``sample``.

    Raises:
        InputError: the loss is not a single number, or does not depend on the feature maps; or as
            ``sdconv.capture``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        start = sample.detach().clone().requires_grad_()
        with capture(network, patterns, grad=True, stop_early=True) as maps:
            network(start, *args, **kwargs)
        value = loss(maps)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError(
                "a loss must be a single number that depends on the feature maps",
                where="loss",
                expected="a tensor with one value and a gradient",
                got=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
            )
        (gradient,) = torch.autograd.grad(value.sum(), start)
    return gradient
