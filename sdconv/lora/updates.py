"""What an adapter adds to one parameter of a network, and the sum of several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.checkpoint.io.narrow import beyond_range
from sdconv.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Update(ABC):
    """An adapter's update of one parameter, a layer's weight or bias.

    ``kind``: its name, such as ``"LoHa"``. ``tensors``: the file's tensors by role, in the file's
    dtype. ``factor``: what the update is multiplied by besides the scale, often alpha over rank.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    factor: float = 1.0

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it can be added to a parameter of this shape."""

    @abstractmethod
    def delta(self, original: Tensor, scale: float) -> Tensor:
        """What is added to a parameter, with its shape, dtype and device.

        Args:
            original: the parameter without any LoRA, in float32 or float64; its shape fits.
            scale: the strength; 1 gives the layer as it was trained, 0 leaves the original.
        """

    @property
    def shapes(self) -> str:
        """The shapes of its tensors, for error messages."""
        return ", ".join(f"{role} {tuple(one.shape)}" for role, one in self.tensors.items())

    @property
    def width(self) -> int | None:
        """The input width of a linear layer that it was trained for, if its shapes tell."""
        return None

    def _to(self, original: Tensor) -> dict[str, Tensor]:
        """Its tensors in the dtype and on the device of the original."""
        return {role: one.to(original) for role, one in self.tensors.items()}


@torch.no_grad()
def merged(
    name: str,
    original: Tensor,
    updates: Sequence[tuple[Update, float]],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A parameter with updates added.

    Each update is computed from the original, in float32 (in float64 for float64 parameters); they
    are summed, and the sum is rounded once.

    Args:
        name: the parameter's name in error messages.
        original: the parameter without any LoRA; each update fits its shape.
        updates: the updates, each with its scale.
        dtype: that of the result; None takes the original's.

    Returns:
        A new tensor on the original's device.

    Raises:
        InputError: a value is not finite in ``dtype``.
    """
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    start = original.to(wide)
    total = start.clone()
    for update, scale in updates:
        total += update.delta(start, scale)
    rounded = total.to(dtype or original.dtype)
    if not bool((torch.isfinite(rounded.to(wide)) & ~beyond_range(total, rounded)).all()):
        raise InputError(
            "the merged weight has values that are not finite, or too large for its dtype",
            where=name,
            expected=f"numbers that {rounded.dtype} can hold",
            got=f"scale {' and '.join(f'{scale:g}' for _, scale in updates)}",
            hint="use a smaller scale, or weights in a wider dtype",
        )
    return rounded


def has_shape(matrix: Tensor, sides: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether a matrix has these sides and this kernel; any two kernels of one element match."""
    own = tuple(matrix.shape[2:])
    return tuple(matrix.shape[:2]) == sides and (
        own == kernel or math.prod(own) == math.prod(kernel) == 1
    )
