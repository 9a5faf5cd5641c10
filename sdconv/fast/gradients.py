"""Gradients of custom operators: those of torch operations that compute the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps an operator's inputs: the ``setup_context`` for `gradient_of`'s functions."""
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.positions = tuple(i for i, value in enumerate(inputs) if isinstance(value, Tensor))
    ctx.save_for_backward(*(inputs[i] for i in ctx.positions))


def gradient_of(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward function of an operator whose first (or only) output ``function`` recomputes.

    It can be differentiated again.
    """

    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        wanted = [i for i in ctx.positions if ctx.needs_input_grad[i]]
        # whether this gradient will be differentiated in turn
        again = torch.is_grad_enabled()
        for i, value in zip(ctx.positions, ctx.saved_tensors, strict=True):
            if i not in wanted:
                # torch crashes on the gradient of a normalisation's weight alone if the input is in
                # channels-last order
                inputs[i] = value.detach().contiguous()
            else:
                # a tensor that is passed twice has a gradient for each
                inputs[i] = value.view_as(value) if again else value.detach().requires_grad_()
        with torch.enable_grad():
            out = function(*inputs)
        found = torch.autograd.grad(
            out, [inputs[i] for i in wanted], grad, allow_unused=True, create_graph=again
        )
        grads: list[Tensor | None] = [None] * len(inputs)
        for i, one in zip(wanted, found, strict=True):
            grads[i] = one
        return tuple(grads)

    return backward
