"""What the page and the figures are made from: maps by name, and the network's blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdconv.errors import InputError

Values = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One map as one call computed it.

    ``read`` gives its values, of ``shape`` ``(C, H, W)``; it is called when they are needed, so
    that maps on disk need not be in memory together.
    """

    read: Callable[[], Values]
    shape: tuple[int, int, int]
    step: int = 0
    timestep: float | None = None
    half: str | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A point of the network and what was seen there, call by call.

    Args:
        name: as the network calls it, such as ``decoder.up_blocks.0.resnets.1:silu1``.
        block: the block of the drawing that it belongs to, by name.
        shots: at least one, in order.
        facts: what is to be said of it, label -> words.
    """

    name: str
    block: str
    shots: Sequence[Shot]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name within its block."""
        inside = self.name.removeprefix(self.block).lstrip(".:")
        return inside or "output"


def as_maps(values: Any, aspect: float = 1.0) -> Values:
    """One example's values as ``(C, H, W)`` in float32.

    Args:
        values: a tensor ``(B, C, H, W)``, of which the first example is taken; ``(B, N, C)``
            tokens, laid out again as the rows and columns that ``N`` and ``aspect`` allow, or as
            one row; or ``(B, C)``, a vector, as maps of a single place.
        aspect: columns over rows of the network's input.

    Raises:
        InputError: of another number of axes, or empty.
    """
    shape = tuple(values.shape)
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise InputError("no feature map", expected="(B, C, H, W), (B, N, C) or (B, C)", got=shape)
    first = values[0]
    if hasattr(first, "detach"):
        first = first.detach().float().cpu().numpy()
    one: Values = np.ascontiguousarray(first, dtype=np.float32)
    if one.ndim == 1:
        return one[:, None, None]
    if one.ndim == 2:
        rows = round(math.sqrt(len(one) / aspect))
        rows = rows if rows and len(one) % rows == 0 else 1
        return np.ascontiguousarray(one.T.reshape(one.shape[1], rows, -1))
    return one
