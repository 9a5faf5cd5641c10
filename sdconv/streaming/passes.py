"""A step under way: strips of one map become strips of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdconv.streaming.moments import Moments


@dataclass(frozen=True)
class Ground:
    """What a step works on; each map is ``(H, W, C)``, wherever it lies.

    Attributes:
        source, target, residual: see ``Step``. whole: the maps that are read as a whole.
        moments: of the source, where it is normalised. measured: takes in what is written, where
            that is normalised next. device: where strips are computed.
    """

    source: Tensor
    target: Tensor
    residual: Tensor | None
    whole: tuple[Tensor, ...]
    moments: Moments | None
    measured: Moments | None
    device: torch.device


class Pass(Protocol):
    """A step under way, from above."""

    def strip(self, first: int, last: int) -> None:
        """Writes what units ``first`` up to ``last`` give into the target."""
