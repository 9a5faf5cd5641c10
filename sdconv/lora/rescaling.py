"""Updates that rescale a weight: (IA)3, and DoRA, which rescales a weight after an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.lora.updates import Update


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescaling(Update):
    """(IA)3: ``W * (1 + scale * (vector - neutral))`` along one axis.

    ``axis``: 0 for the outputs, 1 for the inputs. ``neutral``: the value that changes nothing, 0 in
    LyCORIS' files and 1 in PEFT's.

    Liu et al. 2022, https://arxiv.org/abs/2205.05638; LyCORIS' ``modules/ia3.py`` and PEFT's
    ``tuners/ia3``.
    """

    axis: int
    neutral: float

    @property
    def _vector(self) -> Tensor:
        return next(iter(self.tensors.values()))

    def fits(self, shape: Sequence[int]) -> bool:
        return (
            len(shape) > self.axis
            and self._vector.numel() == shape[self.axis]
            and self._vector.numel() == max(self._vector.shape, default=1)
        )

    def delta(self, original: Tensor, scale: float) -> Tensor:
        change = (self._vector.to(original).flatten() - self.neutral) * scale
        along = [1] * original.ndim
        along[self.axis] = -1
        return original * change.view(along)


@dataclass(frozen=True, kw_only=True, eq=False)
class DoRA(Update):
    """``scale * (magnitude * V / norm(V) - W)`` with ``V = W + update``: the trained magnitude of
    each output's (or input's) weights, and the direction after an update with scale 1.

    ``inner``: the update. ``axis``: 0 if there is a magnitude for each output, 1 for each input;
    the norm is over all other axes. ``magnitude`` has one value for each.

    The scale interpolates between the original and the trained weight, as in LyCORIS'
    ``apply_dora_scale``. (LyCORIS' modules scale the magnitude's share alone, and PEFT's the update
    within the norm; both leave something at scale 0. All agree at 1.)

    Liu et al. 2024, https://arxiv.org/abs/2402.09353; LyCORIS' ``functional/general.py`` and PEFT's
    ``tuners/lora/dora.py``.
    """

    inner: Update
    axis: int

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape) and self.tensors["magnitude"].numel() == shape[self.axis]

    def delta(self, original: Tensor, scale: float) -> Tensor:
        changed = original + self.inner.delta(original, 1.0)
        others = [axis for axis in range(changed.ndim) if axis != self.axis]
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        norms += torch.finfo(norms.dtype).eps  # LyCORIS'; a row of zeros stays one
        magnitude = self.tensors["magnitude"].to(original).reshape(norms.shape)
        return (changed * (magnitude / norms) - original) * scale

    @property
    def width(self) -> int | None:
        return self.inner.width
